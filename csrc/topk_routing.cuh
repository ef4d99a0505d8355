// Top-k routing, the arithmetic of one token: noise, score, choice, weights, statistics, gradient row.
//
// A group of lanes holds the row of logits, expert e in slot e / lanes of lane e % lanes. A group is part of a warp on the device,
// or Serial: one lane that holds everything, so that a loop on the host runs the very same lines. All of it in float32.
#pragma once

#include <float.h>
#include <math.h>  // not cmath: isnan and the like without std::

#include <cstdint>

#include "topk_routing.h"

#if defined(__CUDACC__)
#define MMFUSED_BOTH __host__ __device__ __forceinline__
#else
#define MMFUSED_BOTH inline
#endif
#if defined(__CUDA_ARCH__) || defined(MMFUSED_SIMT)  // the second: tests run the kernels on a CPU
#define MMFUSED_ON_DEVICE 1
#else
#define MMFUSED_ON_DEVICE 0
#endif

namespace mmfused {

// ---- numbers -------------------------------------------------------------------------------------------------------------------

// A product that no compiler may fuse into a sum: noise and logits must be the same bits wherever they are computed.
MMFUSED_BOTH float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

// The first word of Philox4x32-10 at counter (row, column, 0, 0), as a float32 in [0, 1) the way Triton's tl.rand makes it.
MMFUSED_BOTH float uniform(uint64_t seed, uint32_t row, uint32_t column) {
  uint32_t c0 = row, c1 = column, c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int32_t word = int32_t(c0);
  return rounded_product(float(word < 0 ? ~word : word), 4.6566127342e-10f);
}

MMFUSED_BOTH float noise(float jitter, uint64_t seed, int64_t token, int expert) {
  return 1.0f + rounded_product(jitter, 2.0f * uniform(seed, uint32_t(token), uint32_t(expert)) - 1.0f);
}

// Larger values have larger keys. Minus zero ties with zero, NaN and minus infinity with the least number; all are above 1.
MMFUSED_BOTH uint32_t selection_key(float value) {
  value = value == 0.0f ? 0.0f : value >= -FLT_MAX ? value : -FLT_MAX;
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(value);
#else
  __builtin_memcpy(&bits, &value, sizeof bits);
#endif
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

MMFUSED_BOTH float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
MMFUSED_BOTH float log_sigmoid(float x) { return (x > 0.0f ? 0.0f : x) - log1pf(expf(-fabsf(x))); }

// ---- groups of lanes -----------------------------------------------------------------------------------------------------------

struct Serial {
  static constexpr int lanes = 1;
  static MMFUSED_BOTH int lane() { return 0; }
  template <typename T> static MMFUSED_BOTH T largest(T x) { return x; }
  static MMFUSED_BOTH float sum(float x) { return x; }
  template <typename T> static MMFUSED_BOTH T from(T x, int) { return x; }
};

// LANES neighbours of a warp. Every lane of the warp must call together. The order of a sum is that of a tree: always the same.
template <int LANES> struct Lanes {
  static constexpr int lanes = LANES;
#if MMFUSED_ON_DEVICE
  static MMFUSED_BOTH int lane() { return threadIdx.x % LANES; }
  template <typename T> static MMFUSED_BOTH T swapped(T x, int step) { return __shfl_xor_sync(0xffffffffu, x, step, LANES); }
  template <typename T> static MMFUSED_BOTH T from(T x, int source) { return __shfl_sync(0xffffffffu, x, source, LANES); }
#else  // never run: the compiler's host pass wants to see bodies
  static MMFUSED_BOTH int lane() { return 0; }
  template <typename T> static MMFUSED_BOTH T swapped(T x, int) { return x; }
  template <typename T> static MMFUSED_BOTH T from(T x, int) { return x; }
#endif
  template <typename T> static MMFUSED_BOTH T largest(T x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
      const T other = swapped(x, step);
      x = other > x ? other : x;
    }
    return x;
  }
  static MMFUSED_BOTH float sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += swapped(x, step);
    return x;
  }
};

// ---- one token -----------------------------------------------------------------------------------------------------------------

// SLOTS experts and CHOICES choices a lane; choice j lies in slot j / lanes of lane j % lanes.
template <class Group, int SLOTS, int CHOICES> struct Token {
  const Router& r;
  int64_t t;
  int segment;
  bool masked;
  bool sound;  // its segment and the choice it replays exist, and its segment has enough experts; else its logits are NaN
  bool every;  // of a segment that does not exist or has too few experts all may be chosen: k different ones, as always
  float l[SLOTS];          // the logit with its noise; 0 for a masked token, -inf for what cannot be chosen
  float u[SLOTS];          // the logarithm of the score, up to a constant
  float p[SLOTS];          // softmax of u
  float top, log_sum;      // of u: log p = (u - top) - log_sum
  float inverse;           // of the sum behind log_sum
  float top_l, inverse_l;  // of l, as top and inverse are of u
  float lse;               // of l
  int expert[CHOICES];

  MMFUSED_BOTH Token(const Router& router, int64_t token) : r(router), t(token) {
    masked = r.mask != nullptr && r.mask[t];
    sound = true;
    segment = 0;
    if (r.segment != nullptr) {
      const int64_t s = r.segment[t];
      segment = int(s < 0 ? 0 : s >= r.segments ? r.segments - 1 : s);
      sound = s == segment;
    }
    every = !sound;
  }

  static MMFUSED_BOTH int expert_of(int slot) { return slot * Group::lanes + Group::lane(); }
  MMFUSED_BOTH bool usable(int e) const {
    return e < r.experts && (every || r.available == nullptr || r.available[segment * r.experts + e]);
  }

  // Load is a function of (token, expert): the logits' dtype is its business. A choice that is replayed comes before.
  template <class Load> MMFUSED_BOTH void score(Load load) {
    const uint64_t seed = r.jitter != 0.0f ? uint64_t(*r.seed) : 0;
    if (r.available != nullptr) {
      float there = 0.0f;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) there += usable(expert_of(s)) ? 1.0f : 0.0f;
      const bool few = Group::sum(there) < float(r.choices);
      every = every || few;
      sound = sound && !few;
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = expert_of(s);
      l[s] = -INFINITY;
      if (usable(e)) {
        l[s] = masked ? 0.0f : sound ? load(t, e) : NAN;  // a masked row may hold NaN
        if (r.jitter != 0.0f) l[s] = rounded_product(l[s], noise(r.jitter, seed, t, e));
      }
      u[s] = r.sigmoid ? log_sigmoid(l[s]) : l[s];
    }
    float total = softmax(u, top);
    log_sum = logf(total);
    lse = top + log_sum;
    // An infinite or NaN score leaves no distribution, neither here nor in PyTorch.
    inverse = isfinite(lse) ? 1.0f / total : NAN;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) p[s] *= inverse;
    top_l = top;
    inverse_l = inverse;
    if (r.sigmoid) {
      total = softmax(l, top_l, false);
      inverse_l = 1.0f / total;
      lse = top_l + logf(total);
    }
  }

  MMFUSED_BOTH float score_of(float log_score) const { return r.sigmoid ? expf(log_score) : expf(log_score - top) * inverse; }

  // p = exp(x - largest) and its sum. The largest of nothing but infinities counts as 0, so that the sum is 0 or infinity, not NaN.
  MMFUSED_BOTH float softmax(const float (&x)[SLOTS], float& largest, bool keep = true) {
    largest = -INFINITY;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) largest = x[s] > largest ? x[s] : largest;
    largest = Group::largest(largest);
    if (isinf(largest)) largest = 0.0f;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const float power = expf(x[s] - largest);
      if (keep) p[s] = power;
      total += power;
    }
    return Group::sum(total);
  }

  // The k largest keys, one after the other, ties to the lower expert. Always k different ones; what cannot be chosen comes last.
  MMFUSED_BOTH void choose(const float* selection_bias) {
    uint32_t key[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = expert_of(s);
      key[s] = e < r.experts;  // 1: below every value; 0: taken, or no expert at all
      if (usable(e)) key[s] = selection_key(selection_bias == nullptr ? l[s] : score_of(u[s]) + selection_bias[e]);
    }
    for (int j = 0; j < r.choices; ++j) {
      uint32_t best = 0;
      int slot = 0;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        slot = key[s] > best ? s : slot;
        best = key[s] > best ? key[s] : best;
      }
      const int e = int(~uint32_t(Group::largest(uint64_t(best) << 32 | uint32_t(~expert_of(slot)))));
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) key[s] = expert_of(s) == e ? 0 : key[s];
      keep(j, expert, e);
    }
  }

  // The choice as given. In place of an expert that does not exist another is kept, so that nothing is read out of bounds.
  MMFUSED_BOTH void replay(const int64_t* indices) {
    for (int j = 0; j < r.choices; ++j) {
      const int64_t e = indices[t * r.choices + j];
      sound = sound && e >= 0 && e < r.experts;
      keep(j, expert, int(e < 0 ? 0 : e >= r.experts ? r.experts - 1 : e));
    }
  }

  MMFUSED_BOTH void weigh(float (&weight)[CHOICES]) {
    float log_score[CHOICES], value[CHOICES];
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) log_score[c] = -INFINITY;
    for (int j = 0; j < r.choices; ++j) keep(j, log_score, of_expert(choice(j, expert), u));
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) value[c] = score_of(log_score[c]);
    if (r.renormalize) {  // softmax of u over the chosen: no epsilon, and no score that underflowed
      float largest = -INFINITY, total = 0.0f;
#pragma unroll
      for (int c = 0; c < CHOICES; ++c) largest = log_score[c] > largest ? log_score[c] : largest;
      largest = Group::largest(largest);
#pragma unroll
      for (int c = 0; c < CHOICES; ++c) {
        value[c] = c * Group::lanes + Group::lane() < r.choices ? expf(log_score[c] - largest) : 0.0f;
        total += value[c];
      }
      total = Group::sum(total);
#pragma unroll
      for (int c = 0; c < CHOICES; ++c) value[c] /= total;
    }
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) weight[c] = masked ? 0.0f : isnan(log_sum) ? NAN : value[c];
  }

  MMFUSED_BOTH float entropy() const {
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) total -= p[s] == 0.0f ? 0.0f : p[s] * (u[s] - top - log_sum);
    return Group::sum(total);
  }

  // d l of this token into l. w and its gradient lie as the choices do; what an absent gradient would add is skipped.
  MMFUSED_BOTH void gradient(const Backward& b, const float (&weight)[CHOICES]) {
    const bool mse = r.balance == Balance::mse;
    const float* row = b.coefficients + int64_t(segment) * r.experts;
    const float d_balance = b.d_balance != nullptr ? *b.d_balance : 0.0f;
    const float inverse_n = b.coefficients[int64_t(r.segments) * r.experts];
    const float d_entropy = b.d_entropy != nullptr ? *b.d_entropy * inverse_n : 0.0f;
    const float d_z = b.d_z != nullptr ? *b.d_z * inverse_n : 0.0f;

    float g[CHOICES], product = 0.0f;
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) {
      const int j = c * Group::lanes + Group::lane();
      g[c] = 0.0f;
      if (j < r.choices) {
        if (b.d_weights != nullptr) g[c] = b.d_weights[t * r.choices + j];
        if (mse && b.d_balance != nullptr) g[c] += d_balance * row[expert[c]];
        product += weight[c] * g[c];
      }
    }
    product = r.renormalize ? Group::sum(product) : 0.0f;

    // The gradient of a softmax sums to 0: what rounding leaves instead, of 1 - P near 1, is taken off here and below.
    float rest = 0.0f;
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) rest += weight[c] * (g[c] - product);
    rest = r.renormalize ? Group::sum(rest) : 0.0f;

    float du[SLOTS], inner = 0.0f;  // du holds gP first
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = expert_of(s);
      du[s] = 0.0f;
      if (usable(e)) {
        if (!mse && b.d_balance != nullptr) du[s] = d_balance * row[e];
        // log P, not log P + 1: what is the same for all experts, the inner product takes away.
        if (b.d_entropy != nullptr && p[s] != 0.0f) du[s] -= d_entropy * (u[s] - top - log_sum);
      }
    }
    if (!r.renormalize && !r.sigmoid) scatter(g, du);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) inner += du[s] * p[s];
    inner = Group::sum(inner);
    float left = 0.0f;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) left += du[s] = p[s] * (du[s] - inner);
    left = Group::sum(left);
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) du[s] -= p[s] * left;
    if (r.renormalize || r.sigmoid) {
#pragma unroll
      for (int c = 0; c < CHOICES; ++c) g[c] = weight[c] * (g[c] - product - rest);
      scatter(g, du);
    }

    const uint64_t seed = r.jitter != 0.0f ? uint64_t(*r.seed) : 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = expert_of(s);
      float dl = r.sigmoid ? du[s] * sigmoid(-l[s]) : du[s];
      if (b.d_z != nullptr) dl += 2.0f * d_z * lse * (r.sigmoid ? expf(l[s] - top_l) * inverse_l : p[s]);
      if (r.jitter != 0.0f) dl *= noise(r.jitter, seed, t, e);
      l[s] = masked || !usable(e) ? 0.0f : dl;
    }
  }

  // What lies with the choices, added up where the experts lie, choice by choice.
  MMFUSED_BOTH void scatter(const float (&value)[CHOICES], float (&row)[SLOTS]) const {
    for (int j = 0; j < r.choices; ++j) {
      const int e = choice(j, expert);
      const float x = choice(j, value);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) row[s] += expert_of(s) == e ? x : 0.0f;
    }
  }

  // Registers have no address: a slot that is known at run time only is found by looking at all.
  template <typename T> static MMFUSED_BOTH void keep(int j, T (&list)[CHOICES], T value) {
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) list[c] = c * Group::lanes + Group::lane() == j ? value : list[c];
  }
  template <typename T> static MMFUSED_BOTH T choice(int j, const T (&list)[CHOICES]) {
    T found = list[0];
#pragma unroll
    for (int c = 1; c < CHOICES; ++c) found = j / Group::lanes == c ? list[c] : found;
    return Group::from(found, j % Group::lanes);
  }
  static MMFUSED_BOTH float of_expert(int e, const float (&row)[SLOTS]) {
    float found = row[0];
#pragma unroll
    for (int s = 1; s < SLOTS; ++s) {
      const float value = row[s];  // first of all: a choice of loads becomes one of addresses, and the row goes to memory
      found = e / Group::lanes == s ? value : found;
    }
    return Group::from(found, e % Group::lanes);
  }
};

}  // namespace mmfused
