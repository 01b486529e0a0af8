// torch's current stream, of a torch that may have been built without CUDA: see stream.cpp.

#pragma once

#include <cuda_runtime.h>

namespace focalnet::cuda {

cudaStream_t current_stream(int device);

}  // namespace focalnet::cuda
