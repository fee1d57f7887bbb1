// Products of a few rows with large matrices of floats, as decoding on a CPU needs them: `out = rows [m k] matrix^T [k n]`,
// and those of attention's weights with values, `out = rows [m k] matrix [k n]`.
//
// Such a product takes as long as reading the matrix takes, if all else keeps up: every vector of the matrix is read once
// and multiplied with all rows (up to eight at a time), two rows of the matrix share each read of `rows`, and the cores take
// turns at pieces of the matrix (`work.h`). A matrix is [n k], so that it is read from first to last.
//
// Compiled for the machine at hand by `native.py`. Interface: XLA's foreign functions, docs.jax.dev/en/latest/ffi.html.

#include "vectors.h"
#include "work.h"

namespace {

constexpr int64_t kPiece = 256 * 1024;  // bytes of a matrix that a thread takes at a time
constexpr int64_t kFar = 8192;          // bytes between what is read and what is asked for
constexpr int64_t kLine = 16;           // outputs of a piece are a multiple of it

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

// M rows times N rows of the matrix, which share each read of `rows`.
template <int M, int N, typename T>
inline void dots(const float* rows, const T* weights, float* out, int64_t k, int64_t n) {
  constexpr int kSums = M * N;
  constexpr int kChains = (8 + kSums - 1) / kSums;  // sums by turns, so that an addition need not wait for the last
  constexpr int C = std::min(kLanes, power_of_two(kSums));
  Floats sum[kChains][kSums] = {};
  auto multiply = [&](int64_t at, int chain) {
    Floats columns[N];
    UNROLL for (int j = 0; j < N; ++j) {
      const T* column = weights + j * k + at;
      // Asked for into the second level, where more may be under way.
      __builtin_prefetch(reinterpret_cast<const char*>(column) + kFar, 0, 2);
      columns[j] = wide(column);
    }
    UNROLL for (int i = 0; i < M; ++i) {
      Floats row = wide(rows + i * k + at);
      if (N > 1) asm("" : REGISTER(row));  // held for all N products: the compiler would read it again for each
      UNROLL for (int j = 0; j < N; ++j) sum[chain][j * M + i] += row * columns[j];
    }
  };
  int64_t at = 0;
  for (; at + kChains * kLanes <= k; at += kChains * kLanes)
    UNROLL for (int chain = 0; chain < kChains; ++chain) multiply(at + chain * kLanes, chain);
  for (; at + kLanes <= k; at += kLanes) multiply(at, 0);
  UNROLL for (int first = 0; first < kSums; first += C) {
    Floats group[C] = {};
    UNROLL for (int c = 0; c < std::min(C, kSums - first); ++c)
      UNROLL for (int chain = 0; chain < kChains; ++chain) group[c] += sum[chain][first + c];
    Floats total = sums<kLanes, C>(group);
    UNROLL for (int c = 0; c < std::min(C, kSums - first); ++c) {
      const int i = (first + c) % M, j = (first + c) / M;
      float rest = 0;
      for (int64_t q = at; q < k; ++q) rest += rows[i * k + q] * single(weights[j * k + q]);
      out[i * n + j] = total[c] + rest;
    }
  }
}

// A matrix [n k], of which outputs begin..end are rows: M rows times its transpose.
struct Transposed {
  template <int M, typename T>
  static void strip(const float* rows, const T* matrix, float* out, int64_t k, int64_t n, int64_t begin, int64_t end) {
    constexpr int N = kRegisters < 32 && M > 4 ? 1 : 2;  // as many as registers hold; more are not faster
    for (; begin + N <= end; begin += N) dots<M, N>(rows, matrix + begin * k, out + begin, k, n);
    for (; begin < end; ++begin) dots<M, 1>(rows, matrix + begin * k, out + begin, k, n);
  }
};

// Sums of W vectors of each row of a matrix [k n], weighted by M rows.
template <int M, int W, typename T>
inline void weighted(const float* rows, const T* matrix, float* out, int64_t k, int64_t n) {
  Floats sum[M][W] = {};
  for (int64_t at = 0; at < k; ++at, matrix += n) {
    Floats columns[W];
    UNROLL for (int w = 0; w < W; ++w) {
      __builtin_prefetch(reinterpret_cast<const char*>(matrix + w * kLanes) + kFar, 0, 2);
      columns[w] = wide(matrix + w * kLanes);
    }
    UNROLL for (int i = 0; i < M; ++i)
      UNROLL for (int w = 0; w < W; ++w) sum[i][w] += rows[i * k + at] * columns[w];
  }
  UNROLL for (int i = 0; i < M; ++i)
    UNROLL for (int w = 0; w < W; ++w) *reinterpret_cast<Floats*>(out + i * n + w * kLanes) = sum[i][w];
}

// A matrix [k n], of which outputs begin..end are columns: M rows times it as it is.
struct Plain {
  template <int M, typename T>
  static void strip(const float* rows, const T* matrix, float* out, int64_t k, int64_t n, int64_t begin, int64_t end) {
    constexpr int W = std::max(1, std::min(4, kRegisters / 2 / M));
    for (; begin + W * kLanes <= end; begin += W * kLanes) weighted<M, W>(rows, matrix + begin, out + begin, k, n);
    for (; begin + kLanes <= end; begin += kLanes) weighted<M, 1>(rows, matrix + begin, out + begin, k, n);
    for (; begin < end; ++begin)
      for (int i = 0; i < M; ++i) {
        float sum = 0;
        for (int64_t at = 0; at < k; ++at) sum += rows[i * k + at] * single(matrix[at * n + begin]);
        out[i * n + begin] = sum;
      }
  }
};

// The same for any number of rows, as a loop over M at compile time.
template <int M, typename Order, typename T>
void strips(const float* rows, const T* matrix, float* out, int64_t m, int64_t k, int64_t n, int64_t begin, int64_t end) {
  for (; m >= M; m -= M, rows += M * k, out += M * n) Order::template strip<M>(rows, matrix, out, k, n, begin, end);
  if constexpr (M > 1)
    if (m > 0) strips<M - 1, Order>(rows, matrix, out, m, k, n, begin, end);
}

template <typename Order, typename T>
struct Product {
  const float* rows;
  const T* matrices;
  float* out;
  int64_t k, n;

  void operator()(int64_t start, int64_t m, int64_t group, int64_t begin, int64_t end) const {
    strips<kMostRows, Order>(rows + start * k, matrices + group * n * k, out + start * n, m, k, n, begin, end);
  }
};

template <typename Order, ffi::DataType type, typename T>
ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::Buffer<type> matrices,
                    ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t m = rows.dimensions()[0], k = rows.dimensions()[1];
  const int64_t groups = matrices.dimensions()[0], n = out->dimensions()[1];
  const int64_t outputs = kPiece / std::max<int64_t>(1, k * sizeof(T)) / kLine * kLine;  // of a piece
  const T* weights = reinterpret_cast<const T*>(matrices.untyped_data());
  Product<Order, T> product{rows.typed_data(), weights, out->typed_data(), k, n};
  return shared_out(pool, product, sizes.typed_data(), groups, m, n, std::max(kLine, outputs), out->typed_data());
}

}  // namespace

#define HANDLER(name, Order, type, T)                                                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (few_rows<Order, type, T>),                                 \
                                ffi::Ffi::Bind()                                                  \
                                    .Ctx<ffi::ThreadPool>()                                       \
                                    .Arg<ffi::Buffer<ffi::F32>>()                                 \
                                    .Arg<ffi::Buffer<type>>()                                     \
                                    .Arg<ffi::Buffer<ffi::S32>>()                                 \
                                    .Ret<ffi::Buffer<ffi::F32>>())

HANDLER(few_rows_float32, Transposed, ffi::F32, float);
HANDLER(few_rows_bfloat16, Transposed, ffi::BF16, uint16_t);
HANDLER(few_rows_plain_float32, Plain, ffi::F32, float);
HANDLER(few_rows_plain_bfloat16, Plain, ffi::BF16, uint16_t);
