// torch's, but that what is registered for CUDA goes to the CPU under another name.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) \
  _STABLE_TORCH_LIBRARY_IMPL(ato_fast_emulated, CPU, m, C10_UID)
