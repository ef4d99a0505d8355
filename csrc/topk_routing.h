// Top-k routing: the launchers of the kernels and their arguments. Without torch's headers, the kernels compile in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace mmfused {

constexpr int kMaxExperts = 512;
constexpr int kMaxChoices = 32;
constexpr int kThreads = 256;               // per block, at most
constexpr size_t kSharedBytes = 48 * 1024;  // per block; every GPU allows this without an opt-in

enum class Dtype { float32, float16, bfloat16 };
enum class Balance { switch_loss, gshard, mse };

// Arguments that the forward, the backward and the host functions share. T tokens, E experts, k choices, S segments.
struct Router {
  const void* logits;  // (T, E), any strides
  Dtype dtype;
  int64_t stride_t, stride_e;
  int64_t tokens;
  int experts, choices, segments;
  bool sigmoid, renormalize;
  Balance balance;
  const bool* mask;        // (T,), true: ignore the token; or null
  const int64_t* segment;  // (T,) or null
  const bool* available;   // (S, E) or null
  float jitter;            // 0: no jitter
  const int64_t* seed;     // () or null
};

struct Forward {
  const float* selection_bias;  // (E,) or null
  const int64_t* replay;        // (T, k) or null
  int64_t* indices;             // (T, k), not written if replay is given
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
  const float *d_weights, *d_balance, *d_z, *d_entropy;  // null: no gradient
  const int64_t* indices;                                // (T, k)
  const float *weights, *coefficients;                   // (T, k), (S*E + 1,)
  void* d_logits;                                        // (T, E), contiguous, dtype of the logits
};

// How the forward divides the tokens into blocks, and the sizes of the workspaces that its three kernels share. There are at most
// max_blocks blocks, so that the scan over the blocks stays short; larger inputs get more tokens per block.
struct Plan {
  int lanes;       // threads per token
  int threads;     // threads per block of route_kernel
  int64_t blocks;  // number of blocks of tokens
  int tokens_per_block;
  size_t shared;         // bytes of shared memory per block of route_kernel
  int cells;             // S*E
  int num_ints;          // integers per block: (S, E) assignments, (S, E) first choices (gshard only), (S,) tokens
  int num_floats;        // floats per block: (S, E) sums of probabilities (mse: of weights), sum of lse^2, sum of entropies
  int64_t ints, floats;  // elements of the two workspaces
};

Plan plan(int64_t tokens, int experts, int segments, Balance balance, int64_t max_blocks = 512);
// Return what the kernels expect of a shape that they do not support, or null if they support it.
const char* expected_shape(int64_t tokens, int64_t experts, int64_t choices, int64_t segments);
int tile_rows(int64_t rows, int experts);

cudaError_t forward(const Router&, const Forward&, const Plan&, int* ints, float* floats, cudaStream_t);
cudaError_t backward(const Router&, const Backward&, cudaStream_t);

// The kernels' arithmetic on the host, token by token, for tests. The logits are float32.
struct HostOutput {
  int64_t* indices;                                // (T, k)
  float *weights, *lse, *entropy, *probabilities;  // (T, k), (T,), (T,), (T, E)
};
void route_on_host(const Router&, const float* selection_bias, const int64_t* replay, const HostOutput&);
void gradient_on_host(const Router&, const Backward&);

}  // namespace mmfused
