// Products of a few rows with large matrices, as decoding on a CPU needs them: `out = rows [m k] matrix^T [k n]`.
//
// Such a product takes as long as reading the matrix takes, if all else keeps up: every vector of the matrix is read once
// and multiplied with all rows (up to eight at a time), several matrix rows share each read of `rows`, and the cores take
// turns at pieces of the matrix. A matrix is [n k], so that it is read from first to last.
//
// Rows come sorted by group, each group with a matrix of its own: the experts of a mixture. One group is a plain product.
// An output is summed by one thread in an order that its shape fixes, so that results do not depend on the threads.
//
// Compiled for the machine at hand by `native.py`. Interface: XLA's foreign functions, docs.jax.dev/en/latest/ffi.html.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#define REGISTER "+v"
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#define REGISTER "+x"
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#define REGISTER "+w"
#else
constexpr int kLanes = 4, kRegisters = 16;
#define REGISTER "+x"
#endif
#define UNROLL _Pragma("GCC unroll 16")

constexpr int kMostRows = 8;              // that are multiplied with one read of a matrix
constexpr int64_t kPiece = 256 * 1024;    // bytes of a matrix that a thread takes at a time
constexpr int64_t kAhead = 4096;          // bytes between what is read and what is asked for

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

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

constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// The first (half = 0) or second halves of all segments of S lanes, those of a before those of b.
template <int S, int half, int... lane>
inline Floats halves(Floats a, Floats b, std::integer_sequence<int, lane...>) {
  constexpr int h = S / 2, middle = kLanes / 2;
  return __builtin_shufflevector(a, b, (lane / middle * kLanes + lane % middle / h * S + lane % h + half * h)...);
}

// Lane c of the result: the sum of vector c, of C (a power of two, at most kLanes). Segments of S lanes are left to add up.
template <int S, int C>
inline Floats sums(const Floats* vectors) {
  using lanes = std::make_integer_sequence<int, kLanes>;
  if constexpr (S == 1) return vectors[0];
  if constexpr (S > 1 && C == 1) {  // nothing left to pair with but itself
    Floats both = halves<S, 0>(vectors[0], vectors[0], lanes{}) + halves<S, 1>(vectors[0], vectors[0], lanes{});
    return sums<S / 2, 1>(&both);
  }
  if constexpr (S > 1 && C > 1) {
    Floats paired[C / 2];
    UNROLL for (int c = 0; c < C / 2; ++c)
      paired[c] = halves<S, 0>(vectors[2 * c], vectors[2 * c + 1], lanes{}) +
                  halves<S, 1>(vectors[2 * c], vectors[2 * c + 1], lanes{});
    return sums<S / 2, C / 2>(paired);
  }
}

// M rows times N rows of the matrix.
template <int M, int N, typename T>
inline void tile(const float* rows, const T* matrix, float* out, int64_t k, int64_t n) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums by turns, so that an addition need not wait for the last
  constexpr int C = power_of_two(M) < kLanes ? power_of_two(M) : kLanes;
  Floats sum[kChains][N][M] = {};
  auto multiply = [&](int64_t at, int chain) {
    Floats weights[N];
    UNROLL for (int j = 0; j < N; ++j) {
      weights[j] = wide(matrix + j * k + at);
      __builtin_prefetch(reinterpret_cast<const char*>(matrix + j * k + at) + kAhead);
    }
    UNROLL for (int i = 0; i < M; ++i) {
      Floats row = wide(rows + i * k + at);
      asm("" : REGISTER(row));  // held for all N products: the compiler would read it again for each
      UNROLL for (int j = 0; j < N; ++j) sum[chain][j][i] += row * weights[j];
    }
  };
  int64_t at = 0;
  for (; at + kChains * kLanes <= k; at += kChains * kLanes)
    UNROLL for (int chain = 0; chain < kChains; ++chain) multiply(at + chain * kLanes, chain);
  for (; at + kLanes <= k; at += kLanes) multiply(at, 0);
  UNROLL for (int j = 0; j < N; ++j) {
    Floats totals[M];
    UNROLL for (int i = 0; i < M; ++i) {
      totals[i] = sum[0][j][i];
      UNROLL for (int chain = 1; chain < kChains; ++chain) totals[i] += sum[chain][j][i];
    }
    UNROLL for (int first = 0; first < M; first += C) {
      Floats group[C] = {};
      UNROLL for (int i = first; i < std::min(M, first + C); ++i) group[i - first] = totals[i];
      Floats total = sums<kLanes, C>(group);
      UNROLL for (int i = first; i < std::min(M, first + C); ++i) {
        float rest = 0;
        for (int64_t q = at; q < k; ++q) rest += rows[i * k + q] * single(matrix[j * k + q]);
        out[i * n + j] = total[i - first] + rest;
      }
    }
  }
}

// Rows of the matrix that share reads of `rows`: as many as registers hold, or fewer where that is not what takes time.
constexpr int shared(int m) { return m <= 2 ? m : std::max(1, std::min(4, (kRegisters - 4) / (m + 1))); }

// M rows times rows begin..end of the matrix.
template <int M, typename T>
void strip(const float* rows, const T* matrix, float* out, int64_t k, int64_t n, int64_t begin, int64_t end) {
  constexpr int N = shared(M);
  for (; begin + N <= end; begin += N) tile<M, N>(rows, matrix + begin * k, out + begin, k, n);
  for (; begin < end; ++begin) tile<M, 1>(rows, matrix + begin * k, out + begin, k, n);
}

// The same for any number of rows, as a loop over M at compile time.
template <int M, typename T>
void strips(const float* rows, const T* matrix, float* out, int64_t m, int64_t k, int64_t n, int64_t begin, int64_t end) {
  for (; m >= M; m -= M, rows += M * k, out += M * n) strip<M>(rows, matrix, out, k, n, begin, end);
  if constexpr (M > 1)
    if (m > 0) strips<M - 1>(rows, matrix, out, m, k, n, begin, end);
}

// Pieces of all groups' matrices, which threads take one by one. Lives until the last thread has let go of it: one that
// comes when all is done finds nothing and touches no array.
template <typename T>
struct Work {
  const float* rows;
  const T* matrices;
  const int32_t* sizes;
  float* out;
  int64_t k, n, width, pieces, total;  // width: matrix rows of a piece; pieces of each matrix, and of all
  std::atomic<int64_t> next{0}, done{0};

  void run() {
    for (int64_t piece; (piece = next.fetch_add(1)) < total; done.fetch_add(1, std::memory_order_release)) {
      int64_t group = piece / pieces, begin = piece % pieces * width, start = 0;
      for (int64_t g = 0; g < group; ++g) start += sizes[g];
      strips<kMostRows>(rows + start * k, matrices + group * n * k, out + start * n, sizes[group], k, n, begin,
                        std::min(n, begin + width));
    }
  }
};

template <ffi::DataType type, typename T>
ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::Buffer<type> matrices,
                    ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> out) {
  auto work = std::make_shared<Work<T>>();
  const int64_t m = rows.dimensions()[0], groups = matrices.dimensions()[0];
  work->rows = rows.typed_data();
  work->matrices = reinterpret_cast<const T*>(matrices.untyped_data());
  work->sizes = sizes.typed_data();
  work->out = out->typed_data();
  work->k = rows.dimensions()[1];
  work->n = matrices.dimensions()[1];
  work->width = std::max<int64_t>(16, kPiece / std::max<int64_t>(1, work->k * sizeof(T)));
  work->pieces = (work->n + work->width - 1) / work->width;
  work->total = work->pieces * groups;
  int64_t used = 0;
  for (int64_t g = 0; g < groups; ++g) used += work->sizes[g];
  if (used > m) return ffi::Error::InvalidArgument("group_sizes add up to more rows than there are");
  std::fill(work->out + used * work->n, work->out + m * work->n, 0.0f);  // rows of no group

  // Helpers may come late or never: this thread goes on alone, and waits only for pieces that others have begun.
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), work->total) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load(std::memory_order_acquire) < work->total) std::this_thread::yield();
  return ffi::Error::Success();
}

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
