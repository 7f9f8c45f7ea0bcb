#include "double.h"

void twice(const float* x, float* y, long n) {
  for (long i = 0; i < n; i++) y[i] = 2 * x[i];
}
