// The kernels of csrc/topk_routing.cu on a CPU, behind a C interface that ctypes can call.
#include "simt.h"

#include "../../csrc/topk_routing.cu"
#include "../../csrc/topk_routing_host.cpp"

using namespace mmfused;

namespace {

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

// number: dtype, strides, tokens, experts, choices, segments, sigmoid, renormalize, balance, most blocks.
// at: logits, mask, segment, available, seed, selection_bias, replay, then the outputs in the schema's order.
extern "C" int simt_forward(void* const* at, const int64_t* number, float jitter) {
  const Router r = router_of(at, number, jitter);
  const int64_t rows = r.tokens * r.choices;
  const Forward f{static_cast<float*>(at[5]), static_cast<int64_t*>(at[6]), static_cast<int64_t*>(at[7]),
                  static_cast<float*>(at[8]), static_cast<int64_t*>(at[9]), static_cast<float*>(at[10]),
                  static_cast<int*>(at[11]),  static_cast<int*>(at[12]),    static_cast<int*>(at[13]),
                  static_cast<int*>(at[14]),  static_cast<float*>(at[15]),  int(rows / 16 + r.experts),
                  tile_rows(rows, r.experts)};
  if (expected_shape(r.tokens, r.experts, r.choices, r.segments) != nullptr) return -1;
  const Plan p = plan(r.tokens, r.experts, r.segments, r.balance, number[10]);
  std::vector<int> ints(p.ints + 1, -1);
  std::vector<float> floats(p.floats + 1, NAN);
  const int error = forward(r, f, p, ints.data(), floats.data(), nullptr);
  return ints.back() != -1 || !std::isnan(floats.back()) ? -2 : error;  // the workspaces are as large as promised
}

// at: as above to seed, then d_weights, d_balance, d_z, d_entropy, indices, weights, coefficients, d_logits.
extern "C" int simt_backward(void* const* at, const int64_t* number, float jitter) {
  const auto real = [&](int i) { return static_cast<float*>(at[i]); };
  return backward(router_of(at, number, jitter),
                  {real(5), real(6), real(7), real(8), static_cast<int64_t*>(at[9]), real(10), real(11), at[12]}, nullptr);
}
