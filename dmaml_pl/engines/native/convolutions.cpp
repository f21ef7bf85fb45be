// Meta-gradients of chains of layers on CPUs: gradients, and Hessian products forward over reverse, task by task.
//
// A stage is a convolution, a norm (or a bias, which is a norm that does not normalize), an activation and a pooling; a
// linear layer is a convolution whose kernel is as large as the image. Images have their channels last, filled up with
// zeros to whole vectors. Convolutions are direct: sums over the taps of the kernel of small matrix products, whose rows
// are looked up, so that nothing is computed of padding. Of a norm what is kept is the convolution's output y; z is
// (y - mean) * scale, computed anew wherever it is needed.
//
// Legend: R float or double; n images; cp channels with padding; px pixels of a convolution's output; K rows of weights
// of a tap; g a gradient; a name that ends with D is a derivative along a direction of the weights.

#include <map>
#include <utility>
#include <vector>

#include "tasks.h"

namespace {

constexpr int ROW_BLOCK = 96;           // rows of outputs whose sums stay in a cache from tap to tap
constexpr int PIXEL_BLOCK = 96;         // pixels whose values stay in a cache from channel to channel
constexpr size_t CHUNK_BYTES = 1 << 18; // of a stage's outputs, which stay in a cache from operation to operation

enum Pool { NONE, MAX, MEAN };
enum Norm { BIAS, BATCH, GROUP };

// ---- Products -------------------------------------------------------------------------------------------------------

constexpr int most_rows(int columns) { return std::min(12, ACCUMULATORS / columns); }

template <int N, class F> inline void with_number(int n, const F &f) {  // f(integral_constant<n>), for 1 <= n <= N
  if constexpr (N > 0) {
    if (n == N) f(std::integral_constant<int, N>());
    else with_number<N - 1>(n, f);
  }
}

template <class F> inline void in_tiles(int rows, int most, const F &f) {  // f(first, count), as equal as can be
  const int tiles = (rows + most - 1) / most;
  for (int t = 0, at = 0; t < tiles; t++) {
    const int count = (rows - at + tiles - t - 1) / (tiles - t);
    f(at, count);
    at += count;
  }
}

// c[to[m]] (+)= sum over NP pairs and k < K of a[from[m] + ks[k]] * b[k]: rows of b are `ld` apart, columns COLS vectors.
template <class R, int NP, int COLS, int ROWS>
__attribute__((noinline)) void product(const R *const *a, const R *const *b, int ld, const int *from, const int *to,
                                       R *c, const int *ks, int K, bool first) {
  constexpr int L = LANES<R>;
  Vec<R> sum[ROWS][COLS];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int n = 0; n < COLS; n++) sum[m][n] = first ? Vec<R>{} : load(c + to[m] + n * L);
#pragma GCC unroll 2
  for (int q = 0; q < NP; q++) {
    const R *row[ROWS], *w = b[q];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) row[m] = a[q] + from[m];
    for (int64_t k = 0; k < K; k++, w += ld) {
      Vec<R> column[COLS];
#pragma GCC unroll 4
      for (int n = 0; n < COLS; n++) column[n] = load(w + n * L);
#pragma GCC unroll 12
      for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int n = 0; n < COLS; n++) sum[m][n] += row[m][ks[k]] * column[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int n = 0; n < COLS; n++) store<R>(c + to[m] + n * L, sum[m][n]);
}

// g[k] (+)= sum over NP pairs and p < P of x[xs[p] + ks[k]] * d[ds[p]], for ROWS rows k and COLS vectors of columns.
template <class R, int NP, int COLS, int ROWS>
__attribute__((noinline)) void outer_product(const R *const *x, const R *const *d, const int *xs, const int *ds, int P,
                                             R *g, int ld, const int *ks, bool first) {
  constexpr int L = LANES<R>;
  Vec<R> sum[ROWS][COLS];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int n = 0; n < COLS; n++) sum[m][n] = first ? Vec<R>{} : load(g + m * ld + n * L);
#pragma GCC unroll 2
  for (int q = 0; q < NP; q++)
    for (int p = 0; p < P; p++) {
      const R *xp = x[q] + xs[p], *dp = d[q] + ds[p];
      Vec<R> column[COLS];
#pragma GCC unroll 4
      for (int n = 0; n < COLS; n++) column[n] = load(dp + n * L);
#pragma GCC unroll 12
      for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int n = 0; n < COLS; n++) sum[m][n] += xp[ks[m]] * column[n];
    }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int n = 0; n < COLS; n++) store<R>(g + m * ld + n * L, sum[m][n]);
}

template <class F> inline void in_columns(int vectors, const F &f) {  // f(first vector, integral_constant<count>)
  for (int at = 0; at < vectors; at += MOST_COLUMNS)
    with_number<MOST_COLUMNS>(std::min(MOST_COLUMNS, vectors - at), [&](auto count) { f(at, count); });
}

template <class R, int NP>
void products(const R *const *a, const R *const *b, int ld, int columns, const int *from, const int *to, int rows, R *c,
              const int *ks, int K, bool first) {
  in_columns(columns / LANES<R>, [&](int at, auto count) {
    const int shift = at * LANES<R>;
    const R *right[2] = {b[0] + shift, NP > 1 ? b[NP - 1] + shift : nullptr};
    constexpr int most = most_rows(count());
    in_tiles(rows, most, [&](int m, int few) {
      with_number<most>(few, [&](auto size) {
        product<R, NP, count(), size()>(a, right, ld, from + m, to + m, c + shift, ks, K, first);
      });
    });
  });
}

template <class R, int NP>
void outer_products(const R *const *x, const R *const *d, const int *xs, const int *ds, int pixels, R *g,
                    const int *ks, int K, int columns, bool first) {
  in_columns(columns / LANES<R>, [&](int at, auto count) {
    const int shift = at * LANES<R>;
    const R *right[2] = {d[0] + shift, NP > 1 ? d[NP - 1] + shift : nullptr};
    constexpr int most = most_rows(count());
    in_tiles(K, most, [&](int m, int few) {
      with_number<most>(few, [&](auto size) {
        outer_product<R, NP, count(), size()>(x, right, xs, ds, pixels, g + m * columns + shift, columns, ks + m, first);
      });
    });
  });
}

// ---- Stages ---------------------------------------------------------------------------------------------------------

struct Tap {
  int number, shift;
};
struct Rows {  // those that the same taps reach: where they begin in the factor, and in the product
  std::vector<Tap> taps;
  std::vector<int> from, to;
  int each;  // of an image
};
struct Pairs {  // pixels that meet in a tap
  std::vector<int> x, d;
  int each;
};

enum Field { CHANNELS, FILTERS, HEIGHT, WIDTH, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, NORM, GROUPS, ACT, POOL,
             POOL_SIZE, FIELDS };

template <class R> struct Stage {
  int cin, K, taps, cp, filters, h, w, oh, ow, px, ph, pw, ppx, norm, groups, act, pool, window, chunk;
  int64_t input, weights, bias, gamma, beta;  // elements of an image; places in a vector of parameters, or -1
  double eps;
  bool is_first;
  int pad_h, pad_w;
  std::vector<Rows> forward, back;
  std::vector<Pairs> pairs;
  std::vector<int> ks, channels;  // what the rows of a tap's weights are multiplied with, from a pixel on; those of its filters

  int rows_of_norm(int n) const { return norm == GROUP ? n : 1; }
  int64_t out() const { return int64_t(ppx) * cp; }
  int64_t y() const { return int64_t(px) * cp; }
};

template <class R> Stage<R> make_stage(const int64_t *f, double eps, bool is_first, int n, int64_t &at) {
  Stage<R> s{};
  const int kh = f[KERNEL_H], kw = f[KERNEL_W], sh = f[STRIDE_H], sw = f[STRIDE_W], p = f[PAD_H], q = f[PAD_W];
  s.is_first = is_first, s.eps = eps, s.filters = f[FILTERS], s.pad_h = p, s.pad_w = q;
  s.cin = is_first ? f[CHANNELS] : padded(f[CHANNELS], sizeof(R));
  s.cp = padded(s.filters, sizeof(R));
  s.h = f[HEIGHT], s.w = f[WIDTH];
  s.oh = (s.h + 2 * p - kh) / sh + 1, s.ow = (s.w + 2 * q - kw) / sw + 1, s.px = s.oh * s.ow;
  s.norm = f[NORM], s.groups = f[GROUPS], s.act = f[ACT], s.pool = f[POOL], s.window = f[POOL_SIZE];
  s.ph = s.pool == MAX ? s.oh / s.window : s.pool == MEAN ? 1 : s.oh;
  s.pw = s.pool == MAX ? s.ow / s.window : s.pool == MEAN ? 1 : s.ow;
  s.ppx = s.ph * s.pw;
  const int64_t behind = at + int64_t(kh) * kw * s.cin * s.cp;
  // Batch norm takes a bias away again, and without a norm it is `beta`.
  s.weights = at, s.bias = s.norm == GROUP ? behind : -1, s.gamma = behind + (s.norm == GROUP ? s.cp : 0);
  s.beta = s.gamma + s.cp, at = s.beta + s.cp;
  s.chunk = std::max<int64_t>(1, std::min<int64_t>(n, int64_t(CHUNK_BYTES / sizeof(R)) / std::max<int64_t>(1, s.y())));
  // Samples have their padding in memory, and the whole kernel is one tap, as they have few channels.
  const int wide = is_first ? s.w + 2 * q : s.w, high = is_first ? s.h + 2 * p : s.h;
  s.input = int64_t(wide) * high * s.cin;
  s.taps = is_first ? 1 : kh * kw, s.K = is_first ? kh * kw * s.cin : s.cin;
  for (int k = 0; k < s.K; k++) s.ks.push_back(is_first ? (k / (kw * s.cin) * wide) * s.cin + k % (kw * s.cin) : k);
  for (int k = 0; k < s.cp; k++) s.channels.push_back(k);
  const int rows = is_first ? 1 : kh, columns = is_first ? 1 : kw, shift_h = is_first ? 0 : p, shift_w = is_first ? 0 : q;
  std::map<std::vector<std::pair<int, int>>, Rows> forward, back;
  s.pairs.resize(s.taps);
  for (int i = 0; i < s.oh; i++)
    for (int j = 0; j < s.ow; j++) {
      const int top = i * sh - shift_h, left = j * sw - shift_w, from = (top * wide + left) * s.cin, to = (i * s.ow + j) * s.cp;
      std::vector<std::pair<int, int>> key;
      for (int a = 0; a < rows; a++)
        for (int b = 0; b < columns; b++) {
          if (!is_first && (top + a < 0 || top + a >= s.h || left + b < 0 || left + b >= s.w)) continue;
          const Tap t{a * kw + b, (a * wide + b) * s.cin};
          key.push_back({t.number, t.shift});
          s.pairs[t.number].x.push_back(from + t.shift), s.pairs[t.number].d.push_back(to);
        }
      forward[key].from.push_back(from), forward[key].to.push_back(to);
    }
  if (!is_first)
    for (int u = 0; u < s.h; u++)
      for (int v = 0; v < s.w; v++) {
        const int i0 = (u + p) / sh, j0 = (v + q) / sw;
        std::vector<std::pair<int, int>> key;
        for (int a = 0; a < kh; a++)
          for (int b = 0; b < kw; b++) {
            const int i = u + p - a, j = v + q - b;
            if (i < 0 || j < 0 || i % sh || j % sw || i / sh >= s.oh || j / sw >= s.ow) continue;
            key.push_back({a * kw + b, ((i / sh - i0) * s.ow + j / sw - j0) * s.cp});
          }
        back[key].from.push_back((i0 * s.ow + j0) * s.cp), back[key].to.push_back((u * s.w + v) * s.cin);
      }
  const auto repeated = [&](std::vector<int> &list, int64_t stride) {
    const size_t each = list.size();
    for (int image = 1; image < s.chunk; image++)
      for (size_t k = 0; k < each; k++) list.push_back(list[k] + int(image * stride));
  };
  const auto finished = [&](auto &found, std::vector<Rows> &to, int64_t from_stride, int64_t to_stride) {
    for (auto &[key, rows] : found) {
      for (auto &[number, shift] : key) rows.taps.push_back({number, shift});
      rows.each = rows.from.size();
      repeated(rows.from, from_stride), repeated(rows.to, to_stride);
      to.push_back(rows);
    }
  };
  finished(forward, s.forward, s.input, s.y());
  finished(back, s.back, s.y(), s.input);
  for (Pairs &pair : s.pairs) {
    pair.each = pair.x.size();
    repeated(pair.x, s.input), repeated(pair.d, s.y());
  }
  return s;
}

// out = convolution of `x` with `w`, or the sum of two; pointers are of the images' first.
template <class R, int NP>
void convolve(const Stage<R> &s, const R *const *x, const R *const *w, R *out, int images) {
  for (const Rows &rows : s.forward)
    for (int at = 0, all = rows.each * images; at < all; at += ROW_BLOCK) {
      const int m = std::min(ROW_BLOCK, all - at);
      bool first = true;
      for (const Tap &t : rows.taps) {
        const R *a[2], *b[2];
        for (int q = 0; q < NP; q++) a[q] = x[q] + t.shift, b[q] = w[q] + int64_t(t.number) * s.K * s.cp;
        products<R, NP>(a, b, s.cp, s.cp, &rows.from[at], &rows.to[at], m, out, s.ks.data(), s.K, first);
        first = false;
      }
    }
}

// gx = the convolution's derivative by its inputs, of `d` with the transposed weights.
template <class R, int NP>
void convolve_back(const Stage<R> &s, const R *const *d, const R *const *turned, R *gx, int images) {
  for (const Rows &rows : s.back)
    for (int at = 0, all = rows.each * images; at < all; at += ROW_BLOCK) {
      const int m = std::min(ROW_BLOCK, all - at);
      if (rows.taps.empty())
        for (int k = at; k < at + m; k++) memset(gx + rows.to[k], 0, sizeof(R) * s.cin);
      bool first = true;
      for (const Tap &t : rows.taps) {
        const R *a[2], *b[2];
        for (int q = 0; q < NP; q++) a[q] = d[q] + t.shift, b[q] = turned[q] + int64_t(t.number) * s.cin * s.cp;
        products<R, NP>(a, b, s.cin, s.cin, &rows.from[at], &rows.to[at], m, gx, s.channels.data(), s.cp, first);
        first = false;
      }
    }
}

// gw (+)= the convolution's derivative by its weights.
template <class R, int NP>
void convolve_weights(const Stage<R> &s, const R *const *x, const R *const *d, R *gw, int images, bool first) {
  for (int t = 0; t < s.taps; t++) {
    const Pairs &pairs = s.pairs[t];
    R *g = gw + int64_t(t) * s.K * s.cp;
    if (first && !pairs.each) memset(g, 0, sizeof(R) * s.K * s.cp);
    for (int at = 0, all = pairs.each * images; at < all; at += PIXEL_BLOCK)
      outer_products<R, NP>(x, d, &pairs.x[at], &pairs.d[at], std::min(PIXEL_BLOCK, all - at), g, s.ks.data(), s.K, s.cp,
                            first && !at);
  }
}

template <class R> void add_bias(const Stage<R> &s, const R *w, R *y, int images) {
  if (s.bias < 0) return;
  for (int64_t p = 0; p < int64_t(images) * s.px; p++)
    for (int c = 0; c < s.cp; c++) y[p * s.cp + c] += w[s.bias + c];
}

template <class R> void add_to_bias(const Stage<R> &s, const R *dy, R *g, int images) {
  if (s.bias < 0) return;
  for (int64_t p = 0; p < int64_t(images) * s.px; p++)
    for (int c = 0; c < s.cp; c++) g[s.bias + c] += dy[p * s.cp + c];
}

template <class R> void transpose(const Stage<R> &s, const R *w, R *turned) {
  for (int t = 0; t < s.taps; t++, w += int64_t(s.cin) * s.cp, turned += int64_t(s.cin) * s.cp)
    for (int i = 0; i < s.cin; i += LANES<R>)
      for (int j = 0; j < s.cp; j += LANES<R>) transpose_tile<R>(w + i * s.cp + j, s.cp, turned + j * s.cin + i, s.cin);
}

// ---- What lies between two convolutions -----------------------------------------------------------------------------

// What a pass leaves of a stage. Of a pass along a direction: their derivatives, and `mean` and `scale` are the means
// of yD and of yD z.
template <class R> struct Kept {
  R *y, *out, *g;        // n px cp; n ppx cp; by `out`
  R *place, *z;          // of max-pooling, n ppx cp: where the largest is, or -1 where it is cut off; its z
  R *mean, *scale;       // of the norm, rows of cp
  R *sum, *sum_z;        // sums of the gradient behind activation and pooling, and of its product with z
  R *part, *part_z;      // of which the norm takes these parts away
  Kept(const Stage<R> &s, int n, Memory<R> &memory) {  // zeros, as the means and parts of what has no norm stay
    const int64_t outs = s.out() * n, rows = int64_t(s.rows_of_norm(n)) * s.cp;
    y = memory.take(s.y() * n), out = memory.take(outs), g = memory.take(outs);
    place = s.pool == MAX ? memory.take(outs) : nullptr, z = s.pool == MAX ? memory.take(outs) : nullptr;
    for (R **each : {&mean, &scale, &sum, &sum_z, &part, &part_z}) *each = memory.take(rows);
  }
};

// Fetches the outputs of a large set in the order of memory, which is faster than channel by channel.
template <class R> inline void fetch(const Stage<R> &s, const Kept<R> &k, int from, int to, int n) {
  if (size_t(s.y() * n) * sizeof(R) < 2 * CHUNK_BYTES) return;
  for (int64_t at = from * s.y(), end = to * s.y(); at < end; at += 64 / sizeof(R)) __builtin_prefetch(k.y + at);
}

// f(c, image, row): channels from c on, one vector of them; the row of the norm's values.
template <class R, class F> inline void over(const Stage<R> &s, int from, int to, const F &f) {
  for (int c = 0; c < s.cp; c += LANES<R>)
    for (int i = from; i < to; i++) f(c, i, (s.norm == GROUP ? i * s.cp : 0) + c);
}

// Every pixel of an image: those within max-pooling's windows with what `of` gives of the window and their place in it,
// and the others. Pixels and windows are told by where they are in memory.
template <class R, class Of, class Inside, class Outside>
inline void windows(const Stage<R> &s, const Of &of, const Inside &inside, const Outside &outside) {
  const int high = s.ph * s.window, wide = s.pw * s.window;
  for (int a = 0; a < s.ph; a++)
    for (int b = 0; b < s.pw; b++) {
      const auto found = of((int64_t(a) * s.pw + b) * s.cp);
      for (int u = 0, j = 0; u < s.window; u++)
        for (int v = 0; v < s.window; v++, j++)
          inside((int64_t(a * s.window + u) * s.ow + b * s.window + v) * s.cp, j, found);
    }
  for (int i = 0; i < s.oh; i++)
    for (int j = i < high ? wide : 0; j < s.ow; j++) outside((int64_t(i) * s.ow + j) * s.cp);
}

template <class R> void clear(const Stage<R> &s, int n, R *a, R *b) {
  memset(a, 0, sizeof(R) * s.rows_of_norm(n) * s.cp), memset(b, 0, sizeof(R) * s.rows_of_norm(n) * s.cp);
}

// Mean, and sum of squared differences from it, of images that join those `seen`. Squares are of differences from a value
// that is among them, as squares of what varies little around a large number would have no digits left.
template <class R> void statistics(const Stage<R> &s, const Kept<R> &k, int from, int to) {
  if (s.norm == BIAS) return;
  over(s, from, to, [&](int c, int i, int row) {
    const R *y = k.y + i * s.y() + c;
    const R seen = s.norm == GROUP ? 0 : R(i), all = seen + 1;
    const Vec<R> near = seen ? load(k.mean + row) : load(y + s.px / 2 * s.cp);
    Vec<R> sums[4]{}, squares[4]{};
    for (int p = 0; p < s.px; p++) {
      const Vec<R> d = load(y + p * s.cp) - near;
      sums[p % 4] += d, squares[p % 4] += d * d;
    }
    const Vec<R> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), far = sum / R(s.px);
    const Vec<R> square = (squares[0] + squares[1]) + (squares[2] + squares[3]) - sum * far;
    store<R>(k.mean + row, near + far * (R(1) / all));
    store<R>(k.scale + row, seen ? load(k.scale + row) + square + far * far * (R(s.px) * seen / all) : square);
  });
}

template <class R> void close_statistics(const Stage<R> &s, const Kept<R> &k, int n) {
  if (s.norm == BIAS) return;
  const int size = s.norm == GROUP ? s.filters / s.groups : 1;
  for (int i = 0; i < s.rows_of_norm(n); i++)
    for (int c = 0; c < s.cp; c += size) {
      R *mean = k.mean + i * s.cp + c, *scale = k.scale + i * s.cp + c;
      if (c >= s.filters) {
        for (int f = c; f < std::min(c + size, s.cp); f++) k.mean[i * s.cp + f] = k.scale[i * s.cp + f] = 0;
        continue;
      }
      R middle = 0, square = 0;
      for (int f = 0; f < size; f++) middle += mean[f] / size;
      for (int f = 0; f < size; f++) square += scale[f] + R(s.px) * (mean[f] - middle) * (mean[f] - middle);
      const R count = R(s.px) * (s.norm == GROUP ? size : n);
      for (int f = 0; f < size; f++) mean[f] = middle, scale[f] = 1 / std::sqrt(square / count + R(s.eps));
    }
}

// Sums over pixels as means over what is normalized together; `gamma` weighs channels, where given.
template <class R> void means(const Stage<R> &s, int n, const R *sum, const R *gamma, R *to) {
  if (s.norm == BIAS) return;
  const int size = s.norm == GROUP ? s.filters / s.groups : 1;
  for (int i = 0; i < s.rows_of_norm(n); i++)
    for (int c = 0; c < s.cp; c += size) {
      R all = 0;
      if (c < s.filters)
        for (int f = c; f < c + size; f++) all += sum[i * s.cp + f] * (gamma ? gamma[f] : 1);
      const R mean = all / (R(s.px) * (s.norm == GROUP ? size : n));
      for (int f = c; f < std::min(c + size, s.cp); f++) to[i * s.cp + f] = mean;
    }
}

template <class R> void add_rows(const Stage<R> &s, int n, const R *sum, R *to) {
  for (int i = 0; i < s.rows_of_norm(n); i++)
    for (int c = 0; c < s.cp; c++) to[c] += sum[i * s.cp + c];
}

// Of one vector of channels: NORMED, or with a bias alone.
template <class R, bool NORMED> struct Scaling {
  Vec<R> mean, scale, gamma, beta;
  Scaling(const Stage<R> &s, const R *w, const Kept<R> &k, int c, int row) : beta(load(w + s.beta + c)) {
    if constexpr (NORMED) mean = load(k.mean + row), scale = load(k.scale + row), gamma = load(w + s.gamma + c);
  }
  INLINED Vec<R> z(Vec<R> y) const {
    if constexpr (NORMED) return (y - mean) * scale;
    else return y;
  }
  INLINED Vec<R> u(Vec<R> z) const {
    if constexpr (NORMED) return z * gamma + beta;
    else return z + beta;
  }
};
// Its derivative along a direction v of the parameters.
template <class R, bool NORMED> struct ScalingAlong {
  Vec<R> m1, m2, gammaD, betaD;
  ScalingAlong(const Stage<R> &s, const R *v, const Kept<R> &t, int c, int row) : betaD(load(v + s.beta + c)) {
    if constexpr (NORMED) m1 = load(t.mean + row), m2 = load(t.scale + row), gammaD = load(v + s.gamma + c);
  }
  INLINED Vec<R> z(const Scaling<R, NORMED> &of, Vec<R> z, Vec<R> yD) const {
    if constexpr (NORMED) return of.scale * (yD - m1 - z * m2);
    else return yD;
  }
  INLINED Vec<R> u(const Scaling<R, NORMED> &of, Vec<R> z, Vec<R> zD) const {
    if constexpr (NORMED) return of.gamma * zD + gammaD * z + betaD;
    else return zD + betaD;
  }
};

template <class R, int ACT, int POOL, bool NORMED> struct Between {
  static inline Vec<R> activated(Vec<R> u) {
    if constexpr (ACT == RELU) return cut<R>(u, u);
    else if constexpr (ACT == TANH) return tanh_of<R>(u);
    else return u;
  }

  // out = pool(act(norm(y)))
  static void finish(const Stage<R> &s, const R *w, const Kept<R> &k, int from, int to) {
    over(s, from, to, [&](int c, int i, int row) {
      const Scaling<R, NORMED> of(s, w, k, c, row);
      const R *y = k.y + i * s.y() + c;
      R *out = k.out + i * s.out() + c;
      if constexpr (POOL == NONE)
        for (int p = 0; p < s.px; p++) store<R>(out + p * s.cp, activated(of.u(of.z(load(y + p * s.cp)))));
      if constexpr (POOL == MEAN) {
        Vec<R> sum{};
        for (int p = 0; p < s.px; p++) sum += activated(of.u(of.z(load(y + p * s.cp))));
        store<R>(out, sum / R(s.px));
      }
      if constexpr (POOL == MAX)
        for (int a = 0, p = 0; a < s.ph; a++)
          for (int b = 0; b < s.pw; b++, p++) {
            const int64_t at = i * s.out() + int64_t(p) * s.cp + c;
            const R *corner = y + (a * s.ow + b) * s.window * s.cp;
            Vec<R> largest{}, best{}, place{};
            for (int j = 0; j < s.window * s.window; j++) {
              const Vec<R> z = of.z(load(corner + (j / s.window * s.ow + j % s.window) * s.cp)), u = of.u(z);
              const auto more = (u > largest) | (u != u);
              largest = j ? (more ? u : largest) : u, best = j ? (more ? z : best) : z;
              place = j ? (more ? Vec<R>{} + R(j) : place) : Vec<R>{};
            }
            if (ACT == RELU) place = largest <= 0 ? Vec<R>{} - 1 : place;
            store<R>(k.out + at, activated(largest)), store<R>(k.place + at, place), store<R>(k.z + at, best);
          }
    });
  }

  // The gradient by what is activated, of one pixel, where `g` is the gradient by `out`; not for max-pooling.
  static inline Vec<R> through(const Stage<R> &s, Vec<R> g, Vec<R> u, const R *out) {
    if constexpr (POOL == MEAN) g /= R(s.px);
    if constexpr (ACT == RELU) return cut<R>(u, g);
    if constexpr (ACT == TANH) {
      const Vec<R> o = load(out);
      return g * (1 - o * o);
    }
    return g;
  }

  // k.sum, k.sum_z += of images [from, to)
  static void sums(const Stage<R> &s, const R *w, const Kept<R> &k, int from, int to) {
    over(s, from, to, [&](int c, int i, int row) {
      Vec<R> sum{}, sum_z{};
      const R *g = k.g + i * s.out() + c;
      if constexpr (POOL == MAX) {
        for (int p = 0; p < s.ppx; p++) {
          const int64_t at = i * s.out() + int64_t(p) * s.cp + c;
          const Vec<R> own = load(k.place + at) < 0 ? Vec<R>{} : load(g + p * s.cp);
          sum += own, sum_z += own * load(k.z + at);
        }
      } else {
        const Scaling<R, NORMED> of(s, w, k, c, row);
        const R *y = k.y + i * s.y() + c, *out = k.out + i * s.out() + c;
        for (int p = 0; p < s.px; p++) {
          const Vec<R> z = of.z(load(y + p * s.cp));
          const int64_t q = POOL == MEAN ? 0 : p * s.cp;
          const Vec<R> own = through(s, load(g + q), of.u(z), out + q);
          sum += own;
          if constexpr (NORMED) sum_z += own * z;
        }
      }
      add<R>(k.sum + row, sum);
      if constexpr (NORMED) add<R>(k.sum_z + row, sum_z);
    });
  }

  // dy = the gradient by y, of images [from, to); `dy` is of the first of them.
  static void gradient(const Stage<R> &s, const R *w, const Kept<R> &k, int from, int to, R *dy) {
    over(s, from, to, [&](int c, int i, int row) {
      const Scaling<R, NORMED> of(s, w, k, c, row);
      const Vec<R> part = load(k.part + row), part_z = load(k.part_z + row);
      const R *y = k.y + i * s.y() + c, *g = k.g + i * s.out() + c, *out = k.out + i * s.out() + c;
      R *d = dy + (i - from) * s.y() + c;
      const auto put = [&](int64_t p, Vec<R> z, Vec<R> own) {
        if constexpr (NORMED) store<R>(d + p, of.scale * (of.gamma * own - part - z * part_z));
        else store<R>(d + p, own);
      };
      const auto normalized = [&](int64_t p) { return of.z(load(y + p)); };
      if constexpr (POOL == MAX)
        windows(
            s,
            [&](int64_t q) { return std::pair(load(k.place + i * s.out() + c + q), load(g + q)); },
            [&](int64_t p, int j, const auto &of) { put(p, normalized(p), of.first == R(j) ? of.second : Vec<R>{}); },
            [&](int64_t p) { put(p, normalized(p), Vec<R>{}); });
      else
        for (int64_t p = 0; p < s.y(); p += s.cp) {
          const int64_t q = POOL == MEAN ? 0 : p;
          const Vec<R> z = normalized(p);
          put(p, z, through(s, load(g + q), of.u(z), out + q));
        }
    });
  }

  // t.out = the derivative of k.out along a direction v of the parameters w, where t.y is that of k.y.
  static void finish_along(const Stage<R> &s, const R *w, const R *v, const Kept<R> &k, const Kept<R> &t, int from, int to) {
    over(s, from, to, [&](int c, int i, int row) {
      const Scaling<R, NORMED> of(s, w, k, c, row);
      const ScalingAlong<R, NORMED> along(s, v, t, c, row);
      const R *y = k.y + i * s.y() + c, *yD = t.y + i * s.y() + c;
      Vec<R> sum{};
      if constexpr (POOL == MAX) {
        for (int a = 0, p = 0; a < s.ph; a++)
          for (int b = 0; b < s.pw; b++, p++) {
            const int64_t at = i * s.out() + int64_t(p) * s.cp + c, corner = (a * s.ow + b) * s.window * s.cp;
            const Vec<R> place = load(k.place + at), z = load(k.z + at);
            Vec<R> chosen{};
            for (int j = 0; j < s.window * s.window; j++)
              chosen = place == R(j) ? load(yD + corner + (j / s.window * s.ow + j % s.window) * s.cp) : chosen;
            const Vec<R> zD = along.z(of, z, chosen), uD = along.u(of, z, zD);
            store<R>(t.out + at, place < 0 ? Vec<R>{} : uD), store<R>(t.z + at, zD);
          }
      } else {
        for (int p = 0; p < s.px; p++) {
          const Vec<R> z = of.z(load(y + p * s.cp));
          Vec<R> uD = along.u(of, z, along.z(of, z, load(yD + p * s.cp)));
          if constexpr (ACT == RELU) uD = cut<R>(of.u(z), uD);
          const int64_t at = i * s.out() + (POOL == MEAN ? 0 : p * s.cp) + c;
          if constexpr (ACT == TANH) {
            const Vec<R> o = load(k.out + at);
            uD *= 1 - o * o;
          }
          if constexpr (POOL == MEAN) sum += uD;
          else store<R>(t.out + at, uD);
        }
        if constexpr (POOL == MEAN) store<R>(t.out + i * s.out() + c, sum / R(s.px));
      }
    });
  }

  // The derivative of what `through` gives; where outD is that of out, and gD of g.
  static inline Vec<R> through_along(const Stage<R> &s, Vec<R> g, Vec<R> gD, Vec<R> u, const R *out, const R *outD) {
    Vec<R> own = through(s, gD, u, out);
    if constexpr (ACT == TANH) own -= 2 * load(out) * load(outD) * g;  // outD is (1 - out^2) uD already
    return own;
  }

  // t.sum, t.sum_z += the derivatives of k's, of images [from, to)
  static void sums_along(const Stage<R> &s, const R *w, const R *v, const Kept<R> &k, const Kept<R> &t, int from, int to) {
    over(s, from, to, [&](int c, int i, int row) {
      Vec<R> sum{}, sum_z{};
      const R *g = k.g + i * s.out() + c, *gD = t.g + i * s.out() + c;
      if constexpr (POOL == MAX) {
        for (int p = 0; p < s.ppx; p++) {
          const int64_t at = i * s.out() + int64_t(p) * s.cp + c;
          const auto off = load(k.place + at) < 0;
          const Vec<R> own = off ? Vec<R>{} : load(g + p * s.cp), ownD = off ? Vec<R>{} : load(gD + p * s.cp);
          sum += ownD, sum_z += ownD * load(k.z + at) + own * load(t.z + at);
        }
      } else {
        const Scaling<R, NORMED> of(s, w, k, c, row);
        const ScalingAlong<R, NORMED> along(s, v, t, c, row);
        const R *y = k.y + i * s.y() + c, *yD = t.y + i * s.y() + c, *out = k.out + i * s.out() + c, *outD = t.out + i * s.out() + c;
        for (int p = 0; p < s.px; p++) {
          const Vec<R> z = of.z(load(y + p * s.cp)), u = of.u(z);
          const int64_t q = POOL == MEAN ? 0 : p * s.cp;
          const Vec<R> own = through(s, load(g + q), u, out + q);
          const Vec<R> ownD = through_along(s, load(g + q), load(gD + q), u, out + q, outD + q);
          sum += ownD;
          if constexpr (NORMED) sum_z += ownD * z + own * along.z(of, z, load(yD + p * s.cp));
        }
      }
      add<R>(t.sum + row, sum);
      if constexpr (NORMED) add<R>(t.sum_z + row, sum_z);
    });
  }

  // dy, and dyD, its derivative, of images [from, to); both are of the first of them.
  static void gradient_along(const Stage<R> &s, const R *w, const R *v, const Kept<R> &k, const Kept<R> &t, int from, int to, R *dy, R *dyD) {
    over(s, from, to, [&](int c, int i, int row) {
      const Scaling<R, NORMED> of(s, w, k, c, row);
      const ScalingAlong<R, NORMED> along(s, v, t, c, row);
      const Vec<R> part = load(k.part + row), part_z = load(k.part_z + row), partD = load(t.part + row), part_zD = load(t.part_z + row);
      const int64_t first = i * s.out() + c;
      const R *y = k.y + i * s.y() + c, *yD = t.y + i * s.y() + c;
      R *d = dy + (i - from) * s.y() + c, *dD = dyD + (i - from) * s.y() + c;
      const auto normalized = [&](int64_t p) { return of.z(load(y + p)); };
      const auto put = [&](int64_t p, Vec<R> z, Vec<R> own, Vec<R> ownD) {
        if constexpr (NORMED) {
          const Vec<R> zD = along.z(of, z, load(yD + p)), inner = of.gamma * own - part - z * part_z;
          store<R>(d + p, of.scale * inner);
          // The derivative of the scale is -scale^2 m2.
          store<R>(dD + p, of.scale * (along.gammaD * own + of.gamma * ownD - partD - zD * part_z - z * part_zD - of.scale * along.m2 * inner));
        } else store<R>(d + p, own), store<R>(dD + p, ownD);
      };
      if constexpr (POOL == MAX) {
        struct Window { Vec<R> place, g, gD; };
        windows(
            s,
            [&](int64_t q) { return Window{load(k.place + first + q), load(k.g + first + q), load(t.g + first + q)}; },
            [&](int64_t p, int j, const Window &at) {
              const auto chosen = at.place == R(j);
              put(p, normalized(p), chosen ? at.g : Vec<R>{}, chosen ? at.gD : Vec<R>{});
            },
            [&](int64_t p) { put(p, normalized(p), Vec<R>{}, Vec<R>{}); });
      } else
        for (int64_t p = 0; p < s.y(); p += s.cp) {
          const int64_t q = first + (POOL == MEAN ? 0 : p);
          const Vec<R> z = normalized(p), u = of.u(z), g = load(k.g + q);
          put(p, z, through(s, g, u, k.out + q), through_along(s, g, load(t.g + q), u, k.out + q, t.out + q));
        }
    });
  }
};

// Sums of yD and of yD z, of images [from, to)
template <class R> void statistics_along(const Stage<R> &s, const Kept<R> &k, const Kept<R> &t, int from, int to) {
  if (s.norm == BIAS) return;
  over(s, from, to, [&](int c, int i, int row) {
    const Vec<R> mean = load(k.mean + row), scale = load(k.scale + row);
    const R *y = k.y + i * s.y() + c, *yD = t.y + i * s.y() + c;
    Vec<R> sum{}, sum_z{};
    for (int p = 0; p < s.px; p++) {
      const Vec<R> d = load(yD + p * s.cp);
      sum += d, sum_z += d * ((load(y + p * s.cp) - mean) * scale);
    }
    add<R>(t.sum + row, sum), add<R>(t.sum_z + row, sum_z);
  });
}

template <class R, bool NORMED, class F> void between_of(const Stage<R> &s, const F &f) {
  if (s.pool == MAX) {
    if (s.act == RELU) f(Between<R, RELU, MAX, NORMED>());
    else f(Between<R, LINEAR, MAX, NORMED>());
  } else if (s.pool == MEAN) {
    if (s.act == RELU) f(Between<R, RELU, MEAN, NORMED>());
    else f(Between<R, LINEAR, MEAN, NORMED>());
  } else {
    if (s.act == RELU) f(Between<R, RELU, NONE, NORMED>());
    else if (s.act == TANH) f(Between<R, TANH, NONE, NORMED>());
    else f(Between<R, LINEAR, NONE, NORMED>());
  }
}

template <class R, class F> void between(const Stage<R> &s, const F &f) {
  if (s.norm == BIAS) between_of<R, false>(s, f);
  else between_of<R, true>(s, f);
}

// ---- A set of samples -----------------------------------------------------------------------------------------------

template <class R> using Stages = std::vector<Stage<R>>;

template <class R> struct Weights;
template <class R> struct Pass;
template <class R> struct Scratch;
template <class R> struct Set;

template <class R> struct Convolutions {  // a network, as `tasks.h` wants it
  using Real = R;
  using Weights = ::Weights<R>;
  using Pass = ::Pass<R>;
  using Scratch = ::Scratch<R>;
  using Set = ::Set<R>;
  ::Stages<R> stages;
  int64_t sample;
  size_t layers;
  int ld;

  Convolutions(const int64_t *fields, const double *eps, const Sizes &z) : sample(fields[CHANNELS] * fields[HEIGHT] * fields[WIDTH]), layers(z.stages) {
    int64_t at = 0;
    const int n = std::max(z.support, z.query);
    for (size_t l = 0; l < layers; l++) stages.push_back(make_stage<R>(fields + l * FIELDS, eps[l], l == 0, n, at));
    ld = stages.back().cp;
  }
  std::pair<int64_t, int64_t> range(size_t l) const { return {stages[l].weights, stages[l].beta + stages[l].cp}; }
  const R *outputs(const Pass &pass) const;
};

template <class R> struct Weights {
  R *flat;
  std::vector<R *> turned;  // transposed, of each stage but the first
  Weights(const Convolutions<R> &net, int64_t size, Memory<R> &memory) : flat(memory.take(size)) {
    for (const Stage<R> &s : net.stages) turned.push_back(s.is_first ? nullptr : memory.take(s.gamma - s.weights));
  }
  void turn(const Convolutions<R> &net, size_t l) {
    if (l) transpose(net.stages[l], flat + net.stages[l].weights, turned[l]);
  }
};

template <class R> struct Pass {
  std::vector<Kept<R>> kept;
  R *probability;  // n classes: softmax
  Pass(const Convolutions<R> &net, int n, Memory<R> &memory) : probability(memory.take(n * net.ld)) {
    for (const Stage<R> &s : net.stages) kept.emplace_back(s, n, memory);
  }
};

template <class R> const R *Convolutions<R>::outputs(const Pass &pass) const { return pass.kept.back().out; }

template <class R> struct Scratch {  // gradients by the outputs of a chunk's convolutions, and their derivatives
  R *dy, *dyD;
  Scratch(const Convolutions<R> &net, Memory<R> &memory) {
    int64_t most = 0;
    for (const Stage<R> &s : net.stages) most = std::max(most, s.y() * s.chunk);
    dy = memory.take(most), dyD = memory.take(most);
  }
};

template <class R> struct Set {
  const Stages<R> &stages;
  int n;
  Targets<R> targets;
  R *x;

  Set(const Convolutions<R> &net, int n, const Sizes &z, Memory<R> &memory)
      : stages(net.stages), n(n), targets{n, z.outputs, z.classes != 0}, x(memory.take(stages[0].input * n)) {}

  void take(const R *samples, const void *y) {  // (n, C, H, W), to channels last with the padding around
    const Stage<R> &s = stages[0];
    for (int i = 0; i < n; i++)
      for (int c = 0; c < s.cin; c++)
        for (int a = 0; a < s.h; a++)
          for (int b = 0; b < s.w; b++)
            x[i * s.input + ((a + s.pad_h) * int64_t(s.w + 2 * s.pad_w) + b + s.pad_w) * s.cin + c] = *samples++;
    targets.y = y;
  }

  const R *input(const Pass<R> &pass, size_t l, int from) const {
    return l ? pass.kept[l - 1].out + from * stages[l].input : x + from * stages[0].input;
  }

  template <class F> void chunks(const Stage<R> &s, const F &f) const {
    for (int from = 0; from < n; from += s.chunk) f(from, std::min(n, from + s.chunk));
  }

  // Loss, and its gradient by all parameters; `done` is told of each stage whose gradient is there.
  template <class F> R gradient(const Weights<R> &w, const Pass<R> &pass, R *gradient, const Scratch<R> &own, const F &done) const {
    R *const scratch = own.dy;
    const size_t last = stages.size() - 1;
    for (size_t l = 0; l <= last; l++) {
      const Stage<R> &s = stages[l];
      chunks(s, [&](int from, int to) {
        if (l) {
          fetch(stages[l - 1], pass.kept[l - 1], from, to, n);
          between(stages[l - 1], [&](auto b) { b.finish(stages[l - 1], w.flat, pass.kept[l - 1], from, to); });
        }
        const R *x[1] = {input(pass, l, from)}, *weights[1] = {w.flat + s.weights};
        convolve<R, 1>(s, x, weights, pass.kept[l].y + from * s.y(), to - from);
        add_bias(s, w.flat, pass.kept[l].y + from * s.y(), to - from);
        statistics(s, pass.kept[l], from, to);
      });
      close_statistics(s, pass.kept[l], n);
      clear(s, n, pass.kept[l].sum, pass.kept[l].sum_z);
    }
    between(stages[last], [&](auto b) { b.finish(stages[last], w.flat, pass.kept[last], 0, n); });
    const R found = targets.loss(pass.kept[last].out, stages[last].cp, pass.kept[last].g, pass.probability);
    between(stages[last], [&](auto b) { b.sums(stages[last], w.flat, pass.kept[last], 0, n); });
    for (size_t l = last + 1; l-- > 0;) {
      const Stage<R> &s = stages[l];
      const Kept<R> &k = pass.kept[l];
      memset(gradient + (s.bias < 0 ? s.gamma : s.bias), 0, sizeof(R) * (s.beta + s.cp - (s.bias < 0 ? s.gamma : s.bias)));
      means(s, n, k.sum, w.flat + s.gamma, k.part), means(s, n, k.sum_z, w.flat + s.gamma, k.part_z);
      if (s.norm != BIAS) add_rows(s, n, k.sum_z, gradient + s.gamma);
      add_rows(s, n, k.sum, gradient + s.beta);
      chunks(s, [&](int from, int to) {
        fetch(s, k, from, to, n);
        between(s, [&](auto b) { b.gradient(s, w.flat, k, from, to, scratch); });
        add_to_bias(s, scratch, gradient, to - from);
        const R *x[1] = {input(pass, l, from)}, *d[1] = {scratch}, *turned[1] = {w.turned[l]};
        convolve_weights<R, 1>(s, x, d, gradient + s.weights, to - from, !from);
        if (!l) return;
        convolve_back<R, 1>(s, d, turned, pass.kept[l - 1].g + from * s.input, to - from);
        between(stages[l - 1], [&](auto b) { b.sums(stages[l - 1], w.flat, pass.kept[l - 1], from, to); });
      });
      done(l);
    }
    return found;
  }

  // to += the Hessian of the loss at w, where `pass` is what `gradient` left, times v; `done` is told of each stage that
  // is there, and of whose part of v nothing is needed any more.
  template <class F>
  void hessian(const Weights<R> &w, const Pass<R> &pass, const Weights<R> &v, const Pass<R> &along, R *to, const Scratch<R> &own,
               const F &done) const {
    R *const scratch = own.dy, *const scratchD = own.dyD;
    const size_t last = stages.size() - 1;
    for (size_t l = 0; l <= last; l++) {
      const Stage<R> &s = stages[l];
      const Kept<R> &k = pass.kept[l], &t = along.kept[l];
      clear(s, n, t.sum, t.sum_z);
      chunks(s, [&](int from, int until) {
        if (l) between(stages[l - 1], [&](auto b) { b.finish_along(stages[l - 1], w.flat, v.flat, pass.kept[l - 1], along.kept[l - 1], from, until); });
        const R *x[2] = {input(pass, l, from), l ? input(along, l, from) : nullptr};
        const R *weights[2] = {v.flat + s.weights, w.flat + s.weights};
        if (l) convolve<R, 2>(s, x, weights, t.y + from * s.y(), until - from);
        else convolve<R, 1>(s, x, weights, t.y + from * s.y(), until - from);
        add_bias(s, v.flat, t.y + from * s.y(), until - from);
        statistics_along(s, k, t, from, until);
      });
      means<R>(s, n, t.sum, nullptr, t.mean), means<R>(s, n, t.sum_z, nullptr, t.scale);
      clear(s, n, t.sum, t.sum_z);
    }
    between(stages[last], [&](auto b) { b.finish_along(stages[last], w.flat, v.flat, pass.kept[last], along.kept[last], 0, n); });
    targets.loss_along(along.kept[last].out, stages[last].cp, pass.probability, along.kept[last].g);
    between(stages[last], [&](auto b) { b.sums_along(stages[last], w.flat, v.flat, pass.kept[last], along.kept[last], 0, n); });
    for (size_t l = last + 1; l-- > 0;) {
      const Stage<R> &s = stages[l];
      const Kept<R> &k = pass.kept[l], &t = along.kept[l];
      if (s.norm != BIAS) add_rows(s, n, t.sum_z, to + s.gamma);
      add_rows(s, n, t.sum, to + s.beta);
      for (int row = 0; s.norm != BIAS && row < s.rows_of_norm(n); row++)  // of gamma times the gradient
        for (int c = 0, j = row * s.cp; c < s.cp; c++, j++) {
          const R gamma = w.flat[s.gamma + c], gammaD = v.flat[s.gamma + c];
          t.sum[j] = gamma * t.sum[j] + gammaD * k.sum[j], t.sum_z[j] = gamma * t.sum_z[j] + gammaD * k.sum_z[j];
        }
      means<R>(s, n, t.sum, nullptr, t.part), means<R>(s, n, t.sum_z, nullptr, t.part_z);
      chunks(s, [&](int from, int until) {
        between(s, [&](auto b) { b.gradient_along(s, w.flat, v.flat, k, t, from, until, scratch, scratchD); });
        add_to_bias(s, scratchD, to, until - from);
        const R *x[2] = {input(pass, l, from), l ? input(along, l, from) : nullptr};
        const R *d[2] = {scratchD, scratch}, *turned[2] = {w.turned[l], v.turned[l]};
        if (!l) {
          convolve_weights<R, 1>(s, x, d, to + s.weights, until - from, false);
          return;
        }
        convolve_weights<R, 2>(s, x, d, to + s.weights, until - from, false);
        convolve_back<R, 2>(s, d, turned, along.kept[l - 1].g + from * s.input, until - from);
        between(stages[l - 1], [&](auto b) { b.sums_along(stages[l - 1], w.flat, v.flat, pass.kept[l - 1], along.kept[l - 1], from, until); });
      });
      done(l);
    }
  }
};

}  // namespace

extern "C" {
EXPORT(Convolutions, float)
EXPORT(Convolutions, double)
}
