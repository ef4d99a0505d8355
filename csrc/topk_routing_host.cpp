// Host functions of top-k routing: the plan of a call and, for tests, the arithmetic of topk_routing.cuh in a loop over tokens.
#include "topk_routing.cuh"

namespace mmfused {

const char* expected_shape(int64_t tokens, int64_t experts, int64_t choices, int64_t segments) {
  if (experts < 1 || experts > kMaxExperts) return "1 to 512 experts";
  if (choices < 1 || choices > kMaxChoices || choices > experts) return "k from 1 to 32 and at most the number of experts";
  if (tokens > (INT32_MAX - kThreads) / choices) return "fewer than 2^31 assignments";
  if (segments < 1 || segments > int64_t(kSharedBytes) / experts) return "fewer segments or experts";
  if (plan(tokens, int(experts), int(segments), Balance::gshard).shared > kSharedBytes) return "fewer segments or experts";
  return nullptr;
}

int tile_rows(int64_t rows, int experts) {
  int height = 128;
  while (height > 16 && rows < int64_t(height) * experts) height /= 2;
  return height;
}

Plan plan(int64_t tokens, int experts, int segments, Balance balance, int64_t max_blocks) {
  Plan p{};
  p.lanes = experts <= 8 ? 8 : experts <= 16 ? 16 : 32;
  p.cells = segments * experts;
  p.num_ints = p.cells * (balance == Balance::gshard ? 2 : 1) + segments;
  p.num_floats = p.cells + 2;
  p.threads = kThreads;
  const auto bytes = [&] { return (size_t(p.num_ints) + size_t(p.threads / p.lanes) * p.num_floats) * 4; };
  while (p.threads > 32 && bytes() > kSharedBytes) p.threads /= 2;  // each group has its own sums
  p.shared = bytes();
  const int groups = p.threads / p.lanes;
  const int64_t rounds = (tokens + max_blocks * groups - 1) / (max_blocks * groups);
  p.tokens_per_block = int((rounds > 0 ? rounds : 1) * groups);
  p.blocks = (tokens + p.tokens_per_block - 1) / p.tokens_per_block;
  p.ints = p.blocks * (p.num_ints + experts + 1) + p.num_ints;
  p.floats = (p.blocks + 1) * p.num_floats;
  return p;
}

namespace {

using HostToken = Token<Serial, kMaxExperts, kMaxChoices>;

struct HostLoad {
  const Router& r;
  float operator()(int64_t t, int e) const { return static_cast<const float*>(r.logits)[t * r.stride_t + e * r.stride_e]; }
};

}  // namespace

void route_on_host(const Router& r, const float* selection_bias, const int64_t* replay, const HostOutput& out) {
  for (int64_t t = 0; t < r.tokens; ++t) {
    HostToken token(r, t);
    if (replay != nullptr) token.replay(replay);
    token.score(HostLoad{r});
    if (replay == nullptr) token.choose(selection_bias);
    float weight[kMaxChoices];
    token.weigh(weight);
    for (int j = 0; j < r.choices; ++j) {
      out.indices[t * r.choices + j] = token.expert[j];
      out.weights[t * r.choices + j] = weight[j];
    }
    for (int e = 0; e < r.experts; ++e) out.probabilities[t * r.experts + e] = token.p[e];
    out.lse[t] = token.lse;
    out.entropy[t] = token.entropy();
  }
}

void gradient_on_host(const Router& r, const Backward& b) {
  for (int64_t t = 0; t < r.tokens; ++t) {
    HostToken token(r, t);
    token.replay(b.indices);
    token.score(HostLoad{r});
    float weight[kMaxChoices] = {};
    for (int j = 0; j < r.choices; ++j) weight[j] = b.weights[t * r.choices + j];
    token.gradient(b, weight);
    for (int e = 0; e < r.experts; ++e) static_cast<float*>(b.d_logits)[t * r.experts + e] = token.l[e];
  }
}

}  // namespace mmfused
