// torch's, but that launches on the emulated device throw and return no code.
#pragma once

#include_next <torch/csrc/stable/macros.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)
