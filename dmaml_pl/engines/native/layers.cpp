// Meta-gradients of chains of linear layers on CPUs: gradients, and Hessian products forward over reverse, task by task.
//
// Sets of samples and layers are small, so that what counts is how little lies between the products: weights are kept
// (in, out) for the way forward and (out, in) for the way back, rows are filled up with zeros to whole vectors, and what
// follows a product is one plain loop, made for each activation. A narrow last layer has (out, in) alone; its outputs are
// dot products.
//
// Legend: R float or double; n samples; x a layer's inputs, y what its activation gives; d the gradient by what is activated;
// a name that ends with D is a derivative along a direction of the weights.

#include "tasks.h"

namespace {

constexpr int WIDEST = std::min(MOST_COLUMNS, 3), MOST_ROWS = 8;  // of a tile, in vectors and in rows

template <class R> struct Factors {  // whose product is the sum over k < K of a[m * row + k * step] * b[k * ld + n]
  const R *a;
  int64_t row, step;
  const R *b;
  int64_t ld;
  int K;
};

// c[m, n] = start[m, n] + the products of `pairs` factors, for ROWS rows and COLS vectors; start may be null.
template <class R, int COLS, int ROWS>
__attribute__((noinline)) void tile(const Factors<R> *of, int pairs, int m0, int n0, const R *start, int64_t start_ld, R *c, int64_t ld) {
  constexpr int L = LANES<R>;
  Vec<R> sum[ROWS][COLS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int n = 0; n < COLS; n++) sum[m][n] = start ? load(start + (m0 + m) * start_ld + n0 + n * L) : Vec<R>{};
  for (int q = 0; q < pairs; q++) {
    const R *row[ROWS], *b = of[q].b + n0;
    const int64_t step = of[q].step, ldb = of[q].ld;
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) row[m] = of[q].a + (m0 + m) * of[q].row;
    for (int64_t k = 0, at = 0; k < of[q].K; k++, at += step, b += ldb) {
      Vec<R> column[COLS];
#pragma GCC unroll 4
      for (int n = 0; n < COLS; n++) column[n] = load(b + n * L);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int n = 0; n < COLS; n++) sum[m][n] += row[m][at] * column[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int n = 0; n < COLS; n++) store<R>(c + (m0 + m) * ld + n0 + n * L, sum[m][n]);
}

template <class R> using Tile = void (*)(const Factors<R> *, int, int, int, const R *, int64_t, R *, int64_t);
template <class R, int COLS> constexpr Tile<R> TILES[MOST_ROWS] = {
    tile<R, COLS, 1>, tile<R, COLS, 2>, tile<R, COLS, 3>, tile<R, COLS, 4>, tile<R, COLS, 5>, tile<R, COLS, 6>, tile<R, COLS, 7>, tile<R, COLS, 8>};

// All tiles of COLS vectors of c.
template <class R, int COLS>
inline void tiles(const Factors<R> *of, int pairs, int rows, int n0, const R *start, int64_t start_ld, R *c, int64_t ld) {
  constexpr int most = std::min(MOST_ROWS, ACCUMULATORS / COLS);
  for (int count = (rows + most - 1) / most, m = 0; count > 0; count--) {
    const int few = (rows - m + count - 1) / count;
    TILES<R, COLS>[few - 1](of, pairs, m, n0, start, start_ld, c, ld);
    m += few;
  }
}

template <class R, int PAIRS>
inline void products(const Factors<R> (&of)[PAIRS], int pairs, int rows, int columns, const R *start, int64_t start_ld, R *c, int64_t ld) {
  for (int n = 0, left = columns / LANES<R>; left > 0;) {
    // Two and two of four, as single columns have too little to do between loads.
    const int now = left == WIDEST + 1 ? (left + 1) / 2 : std::min(left, WIDEST);
    if (now >= 3) tiles<R, std::min(WIDEST, 3)>(of, pairs, rows, n, start, start_ld, c, ld);
    else if (now == 2) tiles<R, 2>(of, pairs, rows, n, start, start_ld, c, ld);
    else tiles<R, 1>(of, pairs, rows, n, start, start_ld, c, ld);
    n += now * LANES<R>, left -= now;
  }
}

template <class R> inline void add_rows(const R *d, int n, int ld, R *to, bool first) {  // to (+)= the sum of n rows
  for (int c = 0; c < ld; c += LANES<R>) {
    Vec<R> sum = first ? Vec<R>{} : load(to + c);
    for (int i = 0; i < n; i++) sum += load(d + i * ld + c);
    store<R>(to + c, sum);
  }
}

struct Layer {
  int in, out, pi, po, act;  // pi, po: filled up
  bool is_narrow;
  int64_t bias, weights, end;  // places in a vector of parameters; behind `end` there are rows of zeros
  int rows() const { return is_narrow ? out : in; }
  int ld() const { return is_narrow ? pi : po; }
};

template <class R> struct Weights;
template <class R> struct Pass;
template <class R> struct Set;

template <class R> struct Layers {  // a network, as `tasks.h` wants it
  using Real = R;
  using Weights = ::Weights<R>;
  using Pass = ::Pass<R>;
  using Set = ::Set<R>;
  struct Scratch {
    Scratch(const Layers &, Memory<R> &) {}
  };
  std::vector<Layer> each;
  int64_t sample;
  size_t layers;
  int ld;

  Layers(const int64_t *fields, const double *, const Sizes &z) : sample(fields[0]), layers(z.stages) {
    int64_t at = 0;
    for (size_t l = 0; l < layers; l++, fields += 4) {
      Layer own{int(fields[0]), int(fields[1]), padded(fields[0], sizeof(R)), padded(fields[1], sizeof(R)), int(fields[2]), fields[3] != 0, at, 0, 0};
      own.weights = at + own.po, own.end = own.weights + int64_t(own.rows()) * own.ld();
      at = own.end + (l && !own.is_narrow ? int64_t(own.pi - own.in) * own.po : 0);  // to be transposed in whole tiles
      each.push_back(own);
    }
    ld = each.back().po;
  }
  std::pair<int64_t, int64_t> range(size_t l) const { return {each[l].bias, each[l].end}; }
  const R *outputs(const Pass &pass) const;
};

template <class R> struct Weights {
  R *flat;
  std::vector<R *> turned;  // (out, in) of each layer but the first
  Weights(const Layers<R> &net, int64_t size, Memory<R> &memory) : flat(memory.take(size)) {
    for (const Layer &own : net.each) turned.push_back(own.is_narrow ? flat + own.weights : turned.empty() ? nullptr : memory.take(int64_t(own.po) * own.pi));
  }
  void turn(const Layers<R> &net, size_t l) {
    const Layer &own = net.each[l];
    if (!l || own.is_narrow) return;
    const R *w = flat + own.weights;
    for (int i = 0; i < own.in; i += LANES<R>)
      for (int j = 0; j < own.out; j += LANES<R>) transpose_tile<R>(w + i * own.po + j, own.po, turned[l] + j * own.pi + i, own.pi);
  }
};

template <class R> struct Pass {
  std::vector<R *> y, d, g;  // n rows of po: of each layer; g: the gradient by y
  R *probability;
  Pass(const Layers<R> &net, int n, Memory<R> &memory) : probability(memory.take(int64_t(n) * net.ld)) {
    for (const Layer &own : net.each)
      for (std::vector<R *> *kind : {&y, &d, &g}) kind->push_back(memory.take(int64_t(n) * own.po));
  }
};

template <class R> const R *Layers<R>::outputs(const Pass &pass) const { return pass.y.back(); }

template <int ACT> using Is = std::integral_constant<int, ACT>;

// What is done with every vector, made once for each activation, so that none of them asks for it.
template <class F> inline void by_act(int act, const F &f) {
  if (act == RELU) f(Is<RELU>{});
  else if (act == TANH) f(Is<TANH>{});
  else f(Is<LINEAR>{});
}

template <class R, int ACT> inline void activate(Is<ACT>, R *y) {
  if constexpr (ACT == RELU) store<R>(y, cut<R>(load(y), load(y)));
  if constexpr (ACT == TANH) store<R>(y, tanh_of<R>(load(y)));
}

// d = g through the activation that gave y; of outputs' derivatives, too.
template <class R, int ACT> inline Vec<R> through(Is<ACT>, Vec<R> g, const R *y) {
  if constexpr (ACT == RELU) return cut<R>(load(y), g);
  else if constexpr (ACT == TANH) return g * (1 - load(y) * load(y));
  else return g;
}

template <class R, int ACT> inline Vec<R> through_along(Is<ACT> act, Vec<R> gD, const R *g, const R *y, const R *yD) {
  const Vec<R> own = through<R>(act, gD, y);
  if constexpr (ACT == TANH) return own - 2 * load(y) * load(yD) * load(g);  // yD is (1 - y^2) times what it would be otherwise
  else return own;
}

template <class R> struct Set {
  const Layers<R> &net;
  int n;
  Targets<R> targets;
  const R *samples = nullptr;

  Set(const Layers<R> &net, int n, const Sizes &z, Memory<R> &) : net(net), n(n), targets{n, z.outputs, z.classes != 0} {}

  void take(const R *x, const void *y) { samples = x, targets.y = y; }

  const R *inputs(const Pass<R> &pass, size_t l) const { return l ? pass.y[l - 1] : samples; }
  int inputs_ld(size_t l) const { return l ? net.each[l].pi : net.each[l].in; }

  // Does `f` to each vector of n rows, told where it is and the activation.
  template <class F> void vectors(int ld, int act, const F &f) const {
    by_act(act, [&](auto act) {
      for (int64_t at = 0; at < int64_t(n) * ld; at += LANES<R>) f(at, act);
    });
  }

  // Loss, and its gradient by all parameters; `done` is told of each layer whose gradient is there.
  template <class F> R gradient(const Weights<R> &w, const Pass<R> &pass, R *gradient, const typename Layers<R>::Scratch &, const F &done) const {
    const size_t last = net.layers - 1;
    for (size_t l = 0; l <= last; l++) {
      const Layer &own = net.each[l];
      const R *x = inputs(pass, l), *bias = w.flat + own.bias, *weights = w.flat + own.weights;
      R *y = pass.y[l];
      if (own.is_narrow) {
        for (int i = 0; i < n; i++)
          for (int j = 0; j < own.out; j++) {
            Vec<R> sum{};
            for (int k = 0; k < own.pi; k += LANES<R>) sum += load(x + i * own.pi + k) * load(weights + j * own.pi + k);
            y[i * own.po + j] = total<R>(sum) + bias[j];
          }
      } else {
        const Factors<R> of[] = {{x, inputs_ld(l), 1, weights, own.po, own.in}};
        products(of, 1, n, own.po, bias, 0, y, own.po);
      }
      vectors(own.po, own.act, [&](int64_t at, auto act) { activate<R>(act, y + at); });
    }
    const R found = targets.loss(pass.y[last], net.ld, pass.g[last], pass.probability);
    const auto back = [&](size_t l) {  // from g to d
      const R *g = pass.g[l], *y = pass.y[l];
      R *d = pass.d[l];
      vectors(net.each[l].po, net.each[l].act, [&](int64_t at, auto act) { store<R>(d + at, through<R>(act, load(g + at), y + at)); });
    };
    back(last);
    for (size_t l = last + 1; l-- > 0;) {
      const Layer &own = net.each[l];
      const R *d = pass.d[l];
      if (l) {
        const Factors<R> of[] = {{d, own.po, 1, w.turned[l], own.pi, own.out}};
        products<R>(of, 1, n, own.pi, nullptr, 0, pass.g[l - 1], own.pi);
        back(l - 1);
      }
      add_rows(d, n, own.po, gradient + own.bias, true);
      const Factors<R> of[] = {weights_of(l, inputs(pass, l), d)};
      products<R>(of, 1, own.rows(), own.ld(), nullptr, 0, gradient + own.weights, own.ld());
      done(l);
    }
    return found;
  }

  // Whose product is the gradient by a layer's weights.
  Factors<R> weights_of(size_t l, const R *x, const R *d) const {
    const Layer &own = net.each[l];
    if (own.is_narrow) return {d, 1, own.po, x, own.pi, n};
    return {x, 1, inputs_ld(l), d, own.po, n};
  }

  // to += the Hessian of the loss at w, where `pass` is what `gradient` left, times v; `done` is told of each layer that
  // is there, and of whose part of v nothing is needed any more.
  template <class F>
  void hessian(const Weights<R> &w, const Pass<R> &pass, const Weights<R> &v, const Pass<R> &along, R *to, const typename Layers<R>::Scratch &, const F &done) const {
    const size_t last = net.layers - 1;
    for (size_t l = 0; l <= last; l++) {
      const Layer &own = net.each[l];
      const R *x = inputs(pass, l), *xD = l ? along.y[l - 1] : nullptr, *y = pass.y[l];
      const R *weights = w.flat + own.weights, *weightsD = v.flat + own.weights, *biasD = v.flat + own.bias;
      R *yD = along.y[l];
      if (own.is_narrow) {
        for (int i = 0; i < n; i++)
          for (int j = 0; j < own.out; j++) {
            Vec<R> sum{};
            for (int k = 0; k < own.pi; k += LANES<R>)
              sum += load(xD + i * own.pi + k) * load(weights + j * own.pi + k) + load(x + i * own.pi + k) * load(weightsD + j * own.pi + k);
            yD[i * own.po + j] = total<R>(sum) + biasD[j];
          }
      } else {
        const Factors<R> of[] = {{x, inputs_ld(l), 1, weightsD, own.po, own.in}, {xD, own.pi, 1, weights, own.po, own.in}};
        products(of, l ? 2 : 1, n, own.po, biasD, 0, yD, own.po);
      }
      vectors(own.po, own.act, [&](int64_t at, auto act) { store<R>(yD + at, through<R>(act, load(yD + at), y + at)); });
    }
    targets.loss_along(along.y[last], net.ld, pass.probability, along.g[last]);
    const auto back = [&](size_t l) {
      const R *g = pass.g[l], *y = pass.y[l], *yD = along.y[l], *gD = along.g[l];
      R *d = along.d[l];
      vectors(net.each[l].po, net.each[l].act, [&](int64_t at, auto act) { store<R>(d + at, through_along<R>(act, load(gD + at), g + at, y + at, yD + at)); });
    };
    back(last);
    for (size_t l = last + 1; l-- > 0;) {
      const Layer &own = net.each[l];
      const R *d = pass.d[l], *dD = along.d[l];
      if (l) {
        const Factors<R> of[] = {{dD, own.po, 1, w.turned[l], own.pi, own.out}, {d, own.po, 1, v.turned[l], own.pi, own.out}};
        products<R>(of, 2, n, own.pi, nullptr, 0, along.g[l - 1], own.pi);
        back(l - 1);
      }
      add_rows(dD, n, own.po, to + own.bias, false);
      const Factors<R> of[] = {weights_of(l, inputs(pass, l), dD), weights_of(l, l ? along.y[l - 1] : nullptr, d)};
      products<R>(of, l ? 2 : 1, own.rows(), own.ld(), to + own.weights, own.ld(), to + own.weights, own.ld());
      done(l);
    }
  }
};

}  // namespace

extern "C" {
EXPORT(Layers, float)
EXPORT(Layers, double)
}
