"""FlopCounterMode counts every matrix product of an op, forward and backward, on every backend.

The expected sums are written out by hand.
"""

import pytest
import torch
from compiling import run_python
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mmfused
from mmfused.library import operator

# Samples, tokens, tokens of the context, width, queries, heads; their products all differ.
B, N, M, D, L, H = 3, 20, 7, 32, 3, 2


def count(call, *inputs, backend="composed") -> tuple[int, int]:
    """Return the FLOPs of the forward and the backward."""
    with mmfused.backend(backend):
        with FlopCounterMode(display=False) as forward:
            out = call(*inputs)
        out = out if isinstance(out, tuple | list) else [out]
        loss = sum(x.sum() for x in out if isinstance(x, torch.Tensor) and x.requires_grad)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def leaf(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape).requires_grad_(grad)


def test_every_operator_has_a_formula():
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    names = {name.split(".")[0] for library, name in names if library == "mmfused"}
    assert len(names) > 20
    assert [name for name in names if getattr(torch.ops.mmfused, name) not in flop_registry] == []


def test_pooling():
    module = mmfused.QueryPooling(D, L, H, bias=True, q_proj=True, out_proj=True)
    queries = 2 * (2 * L * D * D)
    pool = 4 * B * H * L * N * D
    values = 2 * B * L * D * D
    output = 2 * B * L * D * D
    once = queries + pool + values + output
    assert count(module, leaf(B, N, D)) == (once, 2 * once)
    # The kernels recompute the logits.
    assert count(module, leaf(B, N, D), backend="fused") == (once, 2 * once + pool // 2)
    # Tokens without a gradient: each of the two products with them has one gradient instead of two.
    assert count(module, leaf(B, N, D, grad=False)) == (once, 2 * once - pool)
    assert count(module, leaf(B, N, D, grad=False), backend="fused") == (once, 2 * once - pool // 2)
    projected = 2 * L * D * D + 2 * (2 * B * N * D * D) + 4 * B * L * N * D + output
    assert count(module, leaf(B, N, D), backend="reference") == (projected, 2 * projected)


def test_a_transform():
    module = mmfused.QTransform(D, L, 1, H, ffn=3 * D)
    pool = 2 * (2 * L * D * D) + 4 * B * H * L * N * D + 2 * (2 * B * L * D * D)
    once = pool + 2 * (2 * B * L * D * 3 * D)
    assert count(module, leaf(B, N, D)) == (once, 2 * once)


@pytest.mark.parametrize("gate", ["channel", "token", "none"])
def test_gated_cross_attention(gate):
    module = mmfused.GatedCrossAttention(D, H, gate=gate, context_dim=D // 2)
    gates = {"channel": D, "token": 1, "none": 0}[gate]
    project = 2 * B * N * D * D + 2 * B * M * (D // 2) * 2 * D
    attend, output, blend = 4 * B * N * M * D, 2 * B * N * D * D, 2 * B * N * 2 * D * gates
    once, inputs = project + attend + output + blend, (leaf(B, N, D), leaf(B, M, D // 2))
    # torch's attention recomputes its logits too; the kernels also recompute the gate.
    backward = 2 * once + attend // 2
    assert count(module, *inputs) == (once, backward)
    assert count(module, *inputs, backend="fused") == (once, backward + blend)
    indicator = 2 * B * N * gates  # in the reference it is one more column of the product
    assert count(module, *inputs, backend="reference") == (once + indicator, 2 * (once + indicator))


def test_both_directions():
    module = mmfused.BidirectionalGatedCrossAttention(D, H)
    attend, blend = 8 * B * N * M * D, 4 * B * (N + M) * D * D
    once = 6 * B * (N + M) * D * D + attend + 2 * B * (N + M) * D * D + blend
    inputs = leaf(B, N, D), leaf(B, M, D)
    assert count(module, *inputs) == (once, 2 * once + attend // 2)
    assert count(module, *inputs, backend="fused") == (once, 2 * once + attend // 2 + blend)


def test_a_token_gate():
    once = 2 * B * N * (2 * D * D + D)
    assert count(mmfused.TokenGate(D), leaf(B, N, D), leaf(B, N, D)) == (once, 2 * once)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_experts(activation):
    tokens, experts, k, hidden = B * N, 4, 2, 12
    module = mmfused.TopKMoE(D, hidden, experts, k, activation=activation)
    router, layer = 2 * tokens * D * experts, 2 * tokens * k * D * hidden
    layers = layer * (3 if activation == "swiglu" else 2)
    sums = 2 * (2 * tokens * experts)  # composed sums by matrix products, only in the forward
    assert count(module, leaf(tokens, D)) == (router + layers + sums, 2 * (router + layers))
    once = router + layers
    assert count(module, leaf(tokens, D), backend="fused") == (once, 2 * once)
    everything = router + layers * experts  # the reference runs every expert on every row
    assert count(module, leaf(tokens, D), backend="reference") == (everything, 2 * everything)
    logits = leaf(tokens, experts)
    assert count(lambda x: mmfused.topk_routing(x, k), logits) == (sums, 0)
    assert count(lambda x: mmfused.topk_routing(x, k), logits, backend="fused") == (0, 0)


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_experts_without_some_gradients(backend):
    indices, out = torch.randint(0, 4, (N, 2)), 5
    layer = 2 * N * 2 * D * out

    def linear(x, weight, scores, combine):
        routing = mmfused.routing_from_indices(indices, scores.softmax(-1), 4)
        return mmfused.grouped_linear(x, routing, weight, combine=combine)

    x, weight, scores = leaf(N, D), leaf(4, out, D), leaf(N, 2)
    fixed = x.detach(), weight.detach()
    assert count(linear, x, weight, scores, True, backend=backend) == (layer, 2 * layer)
    assert count(linear, x, fixed[1], scores, False, backend=backend) == (layer, layer)
    only_weight = (fixed[0], weight, scores.detach(), False)
    assert count(linear, *only_weight, backend=backend) == (layer, layer)
    # The kernels do not save the experts' outputs; they compute the scores' gradient from dO W.
    only = layer if backend == "fused" else 0
    assert count(linear, *fixed, scores, True, backend=backend) == (layer, only)


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_contrastive_loss(backend):
    rows, columns = 6, 9
    pairs, query, candidate = 2 * rows * columns * D, leaf(rows, D), leaf(columns, D)
    module = mmfused.MaskedInfoNCE(symmetric=True, learnable_temperature=True)
    assert count(module, query, candidate, backend=backend) == (pairs, 3 * pairs)
    assert count(module, query, candidate.detach(), backend=backend) == (pairs, 2 * pairs)
    # Keys exclude pairs, but which ones depends on their values, so all pairs count.
    keys = dict(query_key=torch.arange(rows) % 2, candidate_key=torch.arange(columns) % 2)
    found = count(lambda q, c: module(q, c, **keys), query, candidate, backend=backend)
    assert found == (pairs, 3 * pairs)
    assert count(module, query, candidate, backend="reference") == (pairs, 2 * pairs)


def test_compiled_router():
    """The CUDA router does not run here; given logits, it computes no matrix product."""
    for name in ("topk_routing_cuda_fwd", "topk_routing_cuda_bwd"):
        formula = flop_registry[getattr(torch.ops.mmfused, name)]
        assert formula(leaf(N, 4), None, out_val=leaf(N, 4)) == 0


def test_an_operator_registered_later():
    @operator("(Tensor x) -> Tensor", torch.clone, lambda x, *, out_shape: 3 * x[0], devices="all")
    def a_later_one(x):
        return x.clone()

    with FlopCounterMode(display=False) as counter:
        a_later_one(torch.ones(5))
    assert counter.get_total_flops() == 15


def test_the_counter_is_imported_only_on_demand():
    code = """
import sys, mmfused, torch
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
import importlib.util
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    mmfused.masked_info_nce(torch.randn(4, 5), torch.randn(6, 5), temperature=1.0)
assert counter.get_total_flops() == 2 * 4 * 6 * 5
print("done")
"""
    done = run_python("-W", "ignore", "-c", code)
    assert done.stdout.strip() == "done", done.stderr[-2000:]
