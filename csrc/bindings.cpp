// Torch bindings of csrc/: the CUDA ops whose schemas are defined in mmfused/ops, and host functions for tests.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "topk_routing.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using mmfused::Router;

// Return a contiguous tensor of this dtype; None gives an undefined tensor. The caller must keep the result alive while its pointer
// is in use.
Tensor dense(const Optional& tensor, at::ScalarType dtype) {
  return tensor.has_value() && tensor->defined() ? tensor->to(dtype).contiguous() : Tensor();
}

template <typename T> const T* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; }

mmfused::Balance balance_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "switch" || name == "gshard" || name == "mse", "topk_routing: balance: got '", name,
                    "', expected one of switch, gshard, mse");
  return name == "switch" ? mmfused::Balance::switch_loss : name == "gshard" ? mmfused::Balance::gshard : mmfused::Balance::mse;
}

mmfused::Dtype dtype_of(const Tensor& logits) {
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                   "topk_routing: logits: got dtype ", dtype, ", expected float32, float16 or bfloat16");
  return dtype == at::kFloat ? mmfused::Dtype::float32 : dtype == at::kHalf ? mmfused::Dtype::float16 : mmfused::Dtype::bfloat16;
}

// Checks the arguments that all functions below share, and owns the tensors behind the pointers of `router`.
struct Call {
  Tensor logits, mask, segments, available, seed;
  Router router{};

  Call(const Tensor& source, int64_t k, bool sigmoid, bool renormalize, const Optional& masked, const Optional& segment,
       int64_t num_segments, const Optional& usable, const std::string& balance, double jitter, const Optional& jitter_seed)
      : logits(source),
        mask(dense(masked, at::kBool)),
        segments(dense(segment, at::kLong)),
        available(dense(usable, at::kBool)),
        seed(dense(jitter_seed, at::kLong)) {
    TORCH_CHECK_VALUE(logits.dim() == 2, "topk_routing: logits: got shape ", logits.sizes(), ", expected (tokens, experts)");
    TORCH_CHECK_VALUE(jitter == 0.0 || seed.defined(), "topk_routing: jitter_seed: got None with jitter ", jitter,
                      ", expected a seed");
    for (const auto& tensor : {mask, segments, available, seed})
      TORCH_CHECK_VALUE(!tensor.defined() || tensor.device() == logits.device(), "topk_routing: got a tensor on ", tensor.device(),
                        ", expected the device of the logits, ", logits.device());
    TORCH_CHECK_VALUE(!mask.defined() || mask.numel() == logits.size(0), "topk_routing: mask: got ", mask.numel(),
                      " entries, expected ", logits.size(0));
    TORCH_CHECK_VALUE(!segments.defined() || segments.numel() == logits.size(0), "topk_routing: segments: got ", segments.numel(),
                      " entries, expected ", logits.size(0));
    TORCH_CHECK_VALUE(!available.defined() || available.numel() == num_segments * logits.size(1), "topk_routing: available: got ",
                      available.numel(), " entries, expected ", num_segments * logits.size(1));
    const char* expected = mmfused::expected_shape(logits.size(0), logits.size(1), k, num_segments);
    TORCH_CHECK_VALUE(expected == nullptr, "topk_routing: C++ router: got ", logits.sizes(), " logits, k ", k, ", ", num_segments,
                      " segments, expected ", expected, "; mmfused.extension.router('triton') has no such limit");
    router = Router{logits.const_data_ptr(),
                    dtype_of(logits),
                    logits.stride(0),
                    logits.stride(1),
                    logits.size(0),
                    int(logits.size(1)),
                    int(k),
                    int(num_segments),
                    sigmoid,
                    renormalize,
                    balance_of(balance),
                    pointer<bool>(mask),
                    pointer<int64_t>(segments),
                    pointer<bool>(available),
                    float(jitter),
                    pointer<int64_t>(seed)};
  }
};

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed forward(const Tensor& source, const Optional& router_weight, const Optional& router_bias, int64_t k, bool sigmoid,
               bool renormalize, const Optional& selection_bias, const Optional& mask, const Optional& segments,
               int64_t num_segments, const Optional& available, std::string balance, const Optional& indices, double jitter,
               const Optional& jitter_seed) {
  TORCH_CHECK_VALUE(!router_weight.has_value() && !router_bias.has_value(),
                    "mmfused::topk_routing_cuda_fwd: router_weight: got a tensor, expected None and finished logits");
  const c10::cuda::CUDAGuard guard(source.device());
  const Call call(source, k, sigmoid, renormalize, mask, segments, num_segments, available, balance, jitter, jitter_seed);
  const Router& r = call.router;
  const Tensor bias = dense(selection_bias, at::kFloat), replay = dense(indices, at::kLong);
  const int64_t rows = r.tokens * k, cells = num_segments * r.experts;
  TORCH_CHECK_VALUE(!bias.defined() || bias.numel() == r.experts, "topk_routing: selection_bias: got ", bias.numel(),
                    " entries, expected ", r.experts);
  TORCH_CHECK_VALUE(!replay.defined() || replay.numel() == rows, "topk_routing: indices: got ", replay.numel(),
                    " entries, expected ", rows);
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType dtype) { return at::empty(shape, source.options().dtype(dtype)); };
  Routed out{empty({0}, at::kFloat),
             replay.defined() ? empty({0}, at::kLong) : empty({r.tokens, k}, at::kLong),
             empty({r.tokens, k}, at::kFloat),
             empty({num_segments, r.experts}, at::kLong),
             empty({3}, at::kFloat),
             empty({rows}, at::kInt),
             empty({rows}, at::kInt),
             empty({r.experts + 1}, at::kInt),
             empty({rows / 16 + r.experts, 2}, at::kInt),
             empty({cells + 1}, at::kFloat)};
  const auto& [logits, chosen, weights, counts, losses, order, position, offsets, tiles, coefficients] = out;
  const mmfused::Forward f{pointer<float>(bias),
                           pointer<int64_t>(replay),
                           chosen.mutable_data_ptr<int64_t>(),
                           weights.mutable_data_ptr<float>(),
                           counts.mutable_data_ptr<int64_t>(),
                           losses.mutable_data_ptr<float>(),
                           order.mutable_data_ptr<int>(),
                           position.mutable_data_ptr<int>(),
                           offsets.mutable_data_ptr<int>(),
                           tiles.mutable_data_ptr<int>(),
                           coefficients.mutable_data_ptr<float>(),
                           int(tiles.size(0)),
                           mmfused::tile_rows(rows, r.experts)};
  const auto plan = mmfused::plan(r.tokens, r.experts, r.segments, r.balance);
  const Tensor ints = empty({plan.ints}, at::kInt), floats = empty({plan.floats}, at::kFloat);
  C10_CUDA_CHECK(mmfused::forward(r, f, plan, ints.mutable_data_ptr<int>(), floats.mutable_data_ptr<float>(),
                                  c10::cuda::getCurrentCUDAStream()));
  return out;
}

struct Upstream {  // owns the tensors that the pointers of a Backward refer to
  Tensor d_weights, d_balance, d_z, d_entropy, indices, weights, coefficients, d_logits;
  mmfused::Backward pointers() const {
    return {pointer<float>(d_weights), pointer<float>(d_balance), pointer<float>(d_z),          pointer<float>(d_entropy),
            pointer<int64_t>(indices), pointer<float>(weights),   pointer<float>(coefficients), d_logits.mutable_data_ptr()};
  }
};

Tensor backward(const Optional& d_weights, const Optional& d_balance, const Optional& d_z, const Optional& d_entropy,
                const Tensor& logits, const Tensor& indices, const Tensor& weights, const Tensor& coefficients, bool sigmoid,
                bool renormalize, const Optional& mask, const Optional& segments, int64_t num_segments, const Optional& available,
                std::string balance, double jitter, const Optional& jitter_seed) {
  const c10::OptionalDeviceGuard guard(logits.device());
  const Call call(logits, indices.size(1), sigmoid, renormalize, mask, segments, num_segments, available, balance, jitter,
                  jitter_seed);
  const Upstream up{
      dense(d_weights, at::kFloat),    dense(d_balance, at::kFloat),
      dense(d_z, at::kFloat),          dense(d_entropy, at::kFloat),
      dense(indices, at::kLong),       dense(weights, at::kFloat),
      dense(coefficients, at::kFloat), at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous))};
  const int64_t assignments = logits.size(0) * indices.size(1);
  TORCH_CHECK_VALUE(indices.numel() == assignments, "topk_routing: indices: got ", indices.numel(), " entries, expected ",
                    assignments);
  TORCH_CHECK_VALUE(weights.numel() == assignments, "topk_routing: weights: got ", weights.numel(), " entries, expected ",
                    assignments);
  TORCH_CHECK_VALUE(!up.d_weights.defined() || up.d_weights.numel() == assignments, "topk_routing: d_weights: got ",
                    up.d_weights.numel(), " entries, expected ", assignments);
  TORCH_CHECK_VALUE(coefficients.numel() == num_segments * logits.size(1) + 1, "topk_routing: coefficients: got ",
                    coefficients.numel(), " entries, expected ", num_segments * logits.size(1) + 1);
  if (logits.is_cpu()) {
    TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, "topk_routing: logits: got dtype ", logits.scalar_type(),
                     " on a CPU, expected float32");
    mmfused::gradient_on_host(call.router, up.pointers());
  } else {
    C10_CUDA_CHECK(mmfused::backward(call.router, up.pointers(), c10::cuda::getCurrentCUDAStream()));
  }
  return up.d_logits;
}

// Compute on the host what the kernels compute for each token: indices, weights (T, k), lse, entropy (T,), probabilities (T, E).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_tokens_on_host(const Tensor& source, int64_t k, bool sigmoid,
                                                                        bool renormalize, const Optional& selection_bias,
                                                                        const Optional& mask, const Optional& segments,
                                                                        int64_t num_segments, const Optional& available,
                                                                        const Optional& indices, double jitter,
                                                                        const Optional& jitter_seed) {
  TORCH_CHECK_TYPE(source.is_cpu() && source.scalar_type() == at::kFloat, "topk_routing: logits: got ", source.scalar_type(),
                   " on ", source.device(), ", expected float32 on a CPU");
  const Call call(source, k, sigmoid, renormalize, mask, segments, num_segments, available, "switch", jitter, jitter_seed);
  const int64_t tokens = source.size(0);
  const Tensor bias = dense(selection_bias, at::kFloat), replay = dense(indices, at::kLong);
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType dtype) { return at::empty(shape, source.options().dtype(dtype)); };
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> out{empty({tokens, k}, at::kLong), empty({tokens, k}, at::kFloat),
                                                         empty({tokens}, at::kFloat), empty({tokens}, at::kFloat),
                                                         empty(source.sizes(), at::kFloat)};
  const auto& [chosen, weights, lse, entropy, probabilities] = out;
  mmfused::route_on_host(call.router, pointer<float>(bias), pointer<int64_t>(replay),
                         {chosen.mutable_data_ptr<int64_t>(), weights.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(),
                          entropy.mutable_data_ptr<float>(), probabilities.mutable_data_ptr<float>()});
  return out;
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(), " takes CUDA tensors; on a CPU use backend 'composed'.");
}

}  // namespace

TORCH_LIBRARY_IMPL(mmfused, CUDA, m) {
  m.impl("topk_routing_cuda_fwd", &forward);
  m.impl("topk_routing_cuda_bwd", &backward);
}

TORCH_LIBRARY_IMPL(mmfused, CPU, m) {
  m.impl("topk_routing_cuda_fwd", torch::CppFunction::makeFromBoxedFunction<&refuse>());
  m.impl("topk_routing_cuda_bwd", torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "CUDA C++ kernels of mmfused, registered when this module is imported. For tests, its functions run on the host.";
  m.def("route_tokens_on_host", &route_tokens_on_host);
  m.def("gradient_rows_on_host", &backward);  // the same arguments as mmfused::topk_routing_cuda_bwd
}
