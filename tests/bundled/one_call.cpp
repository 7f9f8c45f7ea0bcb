// One call of a CPU kernel, without torch: `one_call OP DTYPE ROWS N ACT < x, w, b > y`, raw arrays of DTYPE (0 float32, 1 bfloat16).
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

int main(int, char** argv) {
  std::string op = argv[1];
  int dt = std::atoi(argv[2]), act = std::atoi(argv[5]);
  long rows = std::atol(argv[3]), n = std::atol(argv[4]), size = dt == ks::kFloat32 ? 4 : 2;
  std::vector<char> x(rows * n * size), w(n * size), b(n * size), y(rows * n * size);
  for (auto* v : {&x, &w, &b})
    if (std::fread(v->data(), 1, v->size(), stdin) != v->size()) return 2;
  const ks::Kernels& k = *ks::select("");
  std::fputs(k.name, stderr);
  if (op == "rms_norm") k.rms_norm(dt, x.data(), n, w.data(), y.data(), rows, n, 1e-6, 0);
  if (op == "layer_norm") k.layer_norm(dt, x.data(), n, w.data(), b.data(), y.data(), rows, n, 1e-6);
  if (op == "act_mul") k.act_mul(dt, act, x.data(), x.data(), y.data(), rows * n);
  if (op == "rotary")
    for (long r = 0; r < rows; r++) k.rotary(dt, x.data() + r * n * size, w.data(), b.data(), y.data() + r * n * size, n, n, 0);
  return std::fwrite(y.data(), 1, y.size(), stdout) == y.size() ? 0 : 3;
}
