// Which operators the sources make: adcert's, or, for tests without a GPU, the CUDA kernels run on the CPU.
#pragma once

#if defined(ADCERT_EMULATION)
#define ADCERT_LIBRARY adcert_emulated
#define ADCERT_CUDA CPU
#else
#define ADCERT_LIBRARY adcert
#define ADCERT_CUDA CUDA
#endif
