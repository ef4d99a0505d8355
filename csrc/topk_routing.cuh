// Top-k routing, the arithmetic of one token: noise, scores, choices, weights, statistics and the gradient of its logits.
//
// A group of lanes holds the logits of a token: expert e is in slot e / lanes of lane e % lanes. On the device, a group is at most
// a warp. On the host, the group is Serial, a single lane, so that a loop over tokens runs the same code. Arithmetic is in float32.
#pragma once

#include <float.h>
#include <math.h>  // not <cmath>, which declares isnan and others in std only

#include <cstdint>

#include "topk_routing.h"

#if defined(__CUDACC__)
#define MMFUSED_BOTH __host__ __device__ __forceinline__
#else
#define MMFUSED_BOTH inline
#endif

namespace mmfused {

// ---- numbers -------------------------------------------------------------------------------------------------------------------

// Return a product that the compiler cannot fuse into an FMA: noise and logits must have the same bits on every backend.
MMFUSED_BOTH float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

// Return the first word of Philox4x32-10 at counter (row, column, 0, 0), converted to a float32 in [0, 1) as in Triton's tl.rand.
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

// Map a value to a key with the same order. -0 has the key of 0; NaN and -inf have the key of -FLT_MAX. All keys are above 1.
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

// LANES neighbouring lanes of a warp. All lanes of the warp must call a function together. Sums are added in a fixed order.
template <int LANES> struct Lanes {
  static constexpr int lanes = LANES;
#if defined(__CUDA_ARCH__)
  static MMFUSED_BOTH int lane() { return threadIdx.x % LANES; }
  template <typename T> static MMFUSED_BOTH T swapped(T x, int step) { return __shfl_xor_sync(0xffffffffu, x, step, LANES); }
  template <typename T> static MMFUSED_BOTH T from(T x, int source) { return __shfl_sync(0xffffffffu, x, source, LANES); }
#else  // for the compiler's host pass; never called
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

// Each lane holds SLOTS experts and CHOICES choices. Choice j is in slot j / lanes of lane j % lanes.
template <class Group, int SLOTS, int CHOICES> struct Token {
  const Router& r;
  int64_t t;
  int segment;
  bool masked;
  bool sound;  // false: the logits are NaN, because the segment or a replayed expert is out of range, or because of too few experts
  bool every;  // all experts count as available, because the segment is out of range or has fewer than k available experts
  float l[SLOTS];          // logit with noise; 0 if the token is masked, -inf if the expert is not available
  float u[SLOTS];          // log of the score, up to a constant
  float p[SLOTS];          // softmax of u
  float top, log_sum;      // maximum of u, and log of the sum of exp(u - top); log p = (u - top) - log_sum
  float inverse;           // 1 / (sum of exp(u - top))
  float top_l, inverse_l;  // maximum of l, and 1 / (sum of exp(l - top_l))
  float lse;               // logsumexp of l
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

  // Compute the scores of all experts. load(token, expert) returns a logit as float32. Any call of replay() must come first.
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
        l[s] = masked ? 0.0f : sound ? load(t, e) : NAN;  // logits of a masked token are not read: they may be NaN
        if (r.jitter != 0.0f) l[s] = rounded_product(l[s], noise(r.jitter, seed, t, e));
      }
      u[s] = r.sigmoid ? log_sigmoid(l[s]) : l[s];
    }
    float total = softmax(u, top);
    log_sum = logf(total);
    lse = top + log_sum;
    // If the logsumexp is infinite or NaN, all probabilities are NaN, as in PyTorch.
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

  // Return the sum of exp(x - largest); `store`: set p to the powers. An infinite maximum is replaced by 0, so that the sum is 0 or
  // infinity, not NaN.
  MMFUSED_BOTH float softmax(const float (&x)[SLOTS], float& largest, bool store = true) {
    largest = -INFINITY;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) largest = x[s] > largest ? x[s] : largest;
    largest = Group::largest(largest);
    if (isinf(largest)) largest = 0.0f;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const float power = expf(x[s] - largest);
      if (store) p[s] = power;
      total += power;
    }
    return Group::sum(total);
  }

  // Choose the k experts with the largest keys; the lower index wins a tie. The k experts differ; unavailable experts come last.
  MMFUSED_BOTH void choose(const float* selection_bias) {
    uint32_t key[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = expert_of(s);
      key[s] = e < r.experts;  // 1: not available, which is below every selection_key; 0: not an expert, or already chosen
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

  // Take the choices from `indices`. An index out of range is clamped, so that nothing is read out of bounds.
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
    if (r.renormalize) {  // softmax of u over the chosen experts; its denominator is at least 1, so it needs no epsilon
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

  // Overwrite l with the gradient of the token's logits. Weight j is in the slot of choice j. A null gradient counts as 0.
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

    // The gradient of a softmax sums to 0, but rounding leaves other sums if a probability is near 1: `rest` for the weights, and
    // `left` for p. Each sum is subtracted, in proportion to the weights or to p.
    float rest = 0.0f;
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) rest += weight[c] * (g[c] - product);
    rest = r.renormalize ? Group::sum(rest) : 0.0f;

    float du[SLOTS], inner = 0.0f;  // du is first the gradient of p
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = expert_of(s);
      du[s] = 0.0f;
      if (usable(e)) {
        if (!mse && b.d_balance != nullptr) du[s] = d_balance * row[e];
        // log p instead of log p + 1: subtracting `inner` removes constants.
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

  // Add each choice's value to the slot of its expert in `row`.
  MMFUSED_BOTH void scatter(const float (&value)[CHOICES], float (&row)[SLOTS]) const {
    for (int j = 0; j < r.choices; ++j) {
      const int e = choice(j, expert);
      const float x = choice(j, value);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) row[s] += expert_of(s) == e ? x : 0.0f;
    }
  }

  // Registers cannot be indexed by a variable, so the three functions below compare the index with every slot.
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
      const float value = row[s];  // outside the condition: otherwise the compiler puts the row into local memory
      found = e / Group::lanes == s ? value : found;
    }
    return Group::from(found, e % Group::lanes);
  }
};

}  // namespace mmfused
