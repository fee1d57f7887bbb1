// Vectors of float32 as wide as the machine's, and their sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

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

constexpr int kMostRows = 8;            // that are multiplied with one read of a matrix
constexpr int64_t kAhead = 4096;        // bytes between what is read and what is asked for

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

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
