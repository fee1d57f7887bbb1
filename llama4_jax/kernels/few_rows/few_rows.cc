// Products of a few rows with large matrices of floats, as decoding on a CPU needs them: `out = rows [m k] matrix^T [k n]`.
//
// Such a product takes as long as reading the matrix takes, if all else keeps up: every vector of the matrix is read once
// and multiplied with all rows (up to eight at a time), and the cores take turns at pieces of the matrix (`work.h`). A matrix
// is [n k], so that it is read from first to last.
//
// Compiled for the machine at hand by `native.py`. Interface: XLA's foreign functions, docs.jax.dev/en/latest/ffi.html.

#include "vectors.h"
#include "work.h"

namespace {

constexpr int64_t kPiece = 256 * 1024;  // bytes of a matrix that a thread takes at a time
constexpr int64_t kFar = 8192;          // bytes between what is read and what is asked for

// kLanes weights, or one, as float32. A bfloat16 is the upper half of a float32.
inline Floats wide(const float* weights) { return *reinterpret_cast<const Floats*>(weights); }
inline Floats wide(const uint16_t* weights) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(weights), Words) << 16);
}
inline float single(float weight) { return weight; }
inline float single(uint16_t weight) {
  uint32_t bits = uint32_t(weight) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// M rows times one row of the matrix. Rows of the matrix one by one are one stretch of memory, which a CPU reads ahead in.
template <int M, typename T>
inline void dots(const float* rows, const T* weights, float* out, int64_t k, int64_t n) {
  constexpr int kChains = (8 + M - 1) / M;  // sums by turns, so that an addition need not wait for the last
  constexpr int C = power_of_two(M) < kLanes ? power_of_two(M) : kLanes;
  Floats sum[kChains][M] = {};
  auto multiply = [&](int64_t at, int chain) {
    // Asked for into the second level, where more may be under way.
    __builtin_prefetch(reinterpret_cast<const char*>(weights + at) + kFar, 0, 2);
    Floats column = wide(weights + at);
    UNROLL for (int i = 0; i < M; ++i) sum[chain][i] += wide(rows + i * k + at) * column;
  };
  int64_t at = 0;
  for (; at + kChains * kLanes <= k; at += kChains * kLanes)
    UNROLL for (int chain = 0; chain < kChains; ++chain) multiply(at + chain * kLanes, chain);
  for (; at + kLanes <= k; at += kLanes) multiply(at, 0);
  UNROLL for (int first = 0; first < M; first += C) {
    Floats group[C] = {};
    UNROLL for (int i = first; i < std::min(M, first + C); ++i)
      UNROLL for (int chain = 0; chain < kChains; ++chain) group[i - first] += sum[chain][i];
    Floats total = sums<kLanes, C>(group);
    UNROLL for (int i = first; i < std::min(M, first + C); ++i) {
      float rest = 0;
      for (int64_t q = at; q < k; ++q) rest += rows[i * k + q] * single(weights[q]);
      out[i * n] = total[i - first] + rest;
    }
  }
}

// M rows times rows begin..end of the matrix.
template <int M, typename T>
void strip(const float* rows, const T* matrix, float* out, int64_t k, int64_t n, int64_t begin, int64_t end) {
  for (; begin < end; ++begin) dots<M>(rows, matrix + begin * k, out + begin, k, n);
}

// The same for any number of rows, as a loop over M at compile time.
template <int M, typename T>
void strips(const float* rows, const T* matrix, float* out, int64_t m, int64_t k, int64_t n, int64_t begin, int64_t end) {
  for (; m >= M; m -= M, rows += M * k, out += M * n) strip<M>(rows, matrix, out, k, n, begin, end);
  if constexpr (M > 1)
    if (m > 0) strips<M - 1>(rows, matrix, out, m, k, n, begin, end);
}

template <typename T>
struct Product {
  const float* rows;
  const T* matrices;
  float* out;
  int64_t k, n;

  void operator()(int64_t start, int64_t m, int64_t group, int64_t begin, int64_t end) const {
    strips<kMostRows>(rows + start * k, matrices + group * n * k, out + start * n, m, k, n, begin, end);
  }
};

template <ffi::DataType type, typename T>
ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::Buffer<type> matrices,
                    ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t m = rows.dimensions()[0], k = rows.dimensions()[1];
  const int64_t groups = matrices.dimensions()[0], n = matrices.dimensions()[1];
  const int64_t width = std::max<int64_t>(16, kPiece / std::max<int64_t>(1, k * sizeof(T)));
  const T* weights = reinterpret_cast<const T*>(matrices.untyped_data());
  Product<T> product{rows.typed_data(), weights, out->typed_data(), k, n};
  return shared_out(pool, product, sizes.typed_data(), groups, m, n, width, out->typed_data());
}

}  // namespace

#define HANDLER(name, type, T)                                                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (few_rows<type, T>),                                        \
                                ffi::Ffi::Bind()                                                  \
                                    .Ctx<ffi::ThreadPool>()                                       \
                                    .Arg<ffi::Buffer<ffi::F32>>()                                 \
                                    .Arg<ffi::Buffer<type>>()                                     \
                                    .Arg<ffi::Buffer<ffi::S32>>()                                 \
                                    .Ret<ffi::Buffer<ffi::F32>>())

HANDLER(few_rows_float32, ffi::F32, float);
HANDLER(few_rows_bfloat16, ffi::BF16, uint16_t);
