// The meta-gradient of tasks by any network that knows its loss's gradient and Hessian: the inner loop there and back.
//
// A network `Net` has: `Real`; `Net(fields, eps, sizes)`; `sample`, elements of a sample; `layers`; `range(l)`, where a
// layer's parameters begin and end; `outputs(pass)` and `ld`, the outputs of a pass and how far apart they are; `Weights`
// with all parameters one after another, `flat`, and what `turn(net, l)` makes of a layer's; `Pass`, what a gradient leaves
// for the Hessian; `Scratch`; and `Set`, samples with `gradient` and `hessian`.
//
// Legend: R float or double; T tasks; P parameters as the network has them, E elements of the tensors that they come from.

#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "simd.h"

namespace {

template <class R> struct Memory {
  struct Free { void operator()(R *p) const { free(p); } };
  std::vector<std::unique_ptr<R, Free>> held;
  R *take(int64_t n) {
    const size_t bytes = (size_t(std::max<int64_t>(n, 1)) * sizeof(R) + 63) / 64 * 64;
    held.emplace_back(static_cast<R *>(aligned_alloc(64, bytes)));
    memset(static_cast<void *>(held.back().get()), 0, bytes);
    return held.back().get();
  }
};

struct Sizes {
  int64_t stages, parameters, tasks, support, query, steps, outputs, classes;  // classes: 0 where targets are real
  int64_t tensors, elements;
  int64_t groups;  // of tasks, whose sums are added up in their order, so that threads do not change the bits
};

template <class R> struct Targets {
  int n;
  int64_t outputs;
  bool is_classes;
  const void *y = nullptr;

  // The mean loss of outputs that are `ld` apart; its gradient is left in g.
  R loss(const R *out, int ld, R *g, R *probability) const {
    const int64_t *classes = static_cast<const int64_t *>(y);
    const R *targets = static_cast<const R *>(y);
    const R part = R(1) / (n * outputs);
    R all = 0;
    for (int i = 0; i < n; i++, out += ld, g += ld, probability += ld) {
      if (is_classes) {
        R most = out[0], sum = 0;
        for (int j = 1; j < outputs; j++) most = out[j] > most ? out[j] : most;
        for (int j = 0; j < outputs; j++) sum += probability[j] = std::exp(out[j] - most);
        all += std::log(sum) + most - out[classes[i]];
        for (int j = 0; j < outputs; j++) probability[j] /= sum, g[j] = (probability[j] - (j == classes[i])) / n;
      } else
        for (int j = 0; j < outputs; j++) {
          const R far = out[j] - targets[i * outputs + j];
          all += far * far, g[j] = 2 * part * far;
        }
    }
    return is_classes ? all / n : all * part;
  }

  void loss_along(const R *outD, int ld, const R *probability, R *gD) const {
    const R part = R(1) / (n * outputs);
    for (int i = 0; i < n; i++, outD += ld, gD += ld, probability += ld) {
      R mean = 0;
      for (int j = 0; is_classes && j < outputs; j++) mean += probability[j] * outD[j];
      for (int j = 0; j < outputs; j++) gD[j] = is_classes ? probability[j] * (outD[j] - mean) / n : 2 * part * outD[j];
    }
  }
};

template <class Net, class R = typename Net::Real> struct Worker {
  Memory<R> memory;
  typename Net::Set support, query;
  std::vector<typename Net::Weights> at;  // before each step, and at the end
  std::vector<typename Net::Pass> passes;
  typename Net::Pass last, along;
  typename Net::Weights direction;
  typename Net::Scratch scratch;
  std::vector<R *> gradients;
  R *adjoint;

  Worker(const Net &net, const Sizes &z)
      : support(net, z.support, z, memory), query(net, z.query, z, memory), last(net, z.query, memory), along(net, z.support, memory),
        direction(net, z.parameters, memory), scratch(net, memory), adjoint(memory.take(z.parameters)) {
    for (int k = 0; k <= z.steps; k++) at.emplace_back(net, z.parameters, memory);
    for (int k = 0; k < z.steps; k++) passes.emplace_back(net, z.support, memory), gradients.push_back(memory.take(z.parameters));
  }
};

template <class Net, class R = typename Net::Real> struct Engine {
  Sizes z;
  Net net;
  std::vector<int32_t> index, places;  // of P among E, a zero and a one; of E among P
  std::vector<int64_t> counts;         // elements of each tensor
  std::vector<std::unique_ptr<Worker<Net>>> workers;
  Memory<R> memory;
  std::vector<R *> sums, rate_sums;
  R *elements, *weights, *rates;

  Engine(const Sizes &z, const int64_t *fields, const double *eps, const int64_t *index, const int64_t *places, const int64_t *counts)
      : z(z), net(fields, eps, z), index(index, index + z.parameters), places(places, places + z.elements), counts(counts, counts + z.tensors),
        elements(memory.take(z.elements + 2)), weights(memory.take(z.parameters)), rates(memory.take(z.parameters * z.steps)) {
    for (int group = 0; group < std::min(z.tasks, z.groups); group++)
      sums.push_back(memory.take(z.parameters)), rate_sums.push_back(nullptr);
  }

  struct Call {
    bool second_order;
    const R *support_x, *query_x;
    const char *support_y, *query_y;
    bool with_rates;
    R *losses, *outputs;
  };

  template <class F> void over(size_t l, const F &f) const {  // each vector of a layer's parameters
    for (auto [j, end] = net.range(l); j < end; j += LANES<R>) f(j);
  }

  void task(Worker<Net> &own, const Call &c, int t, R *sum, R *rate_sum) const {
    const int64_t P = z.parameters, target = z.classes ? 8 : sizeof(R) * z.outputs;
    own.support.take(c.support_x + t * z.support * net.sample, c.support_y + t * z.support * target);
    own.query.take(c.query_x + t * z.query * net.sample, c.query_y + t * z.query * target);
    // What follows of a layer's gradient is made at once, while it is in a cache. Where nobody asks for it again, the next
    // weights take its place.
    for (int k = 0; k < z.steps; k++) {
      const R *w = own.at[k].flat, *rate = rates + k * P;
      R *next = own.at[k + 1].flat, *g = rate_sum ? own.gradients[k] : next;
      own.support.gradient(own.at[k], own.passes[k], g, own.scratch, [&](size_t l) {
        over(l, [&](int64_t j) { store<R>(next + j, load(w + j) - load(rate + j) * load(g + j)); });
        own.at[k + 1].turn(net, l);
      });
    }
    R *a = own.adjoint, *u = own.direction.flat;
    const auto by_rates = [&](size_t l, int k) {
      const R *g = own.gradients[k];
      for (auto [j, end] = net.range(l); rate_sum && j < end; j++) rate_sum[k * P + j] -= a[j] * g[j];
    };
    const auto before = [&](size_t l, int k) {  // the adjoint of the weights after step k is there
      if (k >= 0 && c.second_order) {
        by_rates(l, k);
        const R *rate = rates + k * P;
        over(l, [&](int64_t j) { store<R>(u + j, -load(rate + j) * load(a + j)); });
        own.direction.turn(net, l);
        return;
      }
      for (; k >= 0; k--) by_rates(l, k);
      over(l, [&](int64_t j) { add<R>(sum + j, load(a + j)); });
    };
    c.losses[t] = own.query.gradient(own.at[z.steps], own.last, a, own.scratch, [&](size_t l) { before(l, z.steps - 1); });
    const R *out = net.outputs(own.last);
    for (int i = 0; i < z.query; i++) memcpy(c.outputs + (t * z.query + i) * z.outputs, out + i * net.ld, sizeof(R) * z.outputs);
    for (int k = z.steps; c.second_order && k-- > 0;)
      own.support.hessian(own.at[k], own.passes[k], own.direction, own.along, a, own.scratch, [&](size_t l) { before(l, k - 1); });
  }

  void run(const Call &c, int threads) {
    const int groups = sums.size();
    threads = std::max(1, std::min(threads, groups));
    while (int(workers.size()) < threads) workers.push_back(std::make_unique<Worker<Net>>(net, z));
    for (int k = 0; c.with_rates && k < groups; k++)
      if (!rate_sums[k]) rate_sums[k] = memory.take(z.parameters * z.steps);
    std::atomic<int> next{0};
    const auto work = [&](int number) {
      Worker<Net> &own = *workers[number];
      memcpy(own.at[0].flat, weights, sizeof(R) * z.parameters);
      for (size_t l = 0; l < net.layers; l++) own.at[0].turn(net, l);
      for (int group; (group = next++) < groups;) {
        memset(sums[group], 0, sizeof(R) * z.parameters);
        R *rate_sum = c.with_rates ? rate_sums[group] : nullptr;
        if (rate_sum) memset(rate_sum, 0, sizeof(R) * z.parameters * z.steps);
        for (int t = group * z.tasks / groups; t < (group + 1) * z.tasks / groups; t++) task(own, c, t, sums[group], rate_sum);
      }
    };
    std::vector<std::thread> others;
    for (int number = 1; number < threads; number++) others.emplace_back(work, number);
    work(0);
    for (std::thread &other : others) other.join();
    const auto add_up = [&](const std::vector<R *> &parts, int64_t size) {  // into the first
      for (int k = 1; k < groups; k++)
        for (int64_t j = 0; j < size; j++) parts[0][j] += parts[k][j];
    };
    add_up(sums, z.parameters);
    if (c.with_rates) add_up(rate_sums, z.parameters * z.steps);
  }

  // Sums over the tasks as means, of so many elements that parameters come from.
  void mean(const R *sum, int64_t first, int64_t count, R *to) const {
    const R part = R(1) / z.tasks;
    for (int64_t e = 0; e < count; e++) to[e] = part * sum[places[first + e]];
  }

  // in: rates (I, E) or null where they are as before, support_x, query_x, support_y, query_y, the tensors; out: the mean
  // loss, its gradient by the rates (I, E) or null, losses (T), outputs (T, Q, N), the gradients by the tensors.
  void call(int threads, bool second_order, const void *const *in, void *const *out) {
    const auto real = [&](int k) { return static_cast<const R *>(in[k]); };
    const auto to = [&](int k) { return static_cast<R *>(out[k]); };
    const int64_t P = z.parameters, E = z.elements;
    int64_t at = 0;
    for (int64_t tensor = 0; tensor < z.tensors; at += counts[tensor++]) memcpy(elements + at, in[5 + tensor], sizeof(R) * counts[tensor]);
    elements[E] = 0, elements[E + 1] = 1;
    for (int64_t j = 0; j < P; j++) weights[j] = elements[index[j]];
    for (int64_t k = 0; in[0] && k < z.steps; k++)
      for (int64_t j = 0; j < P; j++) rates[k * P + j] = index[j] < E ? real(0)[k * E + index[j]] : 0;
    run({second_order, real(1), real(2), static_cast<const char *>(in[3]), static_cast<const char *>(in[4]), out[1] != nullptr, to(2), to(3)}, threads);
    R loss = 0;
    for (int64_t t = 0; t < z.tasks; t++) loss += to(2)[t];
    *to(0) = loss / z.tasks;
    at = 0;
    for (int64_t tensor = 0; tensor < z.tensors; at += counts[tensor++]) mean(sums[0], at, counts[tensor], to(4 + tensor));
    for (int64_t k = 0; out[1] && k < z.steps; k++) mean(rate_sums[0] + k * P, 0, E, to(1) + k * E);
  }
};

template <class Net>
void *made(const int64_t *sizes, const int64_t *fields, const double *eps, const int64_t *index, const int64_t *places, const int64_t *counts) {
  Sizes z;
  memcpy(&z, sizes, sizeof z);
  return new Engine<Net>(z, fields, eps, index, places, counts);
}

}  // namespace

#define EXPORT(NET, REAL)                                                                                                       \
  void *make_##REAL(const int64_t *sizes, const int64_t *fields, const double *eps, const int64_t *index, const int64_t *places, \
                    const int64_t *counts) {                                                                                    \
    return made<NET<REAL>>(sizes, fields, eps, index, places, counts);                                                          \
  }                                                                                                                             \
  void run_##REAL(void *e, int threads, int second, const void *const *in, void *const *out) {                                  \
    static_cast<Engine<NET<REAL>> *>(e)->call(threads, second != 0, in, out);                                                   \
  }                                                                                                                             \
  void free_##REAL(void *e) { delete static_cast<Engine<NET<REAL>> *>(e); }
