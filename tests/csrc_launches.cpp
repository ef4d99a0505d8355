// The launches of csrc/topk_routing.cu without a GPU: a C interface to its host code, and the functions of the CUDA runtime which
// that code calls. A launch calls the function given to csrc_run_launches_with.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>

#include "topk_routing.h"

using namespace mmfused;

namespace {

using Launch = void(const char* kernel, int blocks, int threads, size_t shared, void** arguments);

Launch* run = nullptr;

// The kernels' names in the PTX, by their functions on the host. Registered while the library loads, perhaps before this file's
// own variables exist.
std::map<const void*, const char*>& kernels() {
  static std::map<const void*, const char*> names;
  return names;
}

// number: dtype, strides, tokens, experts, choices, segments, sigmoid, renormalize, balance, most blocks.
Plan plan_of(const int64_t* number) {
  return plan(number[3], int(number[4]), int(number[6]), Balance(number[9]), number[10]);
}

Router router_of(void* const* at, const int64_t* number, float jitter) {
  return Router{at[0],
                Dtype(number[0]),
                number[1],
                number[2],
                number[3],
                int(number[4]),
                int(number[5]),
                int(number[6]),
                number[7] != 0,
                number[8] != 0,
                Balance(number[9]),
                static_cast<bool*>(at[1]),
                static_cast<int64_t*>(at[2]),
                static_cast<bool*>(at[3]),
                jitter,
                static_cast<int64_t*>(at[4])};
}

}  // namespace

extern "C" {

// ---- the CUDA runtime ----------------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[function] = name;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  run(kernels().at(function), int(config->gridDim.x), int(config->blockDim.x), config->dynamicSmemBytes, arguments);
  return cudaSuccess;
}

// Only launches of the form kernel<<<...>>>() call these.
void __cudaPopCallConfiguration() { std::abort(); }
void __cudaGetKernel() { std::abort(); }
void __cudaLaunchKernel() { std::abort(); }

// ---- the interface -------------------------------------------------------------------------------------------------------------

void csrc_run_launches_with(Launch* function) { run = function; }

// The numbers of elements of the two workspaces.
void csrc_workspaces(const int64_t* number, int64_t* sizes) {
  const Plan p = plan_of(number);
  sizes[0] = p.ints;
  sizes[1] = p.floats;
}

// at: logits, mask, segment, available, seed, selection_bias, replay, the outputs in the schema's order, and the workspaces.
int csrc_forward(void* const* at, const int64_t* number, float jitter) {
  const Router r = router_of(at, number, jitter);
  const int64_t rows = r.tokens * r.choices;
  const Forward f{static_cast<float*>(at[5]), static_cast<int64_t*>(at[6]), static_cast<int64_t*>(at[7]),
                  static_cast<float*>(at[8]), static_cast<int64_t*>(at[9]), static_cast<float*>(at[10]),
                  static_cast<int*>(at[11]),  static_cast<int*>(at[12]),    static_cast<int*>(at[13]),
                  static_cast<int*>(at[14]),  static_cast<float*>(at[15]),  int(rows / 16 + r.experts),
                  tile_rows(rows, r.experts)};
  if (expected_shape(r.tokens, r.experts, r.choices, r.segments) != nullptr) return -1;
  return forward(r, f, plan_of(number), static_cast<int*>(at[16]), static_cast<float*>(at[17]), nullptr);
}

// at: as above to seed, then d_weights, d_balance, d_z, d_entropy, indices, weights, coefficients, d_logits.
int csrc_backward(void* const* at, const int64_t* number, float jitter) {
  const auto real = [&](int i) { return static_cast<float*>(at[i]); };
  return backward(router_of(at, number, jitter),
                  {real(5), real(6), real(7), real(8), static_cast<int64_t*>(at[9]), real(10), real(11), at[12]}, nullptr);
}

}  // extern "C"
