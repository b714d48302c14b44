// The C interface of libdeepseek_kernels: raw pointers, strides, a stream; a status and a message back.
//
// Neither CUDA nor torch headers are needed to include this file. Every function returns a dso_status; the sentence
// behind anything but DSO_OK is dso_last_error(). All are safe to call from many threads, and during graph capture.
#pragma once

#include <stdint.h>

#define DSO_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum dso_status {
    DSO_OK = 0,
    DSO_INVALID = 1,     // an argument is out of contract
    DSO_CUDA_ERROR = 2,  // CUDA refused
    DSO_NO_KERNEL = 3    // this build, or this GPU, has no kernel for it
} dso_status;

typedef enum dso_dtype { DSO_BF16 = 0, DSO_F16 = 1, DSO_F32 = 2 } dso_dtype;

typedef void* dso_stream;  // a cudaStream_t; 0 is the legacy default stream

// The calling thread's last failure, as a sentence.
DSO_API const char* dso_last_error(void);

// Whether the kernels were compiled in, and whether `device` is a GPU that they were compiled for (0 or 1).
DSO_API int dso_built_with_cuda(void);
DSO_API int dso_has_kernels_for(int device);

#ifdef __cplusplus
}  // extern "C"
#endif
