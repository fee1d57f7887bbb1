// Weights of few bits in blocks of 32: int4, int8 and float8_e4m3fn as float32, or as bytes for products of integers.
//
// A block is 32 bytes (int8, float8), or 16 for int4: byte i holds weight i in its low half and weight 16 + i in its high
// half, each plus 8. `unpack` gives the weights of a block, divided by kUnit; `shifted` gives them plus kShift.
#pragma once

#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define INTEGER_DOTS 1  // the machine multiplies and adds bytes
#endif

constexpr int kBlock = 32, kVectors = kBlock / kLanes;

struct Int4 {
  static constexpr int kBytes = kBlock / 2, kShift = 8;
  static constexpr float kUnit = 1;

  static inline void unpack(const uint8_t* at, Floats* weights) {
#if defined(__AVX512F__)
    // A permutation reads the low four bits of each index: a table of all values there are.
    const Floats values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    weights[0] = (Floats)_mm512_permutexvar_ps(pairs, (__m512)values);
    weights[1] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), (__m512)values);
#else
    UNROLL for (int v = 0; v < kVectors / 2; ++v) {
      Ints pairs = __builtin_convertvector(*reinterpret_cast<const Bytes*>(at + v * kLanes), Ints);
      weights[v] = __builtin_convertvector((pairs & 15) - 8, Floats);
      weights[kVectors / 2 + v] = __builtin_convertvector((pairs >> 4) - 8, Floats);
    }
#endif
  }
#if defined(INTEGER_DOTS)
  static inline __m256i shifted(const uint8_t* at) {
    __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
  }
#endif
};

struct Int8 {
  static constexpr int kBytes = kBlock, kShift = 128;
  static constexpr float kUnit = 1;

  static inline void unpack(const uint8_t* at, Floats* weights) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
#if defined(__AVX512F__)
      __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + v * kLanes));
      weights[v] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
      Ints wide = __builtin_convertvector(*reinterpret_cast<const SignedBytes*>(at + v * kLanes), Ints);
      weights[v] = __builtin_convertvector(wide, Floats);
#endif
    }
  }
#if defined(INTEGER_DOTS)
  static inline __m256i shifted(const uint8_t* at) {
    __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  }
#endif
};

// float8_e4m3fn: shifted by a bit, its exponent and mantissa are those of a float16 that is 2^-8 of it, subnormals included.
struct Float8 {
  static constexpr int kBytes = kBlock;
  static constexpr float kUnit = 256;

  static inline void unpack(const uint8_t* at, Floats* weights) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
#if defined(__AVX512F__)
      __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + v * kLanes)));
      __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
      __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
      weights[v] = (Floats)_mm512_cvtph_ps(_mm256_or_si256(sign, rest));
#else
      UNROLL for (int lane = 0; lane < kLanes; ++lane) weights[v][lane] = single(at[v * kLanes + lane]);
#endif
    }
  }
  static inline float single(uint8_t bits) {  // integer arithmetic: XLA's threads flush subnormals
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const int eighths = exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);  // of 2^-6
    return float(bits & 0x80 ? -eighths : eighths) * (1.0f / (512 * kUnit));
  }
};

