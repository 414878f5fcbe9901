// Launches of kernels, and their errors as text.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/device.h"

namespace ser_fast::cuda {

inline const char* error_string(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Bytes of shared memory that a block may ask for on the current device.
inline cudaError_t shared_limit(int& bytes) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

inline int64_t divide_up(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Returns what went wrong, or null; it does not wait for the device. Without blocks there is nothing to do.
template <typename Kernel, typename... Arguments>
const char* launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, void* stream, Arguments... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > std::numeric_limits<int>::max()) return "more blocks than a launch can have";
  int limit;
  if (const cudaError_t error = shared_limit(limit); error != cudaSuccess) return error_string(error);
  if (shared > limit) return "rows this long take more shared memory than a block has here";
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error_string(error);
  LAUNCH(kernel, static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream),
         arguments...);
  return error_string(cudaGetLastError());
}

// run(T{}) with the T of a type.
template <typename Run>
const char* with_type(Type type, const Run& run) {
  switch (type) {
    case Type::float32: return run(float{});
    case Type::float64: return run(double{});
    case Type::bfloat16: return run(bfloat16{});
    case Type::float16: return run(float16{});
  }
  return "a type without a kernel";
}

}  // namespace ser_fast::cuda
