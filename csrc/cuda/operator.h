// What every operator of csrc/cuda does with torch: element types, facts about the device, scratch, errors of a
// launch.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"
#include "gated_aggregation.h"

namespace focalnet::cuda {

inline Element element_of(const std::string& name, const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return Element::kFloat32;
        case ScalarType::BFloat16:
            return Element::kBFloat16;
        case ScalarType::Half:
            return Element::kFloat16;
        default:
            STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                            "; expected float32, bfloat16 or float16");
    }
    return Element::kFloat32;
}

inline void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error),
                    ")");
}

inline void check(const Status& status) {
    STD_TORCH_CHECK(!status, "focalnet: the launch of ", status.kernel, " failed: ", cudaGetErrorString(status.error),
                    " (", cudaGetErrorName(status.error), ")");
}

inline int attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

inline Limits limits_of(int device) {
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
            attribute(cudaDevAttrMultiProcessorCount, device)};
}

inline Tensor scratch_of(const Tensor& like, size_t bytes) {
    return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// Makes a device current for torch and for this module's own copy of the runtime.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : guard_(device) { check(cudaSetDevice(device), "cudaSetDevice"); }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace focalnet::cuda
