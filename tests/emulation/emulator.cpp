// Runs the threads of a thread block as fibers of one thread, each until it waits: at a barrier for
// the block, at a shuffle for its warp. Between two waits a thread is not interrupted, so a missing
// barrier shows where the order of the threads matters: try several orders.
//
// Errors: threads of a block (lanes of a warp) that wait in different places, or for some that have
// finished. Masks other than the full one are not supported.
#include <ucontext.h>

#include <csetjmp>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t{256} << 10;

enum class State { ready, in_block, in_warp, done };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool has_started = false;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  Site site = {};
  // Of the barrier the fiber waits for: its vote, then the outcome.
  bool vote = false;
  // Exchanges so far; two rounds of values, since a lane may be one exchange ahead.
  unsigned round = 0;
};

struct Warp {
  uint64_t values[2][kLanes];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
const std::function<void()>* body = nullptr;
ucontext_t scheduler;
jmp_buf scheduler_jump;
unsigned order_seed = 0;
Fiber* current = nullptr;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_bytes = 0;

void enter(Fiber& fiber) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void leave(Fiber& fiber) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_bytes);
  swapcontext(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_bytes);
}

void entered() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
}
#else
// Jumps between stacks that setcontext has entered once: swapcontext would ask the kernel for the
// signal mask every time.
void enter(Fiber& fiber) {
  if (_setjmp(scheduler_jump) != 0) {
    return;
  }
  if (fiber.has_started) {
    _longjmp(fiber.jump, 1);
  }
  fiber.has_started = true;
  setcontext(&fiber.context);
}

void leave(Fiber& fiber) {
  if (_setjmp(fiber.jump) == 0) {
    _longjmp(scheduler_jump, 1);
  }
}

void entered() {}
#endif

void fiber_main() {
  entered();
  for (;;) {
    (*body)();
    current->state = State::done;
    leave(*current);
  }
}

void wait(State state, Site site) {
  current->state = state;
  current->site = site;
  leave(*current);
}

std::string described(const Fiber& fiber) {
  if (fiber.state == State::done) {
    return "has finished";
  }
  std::ostringstream text;
  text << "waits for its " << (fiber.state == State::in_block ? "block" : "warp") << " at "
       << fiber.site.file << ":" << fiber.site.line;
  return text.str();
}

bool together(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.site.file == b.site.file && a.site.line == b.site.line;
}

// Whether the fibers of [begin, end) all wait in one place, as `state` says.
bool gathered(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state != state || !together(fibers[i], fibers[begin])) {
      return false;
    }
  }
  return true;
}

bool release() {
  bool any = false;
  for (size_t begin = 0; begin < fibers.size(); begin += kLanes) {
    if (gathered(begin, begin + kLanes, State::in_warp)) {
      for (size_t i = begin; i < begin + kLanes; ++i) {
        fibers[i].state = State::ready;
      }
      any = true;
    }
  }
  if (gathered(0, fibers.size(), State::in_block)) {
    bool vote = false;
    for (const Fiber& fiber : fibers) {
      vote = vote || fiber.vote;
    }
    for (Fiber& fiber : fibers) {
      fiber.vote = vote;
      fiber.state = State::ready;
    }
    any = true;
  }
  return any;
}

void report() {
  std::ostringstream text;
  text << "emulation: the threads of block " << block_index.x << " wait for each other: thread 0 "
       << described(fibers[0]);
  for (size_t i = 1; i < fibers.size(); ++i) {
    if (!together(fibers[i], fibers[i - 1])) {
      text << ", thread " << i << " " << described(fibers[i]);
    }
  }
  // The waiting fibers are given up: their stacks hold nothing that needs a destructor.
  fibers.clear();
  throw std::runtime_error(text.str());
}

std::vector<unsigned> order_of(size_t n, std::mt19937& random) {
  std::vector<unsigned> order(n);
  for (size_t i = 0; i < n; ++i) {
    order[i] = static_cast<unsigned>(i);
  }
  for (size_t i = n; order_seed != 0 && i > 1; --i) {
    std::swap(order[i - 1], order[random() % i]);
  }
  return order;
}

void run_block(std::mt19937& random) {
  for (Fiber& fiber : fibers) {
    fiber.state = State::ready;
  }
  for (;;) {
    bool all_done = true;
    for (const unsigned i : order_of(fibers.size(), random)) {
      if (fibers[i].state == State::ready) {
        current = &fibers[i];
        thread_index = {i, 0, 0};
        enter(fibers[i]);
      }
    }
    for (const Fiber& fiber : fibers) {
      all_done = all_done && fiber.state == State::done;
    }
    if (all_done) {
      return;
    }
    if (!release()) {
      report();
    }
  }
}

void make_fibers(size_t n) {
  if (fibers.size() == n) {
    return;
  }
  fibers = std::vector<Fiber>(n);
  warps.resize(n / kLanes);
  for (Fiber& fiber : fibers) {
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

}  // namespace

bool block_barrier(bool value, Site site) {
  current->vote = value;
  wait(State::in_block, site);
  return current->vote;
}

const uint64_t* warp_exchange(uint64_t value, unsigned mask, Site site) {
  if (mask != 0xffffffffu) {
    site.file = "(a mask that is not full)";
  }
  uint64_t* values = warps[thread_index.x / kLanes].values[current->round++ % 2];
  values[thread_index.x % kLanes] = value;
  wait(State::in_warp, site);
  return values;
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (block.y * block.z * grid.y * grid.z != 1 || block.x % kLanes != 0 || grid.x == 0) {
    throw std::runtime_error("emulation: expected a grid of one dimension and full warps");
  }
  make_fibers(block.x);
  body = &kernel;
  block_size = block;
  grid_size = grid;
  std::mt19937 random(order_seed);
  for (const unsigned i : order_of(grid.x, random)) {
    block_index = {i, 0, 0};
    run_block(random);
  }
}

}  // namespace emulation

// 0: blocks and threads in order; else in an order drawn anew for every block and every barrier.
extern "C" void emulation_set_order(unsigned seed) {
  emulation::order_seed = seed;
}
