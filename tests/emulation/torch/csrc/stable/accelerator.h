// torch's, but that the emulated device needs no guard.
#pragma once

#include_next <torch/csrc/stable/accelerator.h>

namespace torch::stable::accelerator {

struct NoGuard {
  explicit NoGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator

#define DeviceGuard NoGuard
