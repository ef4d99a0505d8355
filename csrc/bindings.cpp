// The torch side of csrc/: the ops whose schemas mmfused/ops define, and the host loop that tests call. No gradient, no dispatch.
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

// A contiguous tensor of this dtype, or nothing; who reads its pointer keeps it alive as long.
Tensor dense(const Optional& tensor, at::ScalarType dtype) {
  return tensor.has_value() && tensor->defined() ? tensor->to(dtype).contiguous() : Tensor();
}

template <typename T> const T* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr; }

mmfused::Balance balance_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "switch" || name == "gshard" || name == "mse", "balance is '", name,
                    "'; it takes one of switch, gshard, mse.");
  return name == "switch" ? mmfused::Balance::switch_loss : name == "gshard" ? mmfused::Balance::gshard : mmfused::Balance::mse;
}

mmfused::Dtype dtype_of(const Tensor& logits) {
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                   "the C++ router takes logits of float32, float16 or bfloat16, got ", dtype, ".");
  return dtype == at::kFloat ? mmfused::Dtype::float32 : dtype == at::kHalf ? mmfused::Dtype::float16 : mmfused::Dtype::bfloat16;
}

// What every entry shares, and the tensors behind its pointers.
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
    TORCH_CHECK_VALUE(logits.dim() == 2, "the C++ router takes logits (tokens, experts), got ", logits.sizes(), ".");
    TORCH_CHECK_VALUE(jitter == 0.0 || seed.defined(), "jitter is ", jitter,
                      " and jitter_seed is None; the C++ router takes the seed.");
    for (const auto& tensor : {mask, segments, available, seed})
      TORCH_CHECK_VALUE(!tensor.defined() || tensor.device() == logits.device(), "a tensor is on ", tensor.device(),
                        " but the logits are on ", logits.device(), ".");
    TORCH_CHECK_VALUE(!mask.defined() || mask.numel() == logits.size(0), "the mask has ", mask.numel(), " entries for ",
                      logits.size(0), " tokens.");
    TORCH_CHECK_VALUE(!segments.defined() || segments.numel() == logits.size(0), "segments has ", segments.numel(), " entries for ",
                      logits.size(0), " tokens.");
    TORCH_CHECK_VALUE(!available.defined() || available.numel() == num_segments * logits.size(1), "available takes (", num_segments,
                      ", ", logits.size(1), ").");
    const char* reason = mmfused::why_not(logits.size(0), logits.size(1), k, num_segments);
    TORCH_CHECK_VALUE(reason == nullptr, "the C++ router does not take ", reason, " (", logits.sizes(), " logits, k = ", k, ", ",
                      num_segments, " segments); mmfused.extension.router('triton') does.");
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
                    "mmfused::topk_routing_cuda_fwd takes logits; multiply by router_weight before it, in float32.");
  const c10::cuda::CUDAGuard guard(source.device());
  const Call call(source, k, sigmoid, renormalize, mask, segments, num_segments, available, balance, jitter, jitter_seed);
  const Router& r = call.router;
  const Tensor bias = dense(selection_bias, at::kFloat), replay = dense(indices, at::kLong);
  const int64_t rows = r.tokens * k, cells = num_segments * r.experts;
  TORCH_CHECK_VALUE(!bias.defined() || bias.numel() == r.experts, "selection_bias has ", bias.numel(), " entries for ", r.experts,
                    " experts.");
  TORCH_CHECK_VALUE(!replay.defined() || replay.numel() == rows, "indices has ", replay.numel(), " entries, not ", rows, ".");
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

struct Upstream {  // keeps what the pointers of a Backward point to
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
  TORCH_CHECK_VALUE(indices.numel() == assignments && weights.numel() == assignments, "indices and weights take (tokens, k).");
  TORCH_CHECK_VALUE(!up.d_weights.defined() || up.d_weights.numel() == assignments, "d_weights takes (tokens, k).");
  TORCH_CHECK_VALUE(coefficients.numel() == num_segments * logits.size(1) + 1, "coefficients takes (segments * experts + 1,).");
  if (logits.is_cpu()) {
    TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, "the host loop takes float32 logits.");
    mmfused::gradient_on_host(call.router, up.pointers());
  } else {
    C10_CUDA_CHECK(mmfused::backward(call.router, up.pointers(), c10::cuda::getCurrentCUDAStream()));
  }
  return up.d_logits;
}

// indices, weights (T, k), lse, entropy (T,), probabilities (T, E): what the kernels compute of each token, on the host.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_tokens_on_host(const Tensor& source, int64_t k, bool sigmoid,
                                                                        bool renormalize, const Optional& selection_bias,
                                                                        const Optional& mask, const Optional& segments,
                                                                        int64_t num_segments, const Optional& available,
                                                                        const Optional& indices, double jitter,
                                                                        const Optional& jitter_seed) {
  TORCH_CHECK_TYPE(source.is_cpu() && source.scalar_type() == at::kFloat, "the host loop takes float32 logits on a CPU.");
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
      "CUDA C++ kernels of mmfused; importing this implements its ops. The functions run their arithmetic on the host, for tests.";
  m.def("route_tokens_on_host", &route_tokens_on_host);
  m.def("gradient_rows_on_host", &backward);  // takes what mmfused::topk_routing_cuda_bwd takes
}
