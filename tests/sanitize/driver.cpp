// Runs the CPU step on plain threads over arrays read from a file and writes the mutated ones back:
// for builds with sanitizers.
//
// Usage: driver INPUT OUTPUT
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "blocks.h"
#include "cpu/step.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    return 2;
  }
  FILE* in = std::fopen(argv[1], "rb");
  const Block header = read_block(in);
  const int64_t* head = header.as<int64_t>();
  const int64_t n_buffers = head[0], n_tensors = head[1], optimizer = head[2];
  const int64_t n_threads = head[4], n_steps = head[5];
  std::vector<Block> mutated, rest, grads;
  ato::cpu::Step s;
  s.projection = head[3];
  for (int64_t i = 0; i < n_buffers; ++i) {
    const Block p = read_block(in), m = read_block(in), v = read_block(in);
    s.buffers.push_back({p.data, head[6 + i] != 0, m.as<float>(), v.as<float>()});
    mutated.insert(mutated.end(), {p, m, v});
  }
  mutated.push_back(read_block(in));
  float* steps = mutated.back().as<float>();
  for (int i = 0; i < 9; ++i) {
    rest.push_back(read_block(in));
  }
  std::vector<const void*> gradients;
  for (int64_t t = 0; t < n_tensors; ++t) {
    grads.push_back(read_block(in));
    gradients.push_back(grads.back().as<void>());
  }
  std::fclose(in);

  s.segments = rest[1].as<ato::Segment>();
  s.bundles = rest[2].as<ato::Bundle>();
  const int64_t* units = rest[3].as<int64_t>();
  const int64_t n_units = rest[3].bytes / static_cast<int64_t>(sizeof(int64_t)) - 1;
  s.mask = rest[4].as<bool>();
  s.strength = rest[5].as<float>();
  s.threshold = rest[6].as<float>();
  const double* hyper = rest[7].as<double>();
  const double* args = rest[8].as<double>();
  s.args = {args[0], args[1], args[2]};
  for (int64_t at = 0; at < rest[7].bytes / 8; at += ato::kHyperColumns) {
    s.lr.push_back(hyper[at + ato::kLr]);
  }
  for (int64_t i = 0; i < n_steps; ++i) {
    ato::cpu::prepare(s, rest[0].as<int64_t>(), gradients, optimizer, hyper, 1.0, steps);
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < n_threads; ++t) {
      threads.emplace_back([&] { ato::cpu::run_units(s, units, n_units, next); });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    ato::cpu::advance(s, steps);
  }

  FILE* out = std::fopen(argv[2], "wb");
  for (const Block& block : mutated) {
    write_block(out, block);
    std::free(block.data);
  }
  std::fclose(out);
  for (const std::vector<Block>* blocks : {&rest, &grads}) {
    for (const Block& block : *blocks) {
      std::free(block.data);
    }
  }
  std::free(header.data);
  return 0;
}
