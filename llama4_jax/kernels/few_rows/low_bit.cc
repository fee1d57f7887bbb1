// Products of a few rows with large matrices of few bits: `out = rows [m k] matrix^T [k n]`, as `few_rows.cc` for floats.
//
// A matrix [n k] is a uint8 array [n bytes] and scales [n groups]. Each of its rows is cut into groups of inputs that share a
// scale, and each group is filled up to blocks of 32 weights (`blocks.h`). `rows` are filled up alike; `packed.py` does both.
//
// A group's products are added up first and multiplied with its scale once. Rows are float32; or int8 with a scale a row,
// and then they are multiplied as integers where the machine has an instruction for it (VNNI), and elsewhere as floats, in
// which the sums of a group are exact too, up to 2^24.

#include <vector>

#include "blocks.h"
#include "vectors.h"
#include "work.h"

namespace {

constexpr int64_t kPiece = 64 * 1024;  // bytes of a matrix that a thread takes at a time

struct Shape {
  int64_t n, groups, blocks;  // matrix rows; groups of inputs; blocks of a group
  int64_t inputs() const { return groups * blocks * kBlock; }
};

// Adds up the lanes of N x M sums and writes them to out [M n], times the scales of rows if there are any.
template <int M, int N>
inline void store(const Floats* sum, const float* row_scales, float* out, int64_t n) {
  constexpr int C = std::min(kLanes, power_of_two(M * N));
  UNROLL for (int first = 0; first < M * N; first += C) {
    Floats group[C] = {};
    UNROLL for (int c = 0; c < std::min(C, M * N - first); ++c) group[c] = sum[first + c];
    Floats total = sums<kLanes, C>(group);
    UNROLL for (int c = 0; c < std::min(C, M * N - first); ++c) {
      const int i = (first + c) % M, j = (first + c) / M;
      out[i * n + j] = row_scales ? total[c] * row_scales[i] : total[c];
    }
  }
}

// Rows that are multiplied as floats.
template <typename Kind>
struct AsFloats {
  const float* rows;
  const float* row_scales;  // or null
  Shape shape;

  void skip(int64_t count) {
    rows += count * shape.inputs();
    if (row_scales) row_scales += count;
  }

  // M rows times N rows of the matrix.
  template <int M, int N>
  inline void tile(const uint8_t* weights, const float* scales, float* out) const {
    const int64_t k = shape.inputs(), bytes = shape.groups * shape.blocks * Kind::kBytes;
    Floats total[N * M] = {};
    for (int64_t g = 0; g < shape.groups; ++g) {
      Floats sum[N][M] = {};
      for (int64_t block = g * shape.blocks; block < (g + 1) * shape.blocks; ++block) {
        Floats unpacked[N][kVectors];
        UNROLL for (int j = 0; j < N; ++j) {
          const uint8_t* at = weights + j * bytes + block * Kind::kBytes;
          Kind::unpack(at, unpacked[j]);
          __builtin_prefetch(at + kAhead);
        }
        UNROLL for (int v = 0; v < kVectors; ++v)
          UNROLL for (int i = 0; i < M; ++i) {
            Floats row = *reinterpret_cast<const Floats*>(rows + i * k + block * kBlock + v * kLanes);
            asm("" : REGISTER(row));  // held for all N products: the compiler would read it again for each
            UNROLL for (int j = 0; j < N; ++j) sum[j][i] += row * unpacked[j][v];
          }
      }
      UNROLL for (int j = 0; j < N; ++j) {
        const float scale = scales[j * shape.groups + g] * Kind::kUnit;
        UNROLL for (int i = 0; i < M; ++i) total[j * M + i] += sum[j][i] * scale;
      }
    }
    store<M, N>(total, row_scales, out, shape.n);
  }
};

#if defined(INTEGER_DOTS)
// Rows that are multiplied as integers.
template <typename Kind>
struct AsIntegers {
  const int8_t* rows;
  const float* row_scales;
  Shape shape;
  const int32_t* starts;  // 8 lanes for each row and group: the first is what the shifts of the weights add, negated

  void skip(int64_t count) {
    rows += count * shape.inputs();
    row_scales += count;
    starts += count * shape.groups * 8;
  }

  template <int M, int N>
  inline void tile(const uint8_t* weights, const float* scales, float* out) const {
    const int64_t k = shape.inputs(), bytes = shape.groups * shape.blocks * Kind::kBytes;
    __m256 total[N * M];
    UNROLL for (int c = 0; c < N * M; ++c) total[c] = _mm256_setzero_ps();
    for (int64_t g = 0; g < shape.groups; ++g) {
      __m256i sum[N][M];
      UNROLL for (int i = 0; i < M; ++i) {
        const int32_t* start = starts + (i * shape.groups + g) * 8;
        UNROLL for (int j = 0; j < N; ++j) sum[j][i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
      }
      for (int64_t block = g * shape.blocks; block < (g + 1) * shape.blocks; ++block) {
        __m256i shifted[N];
        UNROLL for (int j = 0; j < N; ++j) {
          const uint8_t* at = weights + j * bytes + block * Kind::kBytes;
          shifted[j] = Kind::shifted(at);
          __builtin_prefetch(at + kAhead);
        }
        UNROLL for (int i = 0; i < M; ++i) {
          __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + i * k + block * kBlock));
          UNROLL for (int j = 0; j < N; ++j) sum[j][i] = _mm256_dpbusd_epi32(sum[j][i], shifted[j], row);
        }
      }
      UNROLL for (int j = 0; j < N; ++j) {
        const __m256 scale = _mm256_set1_ps(scales[j * shape.groups + g]);
        UNROLL for (int i = 0; i < M; ++i)
          total[j * M + i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[j][i]), scale, total[j * M + i]);
      }
    }
    Floats wide[N * M];
    UNROLL for (int c = 0; c < N * M; ++c) wide[c] = (Floats)_mm512_zextps256_ps512(total[c]);
    store<M, N>(wide, row_scales, out, shape.n);
  }
};
#endif

// Matrix rows that share reads of `rows`: as many as registers hold, or fewer where that is not what takes time.
constexpr int together(int m) { return kRegisters < 32 ? (m == 1 ? 2 : 1) : m <= 2 ? 4 : 2; }

// The next m rows, at most M, times rows begin .. end of the matrix, as a loop over M at compile time.
template <int M, typename Rows>
void strips(Rows rows, const uint8_t* weights, const float* scales, float* out, int64_t m, int64_t begin, int64_t end,
            int64_t bytes) {
  constexpr int N = together(M);
  const Shape& shape = rows.shape;
  for (; m >= M; m -= M, rows.skip(M), out += M * shape.n) {
    int64_t at = begin;
    for (; at + N <= end; at += N) rows.template tile<M, N>(weights + at * bytes, scales + at * shape.groups, out + at);
    for (; at < end; ++at) rows.template tile<M, 1>(weights + at * bytes, scales + at * shape.groups, out + at);
  }
  if constexpr (M > 1)
    if (m > 0) strips<M - 1>(rows, weights, scales, out, m, begin, end, bytes);
}

template <typename Rows, typename Kept>
struct LowBitProduct {
  Rows rows;
  const uint8_t* weights;
  const float* scales;
  float* out;
  int64_t bytes;  // of a matrix row
  std::shared_ptr<std::vector<Kept>> kept;  // what `rows` points to besides the caller's arrays

  void operator()(int64_t start, int64_t m, int64_t group, int64_t begin, int64_t end) const {
    const Shape& shape = rows.shape;
    Rows own = rows;
    own.skip(start);
    strips<kMostRows>(own, weights + group * shape.n * bytes, scales + group * shape.n * shape.groups,
                      out + start * shape.n, m, begin, end, bytes);
  }
};

// The arrays of a call.
struct Call {
  ffi::ThreadPool& pool;
  ffi::Buffer<ffi::U8>& weights;
  ffi::Buffer<ffi::F32>& scales;
  ffi::Buffer<ffi::S32>& sizes;
  ffi::ResultBuffer<ffi::F32>& out;

  Shape shape(int64_t inputs) const {
    const int64_t groups = scales.dimensions()[2];
    return {scales.dimensions()[1], groups, groups ? inputs / groups / kBlock : 0};
  }

  template <typename Rows, typename Kept>
  ffi::Error run(Rows rows, int64_t m, int64_t inputs, int64_t kind_bytes, std::shared_ptr<std::vector<Kept>> kept) {
    const Shape& shape = rows.shape;
    const int64_t bytes = weights.dimensions()[2];
    if (shape.inputs() != inputs || inputs / kBlock * kind_bytes != bytes)
      return ffi::Error::InvalidArgument("rows, weights and scales do not belong together");
    const int64_t width = std::max<int64_t>(16, kPiece / std::max<int64_t>(1, bytes) / 4 * 4);
    LowBitProduct<Rows, Kept> product{rows, weights.typed_data(), scales.typed_data(), out->typed_data(), bytes, kept};
    return shared_out(pool, std::move(product), sizes.typed_data(), weights.dimensions()[0], m, shape.n, width,
                      out->typed_data());
  }
};

template <typename Kind>
ffi::Error low_bit(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::Buffer<ffi::U8> weights,
                   ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t m = rows.dimensions()[0], inputs = rows.dimensions()[1];
  Call call{pool, weights, scales, sizes, out};
  AsFloats<Kind> view{rows.typed_data(), nullptr, call.shape(inputs)};
  return call.run(view, m, inputs, Kind::kBytes, std::shared_ptr<std::vector<float>>());
}

// The same for rows that are integers times a scale each.
template <typename Kind>
ffi::Error low_bit_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> rows, ffi::Buffer<ffi::F32> row_scales,
                        ffi::Buffer<ffi::U8> weights, ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::S32> sizes,
                        ffi::ResultBuffer<ffi::F32> out) {
  const int64_t m = rows.dimensions()[0], inputs = rows.dimensions()[1];
  const int8_t* values = rows.typed_data();
  Call call{pool, weights, scales, sizes, out};
  const Shape shape = call.shape(inputs);
#if defined(INTEGER_DOTS)
  const int64_t width = shape.blocks * kBlock;
  auto kept = std::make_shared<std::vector<int32_t>>(m * shape.groups * 8);
  for (int64_t part = 0; part < m * shape.groups; ++part) {
    int32_t sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += values[part * width + i];
    (*kept)[part * 8] = -Kind::kShift * sum;
  }
  AsIntegers<Kind> view{values, row_scales.typed_data(), shape, kept->data()};
#else
  auto kept = std::make_shared<std::vector<float>>(values, values + m * inputs);
  AsFloats<Kind> view{kept->data(), row_scales.typed_data(), shape};
#endif
  return call.run(view, m, inputs, Kind::kBytes, kept);
}

}  // namespace

#define HANDLER(name, Kind)                                                                       \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, low_bit<Kind>,                                              \
                                ffi::Ffi::Bind()                                                  \
                                    .Ctx<ffi::ThreadPool>()                                       \
                                    .Arg<ffi::Buffer<ffi::F32>>()                                 \
                                    .Arg<ffi::Buffer<ffi::U8>>()                                  \
                                    .Arg<ffi::Buffer<ffi::F32>>()                                 \
                                    .Arg<ffi::Buffer<ffi::S32>>()                                 \
                                    .Ret<ffi::Buffer<ffi::F32>>())
#define ROWS_HANDLER(name, Kind)                                                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, low_bit_rows<Kind>,                                         \
                                ffi::Ffi::Bind()                                                  \
                                    .Ctx<ffi::ThreadPool>()                                       \
                                    .Arg<ffi::Buffer<ffi::S8>>()                                  \
                                    .Arg<ffi::Buffer<ffi::F32>>()                                 \
                                    .Arg<ffi::Buffer<ffi::U8>>()                                  \
                                    .Arg<ffi::Buffer<ffi::F32>>()                                 \
                                    .Arg<ffi::Buffer<ffi::S32>>()                                 \
                                    .Ret<ffi::Buffer<ffi::F32>>())

HANDLER(few_rows_int4, Int4);
HANDLER(few_rows_int8, Int8);
HANDLER(few_rows_float8_e4m3fn, Float8);
ROWS_HANDLER(few_rows_int4_int8, Int4);
ROWS_HANDLER(few_rows_int8_int8, Int8);
