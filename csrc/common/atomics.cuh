// Integer atomics, which CUDA has built in and tests/cuda_emulator/atomics_emulated.cuh says in C++. None of floats:
// their sum would hang on the order.
#pragma once

#ifdef HF_FASTPATH_EMULATED
#include "atomics_emulated.cuh"
#endif
