// aoti_torch_get_current_cuda_stream is part of torch's stable C interface, but lives in libtorch_cuda, which a
// CPU-only torch lacks. It is looked up when the first kernel is to run, in the library that torch has loaded by then:
// this module needs nothing of CUDA to load.

#include "stream.h"

#include <torch/headeronly/util/Exception.h>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace focalnet::cuda {
namespace {

using GetStream = int (*)(int device, void** stream);
constexpr const char* kName = "aoti_torch_get_current_cuda_stream";

GetStream find() {
#ifdef _WIN32
    const HMODULE library = GetModuleHandleA("torch_cuda.dll");
    return library ? reinterpret_cast<GetStream>(GetProcAddress(library, kName)) : nullptr;
#else
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(dlsym(library ? library : RTLD_DEFAULT, kName));
#endif
}

}  // namespace

cudaStream_t current_stream(int device) {
    static const GetStream get = find();
    STD_TORCH_CHECK(get, "this torch has no ", kName, ": it was built without CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(get(device, &stream) == 0, kName, " failed");
    return static_cast<cudaStream_t>(stream);
}

}  // namespace focalnet::cuda
