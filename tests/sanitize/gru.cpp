// Runs the CPU's GRU forward and backward, a thread per direction, over arrays read from a file,
// and writes its states, what it saved and the gradients: for builds with sanitizers.
//
// Usage: gru INPUT OUTPUT. Input: steps, inputs and hidden size, source, gradient, the eight
// weights.
#include "cpu/gru_loops.h"

#include <thread>
#include <vector>

#include "blocks.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    return 2;
  }
  FILE* in = std::fopen(argv[1], "rb");
  std::vector<Block> read, written;
  for (int i = 0; i < 11; ++i) {
    read.push_back(read_block(in));
  }
  std::fclose(in);
  const int64_t* sizes = read[0].as<int64_t>();
  const int64_t steps = sizes[0], inputs = sizes[1], hidden = sizes[2];
  const int64_t state_bytes = steps * hidden * static_cast<int64_t>(sizeof(float));
  const auto add_block = [&](int64_t n_bytes) {
    written.push_back({n_bytes, std::malloc(n_bytes)});
  };
  add_block(2 * state_bytes);
  add_block(2 * ato::cpu::kGruSaved * state_bytes);
  for (int i = 0; i < 8; ++i) {
    add_block(read[3 + i].bytes);
  }
  for (const bool backward : {false, true}) {
    std::vector<std::thread> threads;
    for (int direction = 0; direction < 2; ++direction) {
      threads.emplace_back([&, backward, direction] {
        const Block* weights = &read[3 + 4 * direction];
        const Block* grads = &written[2 + 4 * direction];
        const ato::cpu::Gru gru{steps,
                                inputs,
                                hidden,
                                direction == 1,
                                read[1].as<float>(),
                                weights[0].as<float>(),
                                weights[1].as<float>(),
                                weights[2].as<float>(),
                                weights[3].as<float>()};
        float* states = written[0].as<float>() + direction * hidden;
        float* saved = written[1].as<float>() + direction * steps * ato::cpu::kGruSaved * hidden;
        if (backward) {
          ato::cpu::gru_backward(gru, states, saved, read[2].as<float>() + direction * hidden,
                                 {grads[0].as<float>(), grads[1].as<float>(), grads[2].as<float>(),
                                  grads[3].as<float>()});
        } else {
          ato::cpu::gru_forward(gru, states, saved);
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  FILE* out = std::fopen(argv[2], "wb");
  for (const Block& block : written) {
    write_block(out, block);
    std::free(block.data);
  }
  std::fclose(out);
  for (const Block& block : read) {
    std::free(block.data);
  }
  return 0;
}
