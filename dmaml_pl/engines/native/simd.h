// Vectors of floats or doubles as wide as the processor's, for what the native engine computes with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, MOST_COLUMNS = 4, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, MOST_COLUMNS = 2, ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int BYTES = 16, MOST_COLUMNS = 4, ACCUMULATORS = 24;
#else
constexpr int BYTES = 16, MOST_COLUMNS = 2, ACCUMULATORS = 12;
#endif
#define INLINED inline __attribute__((always_inline))

constexpr int PADDED_TO = 64;  // bytes: channels of all machines are padded alike

enum Act { LINEAR, RELU, TANH };

template <class R> struct Simd {
  typedef R V __attribute__((vector_size(BYTES)));
  typedef R Loose __attribute__((vector_size(BYTES), aligned(sizeof(R)), may_alias));
};
template <class R> using Vec = typename Simd<R>::V;
template <class R> constexpr int LANES = BYTES / sizeof(R);
template <class R> inline Vec<R> load(const R *p) { return *reinterpret_cast<const typename Simd<R>::Loose *>(p); }
template <class R> inline void store(R *p, Vec<R> v) { *reinterpret_cast<typename Simd<R>::Loose *>(p) = v; }
template <class R> inline void add(R *p, Vec<R> v) { store<R>(p, load(p) + v); }

int padded(int channels, int size) {
  const int lanes = PADDED_TO / size;
  return (channels + lanes - 1) / lanes * lanes;
}

#if defined(__GNUC__) && !defined(__clang__)
template <class R, int STEP> struct Crossing {  // places in two vectors: of what stays or comes above, and below
  std::conditional_t<sizeof(R) == 4, int32_t, int64_t> upper[LANES<R>]{}, lower[LANES<R>]{};
  constexpr Crossing() {
    constexpr int L = LANES<R>;
    for (int j = 0; j < L; j++) upper[j] = j & STEP ? L + j - STEP : j, lower[j] = j & STEP ? L + j : j + STEP;
  }
};

template <class R, int STEP> inline void cross(Vec<R> *row) {  // swaps the blocks off the diagonal, and then within each block
  if constexpr (STEP > 0) {
    static constexpr Crossing<R, STEP> places;
    typedef std::conditional_t<sizeof(R) == 4, int32_t, int64_t> Indices __attribute__((vector_size(BYTES)));
    Indices upper, lower;
    memcpy(&upper, places.upper, BYTES), memcpy(&lower, places.lower, BYTES);
#pragma GCC unroll 16
    for (int i = 0; i < LANES<R>; i++)
      if (!(i & STEP)) {
        const Vec<R> a = row[i], b = row[i + STEP];
        row[i] = __builtin_shuffle(a, b, upper), row[i + STEP] = __builtin_shuffle(a, b, lower);
      }
    cross<R, STEP / 2>(row);
  }
}

template <class R, int STEP> inline Vec<R> fold(Vec<R> v) {  // the first lane becomes the sum of 2 STEP lanes
  if constexpr (STEP == 0) return v;
  else {
    typedef std::conditional_t<sizeof(R) == 4, int32_t, int64_t> Indices __attribute__((vector_size(BYTES)));
    Indices upper;
    for (int k = 0; k < LANES<R>; k++) upper[k] = (k + STEP) % LANES<R>;
    return fold<R, STEP / 2>(v + __builtin_shuffle(v, upper));
  }
}
#endif

// to[j * to_ld + i] = from[i * ld + j], for as many i and j as a vector has lanes
template <class R> inline void transpose_tile(const R *from, int ld, R *to, int to_ld) {
  constexpr int L = LANES<R>;
#if defined(__GNUC__) && !defined(__clang__)
  Vec<R> row[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) row[i] = load(from + i * ld);
  cross<R, L / 2>(row);
#pragma GCC unroll 16
  for (int j = 0; j < L; j++) store<R>(to + j * to_ld, row[j]);
#else
  for (int j = 0; j < L; j++)
    for (int i = 0; i < L; i++) to[j * to_ld + i] = from[i * ld + j];
#endif
}

// The sum of a vector's lanes.
template <class R> inline R total(Vec<R> v) {
#if defined(__GNUC__) && !defined(__clang__)
  return fold<R, LANES<R> / 2>(v)[0];
#else
  R sum = 0;
  for (int k = 0; k < LANES<R>; k++) sum += v[k];
  return sum;
#endif
}

template <class R> inline Vec<R> tanh_of(Vec<R> u) {
  for (int k = 0; k < LANES<R>; k++) u[k] = std::tanh(u[k]);
  return u;
}
// NaN passes, as in PyTorch.
template <class R> inline Vec<R> cut(Vec<R> u, Vec<R> v) { return u <= 0 ? Vec<R>{} : v; }

}  // namespace
