#include <cuda_runtime.h>

__global__ void twice_kernel(const float* x, float* y, long n) {
  long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}

void twice(const float* x, float* y, long n, cudaStream_t stream) {
  if (n) twice_kernel<<<(n + 255) / 256, 256, 0, stream>>>(x, y, n);
}
