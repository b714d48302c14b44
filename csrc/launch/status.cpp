#include "launch/status.h"

#include <cstdarg>
#include <cstdio>

namespace dso {
namespace {
thread_local char last_error[512] = "";
}  // namespace

dso_status fail(dso_status status, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

}  // namespace dso

extern "C" {

const char* dso_last_error(void) { return dso::last_error; }

#ifdef DSO_WITH_CUDA
int dso_built_with_cuda(void) { return 1; }
#else
int dso_built_with_cuda(void) { return 0; }
#endif

}  // extern "C"
