// Arrays that come from a file, each in a heap block of its exact size. A file is a sequence of
// (int64 bytes, bytes).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

struct Block {
  int64_t bytes = 0;
  void* data = nullptr;

  template <class T>
  T* as() const {
    return bytes == 0 ? nullptr : static_cast<T*>(data);
  }
};

inline Block read_block(FILE* file) {
  Block block;
  if (std::fread(&block.bytes, sizeof(block.bytes), 1, file) != 1) {
    std::fprintf(stderr, "driver: the input ends too early\n");
    std::exit(2);
  }
  block.data = std::malloc(block.bytes);
  if (block.bytes > 0 && std::fread(block.data, block.bytes, 1, file) != 1) {
    std::fprintf(stderr, "driver: a block is cut off\n");
    std::exit(2);
  }
  return block;
}

inline void write_block(FILE* file, const Block& block) {
  std::fwrite(&block.bytes, sizeof(block.bytes), 1, file);
  std::fwrite(block.data, 1, block.bytes, file);
}
