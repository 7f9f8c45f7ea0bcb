// twice(x) for contiguous float32 on a CUDA device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

#include "registration.h"

void twice(const float* x, float* y, long n, cudaStream_t stream);

static void twice_boxed(StableIValue* stack, uint64_t, uint64_t) {
  AtenTensorHandle x = reinterpret_cast<AtenTensorHandle>(static_cast<uintptr_t>(stack[0])), y = nullptr;
  int64_t dim = 0, numel = 0, *sizes = nullptr, *strides = nullptr;
  int32_t device = 0;
  aoti_torch_get_dim(x, &dim);
  aoti_torch_get_numel(x, &numel);
  aoti_torch_get_sizes(x, &sizes);
  aoti_torch_get_strides(x, &strides);
  aoti_torch_get_device_index(x, &device);
  aoti_torch_empty_strided(dim, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device, &y);
  void *from = nullptr, *to = nullptr, *stream = nullptr;
  aoti_torch_get_data_ptr(x, &from);
  aoti_torch_get_data_ptr(y, &to);
  aoti_torch_get_current_cuda_stream(device, &stream);
  twice(static_cast<const float*>(from), static_cast<float*>(to), numel, static_cast<cudaStream_t>(stream));
  aoti_torch_delete_tensor_object(x);
  stack[0] = static_cast<StableIValue>(reinterpret_cast<uintptr_t>(y));
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) { m.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, m) { m.impl("twice", &twice_boxed); }

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
