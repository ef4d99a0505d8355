// Top-k routing in three kernels, and its gradient in one.
//
//   route    a group of lanes routes a token and writes its indices and weights; each block writes partial counts and sums
//   scan     computes totals over the blocks, and where each block's assignments begin among the assignments of an expert
//   finish   blocks rank their assignments and write order, position and tiles; the last block writes offsets, losses, coefficients
//
// Each block owns consecutive tokens, so the order is stable. Integers are counted in any order, but floats are added in a fixed
// order, so two runs give the same bits. Addresses of rows are computed with 64-bit integers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "topk_routing.cuh"

namespace mmfused {
namespace {

constexpr int kBackwardThreads = 128;
constexpr int kScanRows = 16;  // warps per block of scan_kernel; each warp adds up one piece of the blocks, for 32 columns

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

template <typename T> struct Load {
  const T* logits;
  int64_t stride_t, stride_e;
  __device__ float operator()(int64_t t, int e) const { return widen(logits[t * stride_t + e * stride_e]); }
};

__device__ inline int bin_of(const Router& r, const int64_t* indices, int assignment) {
  if (r.mask != nullptr && r.mask[assignment / r.choices]) return r.experts;  // masked tokens have the last bin
  const int64_t e = indices[assignment];
  return int(e < 0 ? 0 : e >= r.experts ? r.experts - 1 : e);
}

// ---- route ---------------------------------------------------------------------------------------------------------------------

template <typename T, int LANES, int SLOTS>
__global__ void __launch_bounds__(kThreads, SLOTS > 8   ? 1
                                            : SLOTS > 4 ? 2
                                                        : 4) route_kernel(Router r, Forward f, Plan p, int* ints, float* floats) {
  extern __shared__ int shared[];
  using Group = Lanes<LANES>;
  const int groups = blockDim.x / LANES, group = threadIdx.x / LANES, lane = Group::lane();
  const bool gshard = r.balance == Balance::gshard;
  int* const counts = shared;
  int* const firsts = counts + p.cells;
  int* const members = counts + (gshard ? 2 : 1) * p.cells;
  float* const every_sums = reinterpret_cast<float*>(shared + p.num_ints);
  float* const sums = every_sums + group * p.num_floats;  // no other group adds to these
  for (int i = threadIdx.x; i < p.num_ints + groups * p.num_floats; i += blockDim.x) shared[i] = 0;  // sets the floats to 0 too
  __syncthreads();

  const Load<T> load{static_cast<const T*>(r.logits), r.stride_t, r.stride_e};
  const int64_t first = blockIdx.x * int64_t(p.tokens_per_block);
  float squares = 0.0f, entropies = 0.0f;
  for (int i = group; i < p.tokens_per_block; i += groups) {
    // Groups past the end repeat the last token and write nothing, because shuffles need all lanes of the warp.
    const bool exists = first + i < r.tokens;
    const int64_t t = exists ? first + i : r.tokens - 1;
    Token<Group, SLOTS, 1> token(r, t);
    if (f.replay != nullptr) token.replay(f.replay);
    token.score(load);
    if (f.replay == nullptr) token.choose(f.selection_bias);
    float weight[1];
    token.weigh(weight);
    const float entropy = token.entropy();
    if (exists && lane < r.choices) {
      if (f.replay == nullptr) f.indices[t * r.choices + lane] = token.expert[0];
      f.weights[t * r.choices + lane] = weight[0];
    }
    if (r.balance == Balance::mse) {  // sum the weights instead of the probabilities
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) token.p[s] = 0.0f;
      token.scatter(weight, token.p);
    }
    if (!exists || token.masked) continue;
    const int row = token.segment * r.experts;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int e = token.expert_of(s);
      if (e < r.experts) sums[row + e] += token.p[s];
    }
    squares += token.lse * token.lse;
    entropies += entropy;
    if (lane < r.choices) atomicAdd(&counts[row + token.expert[0]], 1);
    if (lane == 0 && gshard) atomicAdd(&firsts[row + token.expert[0]], 1);
    if (lane == 0) atomicAdd(&members[token.segment], 1);
  }
  if (lane == 0) {
    sums[p.cells] = squares;
    sums[p.cells + 1] = entropies;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < p.num_ints; i += blockDim.x) ints[blockIdx.x * int64_t(p.num_ints) + i] = shared[i];
  for (int i = threadIdx.x; i < p.num_floats; i += blockDim.x) {
    float total = 0.0f;
    for (int g = 0; g < groups; ++g) total += every_sums[g * p.num_floats + i];
    floats[blockIdx.x * int64_t(p.num_floats) + i] = total;
  }
}

// ---- scan ----------------------------------------------------------------------------------------------------------------------

// After the blocks' counts, `ints` contains begins (blocks, E + 1) and the totals of the counts. After the blocks' sums, `floats`
// contains the totals of the sums.
__device__ inline int* begins_of(const Plan& p, int* ints) { return ints + p.blocks * p.num_ints; }
__device__ inline int* int_totals(const Plan& p, const Router& r, int* ints) {
  return begins_of(p, ints) + p.blocks * (r.experts + 1);
}
__device__ inline float* float_totals(const Plan& p, float* floats) { return floats + p.blocks * p.num_floats; }

// Return the number of a block's assignments to expert e, in all segments. For e = E, return the assignments of masked tokens.
__device__ inline int assignments(const Router& r, const Plan& p, const int* ints, int64_t block, int e) {
  const int* row = ints + block * p.num_ints;
  int found = 0;
  if (e < r.experts) {
    for (int s = 0; s < r.segments; ++s) found += row[s * r.experts + e];
    return found;
  }
  const int64_t left = r.tokens - block * p.tokens_per_block;
  for (int s = 0; s < r.segments; ++s) found += row[p.num_ints - r.segments + s];
  return int(left < p.tokens_per_block ? left : p.tokens_per_block) * r.choices - found * r.choices;
}

__global__ void __launch_bounds__(32 * kScanRows) scan_kernel(Router r, Forward f, Plan p, int* ints, float* floats) {
  extern __shared__ int shared[];  // (kScanRows, 32)
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const int64_t piece = (p.blocks + kScanRows - 1) / kScanRows;
  const int64_t begin = y * piece < p.blocks ? y * piece : p.blocks;
  const int64_t end = begin + piece < p.blocks ? begin + piece : p.blocks;
  const int expert_blocks = (r.experts + 32) / 32, int_blocks = (p.num_ints + 31) / 32;  // E + 1 and num_ints columns

  if (blockIdx.x < expert_blocks) {
    const int e = blockIdx.x * 32 + x;
    int before = 0;
    if (e <= r.experts)
      for (int64_t b = begin; b < end; ++b) before += assignments(r, p, ints, b, e);
    shared[y * 32 + x] = before;
    __syncthreads();
    before = 0;
    for (int above = 0; above < y; ++above) before += shared[above * 32 + x];
    if (e <= r.experts) {
      int* begins = begins_of(p, ints);
      for (int64_t b = begin; b < end; ++b) {
        begins[b * (r.experts + 1) + e] = before;
        before += assignments(r, p, ints, b, e);
      }
    }
  } else if (blockIdx.x < expert_blocks + int_blocks) {
    const int i = (blockIdx.x - expert_blocks) * 32 + x;
    int total = 0;
    if (i < p.num_ints)
      for (int64_t b = begin; b < end; ++b) total += ints[b * p.num_ints + i];
    shared[y * 32 + x] = total;
    __syncthreads();
    if (y == 0 && i < p.num_ints) {
      total = 0;
      for (int row = 0; row < kScanRows; ++row) total += shared[row * 32 + x];
      int_totals(p, r, ints)[i] = total;
      if (i < p.cells) f.counts[i] = total;
    }
  } else {
    const int i = (blockIdx.x - expert_blocks - int_blocks) * 32 + x;
    float* rows = reinterpret_cast<float*>(shared);
    float total = 0.0f;
    if (i < p.num_floats)
      for (int64_t b = begin; b < end; ++b) total += floats[b * p.num_floats + i];
    rows[y * 32 + x] = total;
    __syncthreads();
    if (y == 0 && i < p.num_floats) {
      total = 0.0f;
      for (int row = 0; row < kScanRows; ++row) total += rows[row * 32 + x];
      float_totals(p, floats)[i] = total;
    }
  }
}

// ---- finish --------------------------------------------------------------------------------------------------------------------

// Set start[e] and tile[e] to the first row and the first tile of expert e, and at e = E to the numbers of rows and tiles. One warp
// calls this; each lane handles consecutive experts.
__device__ inline void find_starts(const Router& r, const Forward& f, const int* totals, int* start, int* tile) {
  const int lane = threadIdx.x, share = (r.experts + 31) / 32;
  const int from = lane * share, to = from + share < r.experts ? from + share : r.experts;
  int rows = 0, tiles = 0;
  for (int e = from; e < to; ++e) {
    int count = 0;
    for (int s = 0; s < r.segments; ++s) count += totals[s * r.experts + e];
    start[e] = count;
    rows += count;
    tiles += (count + f.tile_rows - 1) / f.tile_rows;
  }
  int rows_to = rows, tiles_to = tiles;  // inclusive prefix sums over the lanes
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int more_rows = __shfl_up_sync(0xffffffffu, rows_to, step), more_tiles = __shfl_up_sync(0xffffffffu, tiles_to, step);
    if (lane >= step) {
      rows_to += more_rows;
      tiles_to += more_tiles;
    }
  }
  rows = rows_to - rows;
  tiles = tiles_to - tiles;
  for (int e = from; e < to; ++e) {
    const int count = start[e];
    start[e] = rows;
    tile[e] = tiles;
    rows += count;
    tiles += (count + f.tile_rows - 1) / f.tile_rows;
  }
  if (lane == 31) {
    start[r.experts] = rows_to;
    tile[r.experts] = tiles_to;
  }
}

// Write order and position of one block's assignments. Each warp handles consecutive assignments, 32 at a time, in their order.
__device__ inline void place(const Router& r, const Forward& f, const Plan& p, const int* begins, const int* start, int* bins) {
  const int64_t* const indices = f.replay != nullptr ? f.replay : f.indices;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = r.experts + 1;
  const int64_t rows = r.tokens * r.choices;
  const int64_t begin = blockIdx.x * int64_t(p.tokens_per_block) * r.choices;
  const int64_t end =
      begin + int64_t(p.tokens_per_block) * r.choices < rows ? begin + int64_t(p.tokens_per_block) * r.choices : rows;
  const int64_t share = (end - begin + warps - 1) / warps;
  const int64_t from = begin + warp * share < end ? begin + warp * share : end, to = from + share < end ? from + share : end;

  for (int i = threadIdx.x; i < warps * width; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  for (int64_t a = from + lane; a < to; a += 32) atomicAdd(&bins[warp * width + bin_of(r, indices, int(a))], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < width; e += blockDim.x) {  // replace each warp's count by its first row
    int next = start[e] + begins[blockIdx.x * int64_t(width) + e];
    for (int w = 0; w < warps; ++w) {
      const int count = bins[w * width + e];
      bins[w * width + e] = next;
      next += count;
    }
  }
  __syncthreads();
  for (int64_t base = from; base < to; base += 32) {
    const int64_t a = base + lane;
    const int bin = a < to ? bin_of(r, indices, int(a)) : -1;
    const unsigned alike = __match_any_sync(0xffffffffu, bin);
    const int rank = __popc(alike & ((1u << lane) - 1));
    const int row = bin >= 0 ? bins[warp * width + bin] + rank : 0;
    __syncwarp();
    if (bin >= 0) {
      if (rank == 0) bins[warp * width + bin] += __popc(alike);
      f.position[a] = row;
      f.order[row] = int(a);
    }
    __syncwarp();
  }
}

// Write the tiles as (expert, first row), in the order of the experts. Unused tiles get expert -1.
__device__ inline void write_tiles(const Router& r, const Forward& f, const int* start, const int* tile) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < f.num_tiles; i += gridDim.x * blockDim.x) {
    int e = -1, row = 0;
    if (i < tile[r.experts]) {
      int above = r.experts;  // binary search of the last e with tile[e] <= i
      for (e = 0; above - e > 1;) {
        const int middle = (e + above) / 2;
        (tile[middle] <= i ? e : above) = middle;
      }
      row = start[e] + (i - tile[e]) * f.tile_rows;
    }
    f.tiles[2 * int64_t(i)] = e;
    f.tiles[2 * int64_t(i) + 1] = row;
  }
}

// Write the losses and their coefficients. A warp handles a segment, its lanes add up the experts; thread 0 adds up the segments.
__device__ inline void write_losses(const Router& r, const Forward& f, const Plan& p, const int* totals, const float* sums,
                                    float* loss) {
  using Group = Lanes<32>;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int* const members = totals + p.num_ints - r.segments;
  int nonempty = 0, n = 0;
  for (int s = 0; s < r.segments; ++s) {
    nonempty += members[s] > 0;
    n += members[s];
  }
  for (int s = warp; s < r.segments; s += warps) {
    float size = 0.0f, value = 0.0f;
    for (int e = lane; e < r.experts; e += 32) size += r.available == nullptr || r.available[s * r.experts + e] ? 1.0f : 0.0f;
    size = Group::sum(size);
    const float tokens = float(members[s]), each = 1.0f / (tokens * float(nonempty));
    for (int e = lane; e < r.experts; e += 32) {
      const int at = s * r.experts + e;
      float slope = 0.0f;
      if (members[s] > 0 && r.balance == Balance::mse) {
        // An unavailable expert has the target 0; its mean weight is 0, or NaN.
        const float target = r.available == nullptr || r.available[at] ? 1.0f / size : 0.0f;
        const float distance = sums[at] / tokens - target;
        value += distance * distance;
        slope = 2.0f * distance * each;
      } else if (members[s] > 0) {
        const bool gshard = r.balance == Balance::gshard;
        const float share = gshard ? float(totals[p.cells + at]) / tokens : float(totals[at]) / (tokens * float(r.choices));
        value += size * share * (sums[at] / tokens);
        slope = size * share * each;
      }
      f.coefficients[at] = slope;
    }
    value = Group::sum(value);
    if (lane == 0) loss[s] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float balance = 0.0f;
    for (int s = 0; s < r.segments; ++s) balance += loss[s];
    f.losses[0] = nonempty > 0 ? balance / float(nonempty) : 0.0f;
    f.losses[1] = n > 0 ? sums[p.cells] / float(n) : 0.0f;
    f.losses[2] = n > 0 ? sums[p.cells + 1] / float(n) : 0.0f;
    f.coefficients[p.cells] = n > 0 ? 1.0f / float(n) : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads, 4) finish_kernel(Router r, Forward f, Plan p, int* ints, float* floats) {
  extern __shared__ int shared[];
  int* const start = shared;
  int* const tile = start + r.experts + 1;
  int* const rest = tile + r.experts + 1;
  const int* const totals = int_totals(p, r, ints);
  if (threadIdx.x < 32) find_starts(r, f, totals, start, tile);
  __syncthreads();
  write_tiles(r, f, start, tile);
  if (blockIdx.x < p.blocks) {
    place(r, f, p, begins_of(p, ints), start, rest);
  } else {  // the last block has no tokens
    for (int e = threadIdx.x; e <= r.experts; e += blockDim.x) f.offsets[e] = start[e];
    write_losses(r, f, p, totals, float_totals(p, floats), reinterpret_cast<float*>(rest));
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------

template <typename T, int LANES, int SLOTS>
__global__ void __launch_bounds__(kBackwardThreads, SLOTS > 4 ? 4 : 8) backward_kernel(Router r, Backward b) {
  using Group = Lanes<LANES>;
  const int64_t i = blockIdx.x * int64_t(blockDim.x / LANES) + threadIdx.x / LANES;
  const int64_t t = i < r.tokens ? i : r.tokens - 1;
  Token<Group, SLOTS, 1> token(r, t);
  token.replay(b.indices);
  token.score(Load<T>{static_cast<const T*>(r.logits), r.stride_t, r.stride_e});
  const float weight[1] = {Group::lane() < r.choices ? b.weights[t * r.choices + Group::lane()] : 0.0f};
  token.gradient(b, weight);
  if (i >= r.tokens) return;
  T* const row = static_cast<T*>(b.d_logits) + t * r.experts;
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    const int e = token.expert_of(s);
    if (e < r.experts) narrow(token.l[s], row[e]);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------------------

template <typename... Takes, typename... Args>
cudaError_t launch(void (*kernel)(Takes...), int64_t blocks, int threads, size_t shared, cudaStream_t stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <int LANES, int SLOTS> struct Shape {
  static constexpr int lanes = LANES, slots = SLOTS;
};

// Call body with the dtype and the Shape for this number of experts. The lanes are those of plan().
template <typename T, class Body> cudaError_t with_shape(int experts, Body body) {
  if (experts <= 8) return body(T{}, Shape<8, 1>{});
  if (experts <= 16) return body(T{}, Shape<16, 1>{});
  if (experts <= 64) return body(T{}, Shape<32, 2>{});
  if (experts <= 128) return body(T{}, Shape<32, 4>{});
  if (experts <= 256) return body(T{}, Shape<32, 8>{});
  return body(T{}, Shape<32, kMaxExperts / 32>{});
}

template <class Body> cudaError_t with_kernel(const Router& r, Body body) {
  if (r.dtype == Dtype::float32) return with_shape<float>(r.experts, body);
  if (r.dtype == Dtype::float16) return with_shape<__half>(r.experts, body);
  return with_shape<__nv_bfloat16>(r.experts, body);
}

}  // namespace

cudaError_t forward(const Router& r, const Forward& f, const Plan& p, int* ints, float* floats, cudaStream_t stream) {
  cudaError_t error = with_kernel(r, [&](auto type, auto shape) {
    return launch(route_kernel<decltype(type), decltype(shape)::lanes, decltype(shape)::slots>, p.blocks, p.threads, p.shared,
                  stream, r, f, p, ints, floats);
  });
  if (error != cudaSuccess) return error;
  const int64_t columns = (r.experts + 32) / 32 + (p.num_ints + 31) / 32 + (p.num_floats + 31) / 32;
  error = launch(scan_kernel, columns, 32 * kScanRows, 32 * kScanRows * sizeof(int), stream, r, f, p, ints, floats);
  if (error != cudaSuccess) return error;
  const int rest = kThreads / 32 * (r.experts + 1) > r.segments ? kThreads / 32 * (r.experts + 1) : r.segments;
  return launch(finish_kernel, p.blocks + 1, kThreads, (2 * (r.experts + 1) + rest) * sizeof(int), stream, r, f, p, ints, floats);
}

cudaError_t backward(const Router& r, const Backward& b, cudaStream_t stream) {
  return with_kernel(r, [&](auto type, auto shape) {
    constexpr int groups = kBackwardThreads / decltype(shape)::lanes;
    return launch(backward_kernel<decltype(type), decltype(shape)::lanes, decltype(shape)::slots>, (r.tokens + groups - 1) / groups,
                  kBackwardThreads, 0, stream, r, b);
  });
}

}  // namespace mmfused
