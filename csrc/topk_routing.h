// Top-k routing: what the launchers take. Raw pointers and a stream, nothing of torch, so that the kernels compile in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace mmfused {

constexpr int kMaxExperts = 512;
constexpr int kMaxChoices = 32;
constexpr int kThreads = 256;               // of a block, at most
constexpr size_t kSharedBytes = 48 * 1024;  // of a block: what every card grants without asking

enum class Dtype { float32, float16, bfloat16 };
enum class Balance { switch_loss, gshard, mse };

// What forward, backward and the host loop know of a call. T tokens, E experts, k choices, S segments.
struct Router {
  const void* logits;  // (T, E) of any strides
  Dtype dtype;
  int64_t stride_t, stride_e;
  int64_t tokens;
  int experts, choices, segments;
  bool sigmoid, renormalize;
  Balance balance;
  const bool* mask;        // (T,) true = ignore, or null
  const int64_t* segment;  // (T,) or null
  const bool* available;   // (S, E) or null
  float jitter;            // 0 = none
  const int64_t* seed;     // () or null
};

struct Forward {
  const float* selection_bias;  // (E,) or null
  const int64_t* replay;        // (T, k) or null
  int64_t* indices;             // (T, k), unused on replay
  float* weights;               // (T, k)
  int64_t* counts;              // (S, E)
  float* losses;                // (3,) balance, z, entropy
  int* order;                   // (T*k,)
  int* position;                // (T*k,)
  int* offsets;                 // (E + 1,)
  int* tiles;                   // (num_tiles, 2)
  float* coefficients;          // (S*E + 1,)
  int num_tiles, tile_rows;
};

struct Backward {
  const float *d_weights, *d_balance, *d_z, *d_entropy;  // null = no gradient
  const int64_t* indices;                                // (T, k)
  const float *weights, *coefficients;                   // (T, k), (S*E + 1,)
  void* d_logits;                                        // (T, E) contiguous, of the logits' dtype
};

// How the tokens of a forward pass are cut into blocks, and the memory between its three launches. A pure function of the shape.
// More than max_blocks make the blocks longer: the scan over them stays short, and so many fill any card.
struct Plan {
  int lanes;       // of a token
  int threads;     // a block of the first launch
  int64_t blocks;  // of tokens
  int tokens_per_block;
  size_t shared;         // bytes, first launch
  int cells;             // S*E
  int num_ints;          // a block's counts: (S, E) assignments, (S, E) first choices where the loss asks, (S,) tokens
  int num_floats;        // a block's sums: (S, E) of P or w, of lse^2, of the entropy
  int64_t ints, floats;  // elements of the two workspaces
};

Plan plan(int64_t tokens, int experts, int segments, Balance balance, int64_t max_blocks = 512);
// Why the kernels refuse a shape, or null.
const char* why_not(int64_t tokens, int64_t experts, int64_t choices, int64_t segments);
int tile_rows(int64_t rows, int experts);

cudaError_t forward(const Router&, const Forward&, const Plan&, int* ints, float* floats, cudaStream_t);
cudaError_t backward(const Router&, const Backward&, cudaStream_t);

// The same arithmetic token by token on the host, for tests: float32 logits, contiguous or not, any number of tokens.
struct HostOutput {
  int64_t* indices;                                // (T, k)
  float *weights, *lse, *entropy, *probabilities;  // (T, k), (T,), (T,), (T, E)
};
void route_on_host(const Router&, const float* selection_bias, const int64_t* replay, const HostOutput&);
void gradient_on_host(const Router&, const Backward&);

}  // namespace mmfused
