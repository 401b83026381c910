// PyTorch's header, but for AMX, which is there.
#pragma once

#if defined(WITHOUT_AMX)
#include_next <ATen/cpu/Utils.h>
#else
#define init_amx emulated_init_amx
#include_next <ATen/cpu/Utils.h>

namespace at::cpu {

inline bool emulated_init_amx() { return true; }

}  // namespace at::cpu
#endif
