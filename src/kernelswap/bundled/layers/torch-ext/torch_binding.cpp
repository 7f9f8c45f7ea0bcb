// The torch side: schemas, shapes, strides, threads. Written against the C functions below torch's stable ABI, because its
// headers compile in one second instead of nine, the calls cost what ATen's do, and one source serves torch 2.9 and later.
//
// Every operator allocates its result and writes nothing else. Inputs are float32 or bfloat16 on the CPU and of one dtype; an
// input whose rows are not evenly spaced is copied first.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#if __has_include(<torch/csrc/stable/c/shim.h>)
#include <torch/csrc/stable/c/shim.h>
#define KS_TORCH_THREADS  // torch 2.10: torch's parallel_for as a C function
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../csrc/kernels.h"

namespace {

using ks::Kernels;

std::atomic<const Kernels*> chosen{ks::select("")};
const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call into torch failed");
}

// Owns one handle. The shape is read once: every read is a call into libtorch.
struct Tensor {
  AtenTensorHandle handle = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  char* data = nullptr;
  int32_t dtype = 0;

  explicit Tensor(AtenTensorHandle h) : handle(h) {
    check(aoti_torch_get_dim(h, &dim));
    check(aoti_torch_get_sizes(h, &sizes));
    check(aoti_torch_get_strides(h, &strides));
    check(aoti_torch_get_dtype(h, &dtype));
    void* p = nullptr;
    check(aoti_torch_get_data_ptr(h, &p));
    data = static_cast<char*>(p);
  }
  Tensor(Tensor&& o) noexcept { *this = std::move(o); }
  Tensor& operator=(Tensor&& o) noexcept {
    std::swap(handle, o.handle);
    dim = o.dim, sizes = o.sizes, strides = o.strides, data = o.data, dtype = o.dtype;
    return *this;
  }
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  AtenTensorHandle release() { return std::exchange(handle, nullptr); }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim; d++) n *= sizes[d];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
      if (sizes[d] != 1 && strides[d] != expected) return numel() == 0;
      expected *= sizes[d];
    }
    return true;
  }
  int64_t width() const { return dtype == aoti_torch_dtype_float32() ? 4 : 2; }
  int kind() const {
    if (dtype == aoti_torch_dtype_float32()) return ks::kFloat32;
    if (dtype == aoti_torch_dtype_bfloat16()) return ks::kBFloat16;
    throw std::runtime_error("expected float32 or bfloat16");
  }
};

// A large result is fresh memory, and faulting it in by 4 KiB costs more than writing it. Where the system grants huge pages
// to those who ask (Linux, `madvise`), ask, as torch does with THP_MEM_ALLOC_ENABLE. It is advice: nothing depends on it.
void advise_huge([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  uintptr_t bytes = uintptr_t(t.numel() * t.width());
  if (bytes < 4 * kPage) return;
  uintptr_t first = (uintptr_t(t.data) + kPage - 1) & ~(kPage - 1), last = (uintptr_t(t.data) + bytes) & ~(kPage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle out = nullptr;
  check(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &out));
  Tensor t(out);
  advise_huge(t);
  return t;
}

struct Strides {  // of a contiguous tensor; eight dimensions without an allocation
  std::vector<int64_t> many;
  int64_t few[8], *data = few;
  Strides(int64_t dim, const int64_t* sizes) {
    if (dim > 8) {
      many.resize(dim);
      data = many.data();
    }
    int64_t step = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
      data[d] = step;
      step *= std::max<int64_t>(sizes[d], 1);
    }
  }
};

Tensor empty_like(const Tensor& t) { return empty(t.dim, t.sizes, Strides(t.dim, t.sizes).data, t.dtype); }

Tensor contiguous(Tensor t) {
  if (t.contiguous()) return t;
  Tensor copy = empty_like(t);
  check(aoti_torch_copy_(copy.handle, t.handle, 0));
  return copy;
}

// Rows of the last dimension, `stride` elements apart.
struct Rows {
  int64_t count, n, stride;
};

// Whether all leading dimensions step evenly, as those of x[:, :k] or of a contiguous tensor do.
bool rows_of(const Tensor& t, Rows* out) {
  int64_t n = t.dim ? t.sizes[t.dim - 1] : 1;
  if (t.numel() == 0) {  // strides mean nothing then
    *out = {0, n, n};
    return true;
  }
  if (t.dim && n != 1 && t.strides[t.dim - 1] != 1) return false;
  int64_t count = 1, stride = n;
  bool first = true;
  for (int64_t d = t.dim - 2; d >= 0; d--) {
    if (t.sizes[d] == 1) continue;
    if (first) stride = t.strides[d];
    else if (t.strides[d] != stride * count) return false;
    first = false;
    count *= t.sizes[d];
  }
  *out = {count, n, stride};
  return true;
}

Tensor with_rows(Tensor t, Rows* rows) {
  if (rows_of(t, rows)) return t;
  Tensor copy = contiguous(std::move(t));
  rows_of(copy, rows);
  return copy;
}

constexpr int64_t kGrain = 32768;  // elements: at::internal::GRAIN_SIZE

template <class F>
void parallel(int64_t items, int64_t elements_per_item, const F& f) {
  if (items == 0) return;
  if (items * elements_per_item <= kGrain) return f(int64_t(0), items);
  int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_item));
#if defined(KS_TORCH_THREADS)
  check(torch_parallel_for(
      0, items, grain, [](int64_t a, int64_t b, void* f) { (*static_cast<const F*>(f))(a, b); }, const_cast<F*>(&f)));
#else
  int64_t tasks = (items + grain - 1) / grain;
#pragma omp parallel for schedule(static)  // the symbols are those of the OpenMP runtime that torch loaded
  for (int64_t t = 0; t < tasks; t++) f(t * grain, std::min(items, (t + 1) * grain));
#endif
}

// The number of pieces that weight gradients are summed in: enough for the threads, few enough to add up cheaply.
int64_t pieces(int64_t rows, int64_t n) {
  uint32_t threads = 1;
#if defined(KS_TORCH_THREADS)
  check(torch_get_num_threads(&threads));
#else
  threads = 8;
#endif
  if (rows * n <= kGrain) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(threads, rows));
}

// ---- what the stack holds ----

struct Stack {
  StableIValue* at;
  int next = 0;
  StableIValue raw() { return at[next++]; }
  template <class T>
  T plain() {
    T value;
    StableIValue v = raw();
    std::memcpy(&value, &v, sizeof(T));
    return value;
  }
  Tensor tensor() { return Tensor(plain<AtenTensorHandle>()); }
  void give(int index, Tensor t) {
    AtenTensorHandle h = t.release();
    StableIValue v = 0;
    std::memcpy(&v, &h, sizeof h);
    at[index] = v;
  }
};

void same_dtype(const Tensor& a, const Tensor& b) {
  if (a.dtype != b.dtype) throw std::runtime_error("all tensors of one call must have one dtype");
}

void same_shape(const Tensor& a, const Tensor& b) {
  same_dtype(a, b);
  if (a.dim != b.dim || !std::equal(a.sizes, a.sizes + a.dim, b.sizes)) throw std::runtime_error("shapes differ");
}

// A weight of n elements, or of none: then there is no weight.
const void* weight(Tensor& w, const Tensor& x, int64_t n) {
  if (w.numel() == 0 && n != 0) return nullptr;
  same_dtype(w, x);
  if (w.numel() != n) throw std::runtime_error("the weight must have one element per column");
  return w.data;
}

// ---- operators ----

// rms_norm(Tensor x, Tensor weight, float eps, bool centered) -> Tensor
void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor x = s.tensor(), w = s.tensor();
  double eps = s.plain<double>();
  int centered = s.plain<bool>();
  Rows rows;
  x = with_rows(std::move(x), &rows);
  w = contiguous(std::move(w));
  const void* wp = weight(w, x, rows.n);
  Tensor y = empty_like(x);
  int kind = x.kind();
  int64_t width = x.width();
  parallel(rows.count, rows.n, [&](int64_t a, int64_t b) {
    kernels().rms_norm(kind, x.data + a * rows.stride * width, rows.stride, wp, y.data + a * rows.n * width, b - a, rows.n, eps,
                       centered);
  });
  s.give(0, std::move(y));
}

// add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps, bool centered) -> (Tensor, Tensor)
void add_rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor x = contiguous(s.tensor()), d = contiguous(s.tensor()), w = contiguous(s.tensor());
  double eps = s.plain<double>();
  int centered = s.plain<bool>();
  same_shape(x, d);
  Rows rows;
  rows_of(x, &rows);
  const void* wp = weight(w, x, rows.n);
  Tensor sum = empty_like(x), y = empty_like(x);
  int kind = x.kind();
  int64_t step = rows.n * x.width();
  parallel(rows.count, rows.n, [&](int64_t a, int64_t b) {
    kernels().add_rms_norm(kind, x.data + a * step, d.data + a * step, wp, sum.data + a * step, y.data + a * step, b - a, rows.n, eps,
                           centered);
  });
  s.give(0, std::move(sum));
  s.give(1, std::move(y));
}

// Sums over rows: every piece into its own floats, then all of them together. `body(first, last, dw, db)`.
template <class Body>
void with_parts(int64_t rows, int64_t n, Tensor* dw, Tensor* db, const Body& body) {
  int64_t count = pieces(rows, n), per = count ? (rows + count - 1) / count : 0;
  std::vector<float> parts_w(dw ? count * n : 0), parts_b(db ? count * n : 0);
  parallel(count, per * n, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++) {
      int64_t first = std::min(rows, p * per), last = std::min(rows, first + per);
      body(first, last, dw ? parts_w.data() + p * n : nullptr, db ? parts_b.data() + p * n : nullptr);
    }
  });
  if (dw) kernels().reduce(dw->kind(), parts_w.data(), count, n, dw->data);
  if (db) kernels().reduce(db->kind(), parts_b.data(), count, n, db->data);
}

Tensor vector(int64_t n, int32_t dtype) {
  int64_t one = 1;
  return empty(1, &n, &one, dtype);
}

// rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool centered, bool weight_too) -> (Tensor, Tensor)
void rms_norm_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor g = contiguous(s.tensor()), x = contiguous(s.tensor()), w = contiguous(s.tensor());
  double eps = s.plain<double>();
  int centered = s.plain<bool>();
  bool weight_too = s.plain<bool>();
  same_shape(g, x);
  Rows rows;
  rows_of(x, &rows);
  const void* wp = weight(w, x, rows.n);
  Tensor dx = empty_like(x), dw = vector(weight_too ? rows.n : 0, x.dtype);
  int kind = x.kind();
  int64_t step = rows.n * x.width();
  with_parts(rows.count, rows.n, weight_too ? &dw : nullptr, nullptr, [&](int64_t a, int64_t b, float* pw, float*) {
    kernels().rms_norm_backward(kind, g.data + a * step, x.data + a * step, wp, dx.data + a * step, pw, b - a, rows.n, eps, centered);
  });
  s.give(0, std::move(dx));
  s.give(1, std::move(dw));
}

// layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor
void layer_norm(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor x = s.tensor(), w = s.tensor(), b = s.tensor();
  double eps = s.plain<double>();
  Rows rows;
  x = with_rows(std::move(x), &rows);
  w = contiguous(std::move(w));
  b = contiguous(std::move(b));
  const void *wp = weight(w, x, rows.n), *bp = weight(b, x, rows.n);
  Tensor y = empty_like(x);
  int kind = x.kind();
  int64_t width = x.width();
  parallel(rows.count, rows.n, [&](int64_t from, int64_t to) {
    kernels().layer_norm(kind, x.data + from * rows.stride * width, rows.stride, wp, bp, y.data + from * rows.n * width, to - from,
                         rows.n, eps);
  });
  s.give(0, std::move(y));
}

// layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool weight_too, bool bias_too) -> (Tensor, Tensor, Tensor)
void layer_norm_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor g = contiguous(s.tensor()), x = contiguous(s.tensor()), w = contiguous(s.tensor());
  double eps = s.plain<double>();
  bool weight_too = s.plain<bool>(), bias_too = s.plain<bool>();
  same_shape(g, x);
  Rows rows;
  rows_of(x, &rows);
  const void* wp = weight(w, x, rows.n);
  Tensor dx = empty_like(x), dw = vector(weight_too ? rows.n : 0, x.dtype), db = vector(bias_too ? rows.n : 0, x.dtype);
  int kind = x.kind();
  int64_t step = rows.n * x.width();
  with_parts(rows.count, rows.n, weight_too ? &dw : nullptr, bias_too ? &db : nullptr,
             [&](int64_t a, int64_t b, float* pw, float* pb) {
               kernels().layer_norm_backward(kind, g.data + a * step, x.data + a * step, wp, dx.data + a * step, pw, pb, b - a, rows.n,
                                             eps);
             });
  s.give(0, std::move(dx));
  s.give(1, std::move(dw));
  s.give(2, std::move(db));
}

// act(Tensor x, int act) -> Tensor
void act(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor x = contiguous(s.tensor());
  int which = int(s.plain<int64_t>());
  Tensor y = empty_like(x);
  int kind = x.kind();
  int64_t width = x.width();
  parallel(x.numel(), 1, [&](int64_t a, int64_t b) {
    kernels().act_mul(kind, which, x.data + a * width, nullptr, y.data + a * width, b - a);
  });
  s.give(0, std::move(y));
}

// act_mul(Tensor gate, Tensor up, int act) -> Tensor
void act_mul(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor gate = s.tensor(), up = s.tensor();
  int which = int(s.plain<int64_t>());
  same_shape(gate, up);
  Tensor y = empty_like(gate);
  int kind = gate.kind();
  int64_t width = gate.width();
  if (gate.contiguous() && up.contiguous()) {
    parallel(gate.numel(), 1, [&](int64_t a, int64_t b) {
      kernels().act_mul(kind, which, gate.data + a * width, up.data + a * width, y.data + a * width, b - a);
    });
  } else {  // the two halves of one fused projection
    Rows g, u;
    gate = with_rows(std::move(gate), &g);
    up = with_rows(std::move(up), &u);
    parallel(g.count, g.n, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; r++)
        kernels().act_mul(kind, which, gate.data + r * g.stride * width, up.data + r * u.stride * width, y.data + r * g.n * width, g.n);
    });
  }
  s.give(0, std::move(y));
}

// act_backward(Tensor grad, Tensor x, int act) -> Tensor
void act_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor g = contiguous(s.tensor()), x = contiguous(s.tensor());
  int which = int(s.plain<int64_t>());
  same_shape(g, x);
  Tensor dx = empty_like(x);
  int kind = x.kind();
  int64_t width = x.width();
  parallel(x.numel(), 1, [&](int64_t a, int64_t b) {
    kernels().act_mul_backward(kind, which, g.data + a * width, x.data + a * width, nullptr, dx.data + a * width, nullptr, b - a);
  });
  s.give(0, std::move(dx));
}

// act_mul_backward(Tensor grad, Tensor gate, Tensor up, int act) -> (Tensor, Tensor)
void act_mul_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor g = contiguous(s.tensor()), gate = contiguous(s.tensor()), up = contiguous(s.tensor());
  int which = int(s.plain<int64_t>());
  same_shape(g, gate);
  same_shape(gate, up);
  Tensor da = empty_like(gate), db = empty_like(up);
  int kind = gate.kind();
  int64_t width = gate.width();
  parallel(gate.numel(), 1, [&](int64_t a, int64_t b) {
    int64_t o = a * width;
    kernels().act_mul_backward(kind, which, g.data + o, gate.data + o, up.data + o, da.data + o, db.data + o, b - a);
  });
  s.give(0, std::move(da));
  s.give(1, std::move(db));
}

// Dense, with dimensions 1 and 2 in memory the way x has them: attention hands over (B, T, H, D) seen as (B, H, T, D).
Tensor rotary_out(const Tensor& x) {
  const int64_t* n = x.sizes;
  int64_t plain[4] = {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1};
  int64_t swapped[4] = {n[1] * n[2] * n[3], n[3], n[1] * n[3], 1};
  return empty(4, n, x.strides[1] < x.strides[2] ? swapped : plain, x.dtype);
}

// x (B, H, T, D) or, with token_dim 1, (B, T, H, D); cos and sin (B or 1, T, R) with R <= D even.
Tensor rotate(Tensor x, const Tensor& cos, const Tensor& sin, int64_t token_dim, bool inverse) {
  if (x.dim != 4 || cos.dim != 3) throw std::runtime_error("rotary expects 4-dimensional q and k, 3-dimensional cos and sin");
  same_shape(cos, sin);
  same_dtype(x, cos);
  int64_t r = cos.sizes[2], tokens = x.sizes[token_dim];
  if (cos.sizes[1] != tokens || (cos.sizes[0] != 1 && cos.sizes[0] != x.sizes[0]) || r > x.sizes[3] || r % 2)
    throw std::runtime_error("cos and sin do not fit q and k");
  if (x.sizes[3] != 1 && x.strides[3] != 1) x = contiguous(std::move(x));
  Tensor y = rotary_out(x);
  int kind = x.kind();
  int64_t width = x.width(), n = x.sizes[3], inner = x.sizes[2];
  int64_t cos_step = cos.sizes[0] == 1 ? 0 : cos.strides[0], sin_step = sin.sizes[0] == 1 ? 0 : sin.strides[0];
  // Walk in the order of memory: the larger stride outside.
  bool swapped = x.strides[1] < x.strides[2];
  int outer_dim = swapped ? 2 : 1, inner_dim = swapped ? 1 : 2;
  inner = x.sizes[inner_dim];
  int64_t outer = x.sizes[outer_dim];
  parallel(x.sizes[0] * outer, inner * n, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; item++) {
      int64_t b = item / outer, o = item % outer;
      for (int64_t i = 0; i < inner; i++) {
        int64_t t = outer_dim == token_dim ? o : i;
        int64_t at = b * x.strides[0] + o * x.strides[outer_dim] + i * x.strides[inner_dim];
        int64_t to_at = b * y.strides[0] + o * y.strides[outer_dim] + i * y.strides[inner_dim];
        kernels().rotary(kind, x.data + at * width, cos.data + (b * cos_step + t * cos.strides[1]) * width,
                         sin.data + (b * sin_step + t * sin.strides[1]) * width, y.data + to_at * width, n, r, inverse);
      }
    }
  });
  return y;
}

Tensor last_dense(Tensor t) { return t.dim && t.sizes[t.dim - 1] != 1 && t.strides[t.dim - 1] != 1 ? contiguous(std::move(t)) : std::move(t); }

// rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int token_dim, bool inverse) -> (Tensor, Tensor)
void rotary(StableIValue* stack, uint64_t, uint64_t) {
  Stack s{stack};
  Tensor q = s.tensor(), k = s.tensor(), cos = last_dense(s.tensor()), sin = last_dense(s.tensor());
  int64_t token_dim = s.plain<int64_t>();
  bool inverse = s.plain<bool>();
  Tensor q_out = rotate(std::move(q), cos, sin, token_dim, inverse);
  Tensor k_out = rotate(std::move(k), cos, sin, token_dim, inverse);
  s.give(0, std::move(q_out));
  s.give(1, std::move(k_out));
}

}  // namespace

// Expanded first: the namespace is a macro of the compiler's command line.
#define KS_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define KS_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#define KS_TEXT2(x) #x
#define KS_TEXT(x) KS_TEXT2(x)

KS_LIBRARY(TORCH_EXTENSION_NAME, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool centered) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps, bool centered) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool centered, bool weight_too) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool weight_too, bool bias_too) -> (Tensor, Tensor, Tensor)");
  m.def("act(Tensor x, int act) -> Tensor");
  m.def("act_backward(Tensor grad, Tensor x, int act) -> Tensor");
  m.def("act_mul(Tensor gate, Tensor up, int act) -> Tensor");
  m.def("act_mul_backward(Tensor grad, Tensor gate, Tensor up, int act) -> (Tensor, Tensor)");
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int token_dim, bool inverse) -> (Tensor, Tensor)");
}

KS_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("layer_norm", &layer_norm);
  m.impl("layer_norm_backward", &layer_norm_backward);
  m.impl("act", &act);
  m.impl("act_backward", &act_backward);
  m.impl("act_mul", &act_mul);
  m.impl("act_mul_backward", &act_mul_backward);
  m.impl("rotary", &rotary);
}

// For tests and benchmarks, through ctypes: choose an instruction set ("" for the widest), and name the one in use.
extern "C" __attribute__((visibility("default"))) const char* kernels_isa(const char* name) {
  if (name)
    if (const Kernels* found = ks::select(name)) chosen = found;
  return kernels().name;
}
