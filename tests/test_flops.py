"""Tests that FlopCounterMode counts every matrix product of an op on every backend."""

import pytest
import torch
from compiling import run_python
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mmfused
from mmfused.library import operator

# Samples, tokens, tokens of the context, width, queries, heads.
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


def test_query_pooling_flops():
    module = mmfused.QueryPooling(D, L, H, bias=True, q_proj=True, out_proj=True)
    queries = 2 * (2 * L * D * D)
    pool = 4 * B * H * L * N * D
    values = 2 * B * L * D * D
    output = 2 * B * L * D * D
    forward = queries + pool + values + output
    assert count(module, leaf(B, N, D)) == (forward, 2 * forward)
    # The kernels recompute the logits in backward.
    assert count(module, leaf(B, N, D), backend="fused") == (forward, 2 * forward + pool // 2)
    # If the tokens need no gradient, each of the two products with the tokens has only one.
    assert count(module, leaf(B, N, D, grad=False)) == (forward, 2 * forward - pool)
    assert count(module, leaf(B, N, D, grad=False), backend="fused") == (
        forward,
        2 * forward - pool // 2,
    )
    projected = 2 * L * D * D + 2 * (2 * B * N * D * D) + 4 * B * L * N * D + output
    assert count(module, leaf(B, N, D), backend="reference") == (projected, 2 * projected)


def test_q_transform_flops():
    module = mmfused.QTransform(D, L, 1, H, ffn=3 * D)
    pool = 2 * (2 * L * D * D) + 4 * B * H * L * N * D + 2 * (2 * B * L * D * D)
    forward = pool + 2 * (2 * B * L * D * 3 * D)
    assert count(module, leaf(B, N, D)) == (forward, 2 * forward)


@pytest.mark.parametrize("gate", ["channel", "token", "none"])
def test_gated_cross_attention_flops(gate):
    module = mmfused.GatedCrossAttention(D, H, gate=gate, context_dim=D // 2)
    gates = {"channel": D, "token": 1, "none": 0}[gate]
    project = 2 * B * N * D * D + 2 * B * M * (D // 2) * 2 * D
    attend, output, blend = 4 * B * N * M * D, 2 * B * N * D * D, 2 * B * N * 2 * D * gates
    forward, inputs = project + attend + output + blend, (leaf(B, N, D), leaf(B, M, D // 2))
    # In backward, torch's attention recomputes the logits. The kernels also recompute a token's
    # gate; they save the logits of a gate per channel.
    backward = 2 * forward + attend // 2
    assert count(module, *inputs) == (forward, backward)
    again = blend if gate == "token" else 0
    assert count(module, *inputs, backend="fused") == (forward, backward + again)
    indicator = 2 * B * N * gates  # one more column of the gate's input in the reference
    assert count(module, *inputs, backend="reference") == (
        forward + indicator,
        2 * (forward + indicator),
    )


def test_bidirectional_gated_cross_attention_flops():
    module = mmfused.BidirectionalGatedCrossAttention(D, H)
    attend, blend = 8 * B * N * M * D, 4 * B * (N + M) * D * D
    forward = 6 * B * (N + M) * D * D + attend + 2 * B * (N + M) * D * D + blend
    inputs = leaf(B, N, D), leaf(B, M, D)
    assert count(module, *inputs) == (forward, 2 * forward + attend // 2)
    assert count(module, *inputs, backend="fused") == (forward, 2 * forward + attend // 2)


def test_token_gate_flops():
    forward = 2 * B * N * (2 * D * D + D)
    assert count(mmfused.TokenGate(D), leaf(B, N, D), leaf(B, N, D)) == (forward, 2 * forward)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_expert_flops(activation):
    tokens, experts, k, hidden = B * N, 4, 2, 12
    module = mmfused.TopKMoE(D, hidden, experts, k, activation=activation)
    router, layer = 2 * tokens * D * experts, 2 * tokens * k * D * hidden
    layers = layer * (3 if activation == "swiglu" else 2)
    # "composed" sums over tokens by two matrix products in the forward.
    sums = 2 * (2 * tokens * experts)
    assert count(module, leaf(tokens, D)) == (router + layers + sums, 2 * (router + layers))
    forward = router + layers
    assert count(module, leaf(tokens, D), backend="fused") == (forward, 2 * forward)
    everything = router + layers * experts  # the reference runs every expert on every row
    assert count(module, leaf(tokens, D), backend="reference") == (everything, 2 * everything)
    logits = leaf(tokens, experts)
    assert count(lambda x: mmfused.topk_routing(x, k), logits) == (sums, 0)
    assert count(lambda x: mmfused.topk_routing(x, k), logits, backend="fused") == (0, 0)


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_expert_flops_without_some_gradients(backend):
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
    # The kernels do not save the experts' outputs, so the scores' gradient needs another product.
    scores_only = layer if backend == "fused" else 0
    assert count(linear, *fixed, scores, True, backend=backend) == (layer, scores_only)


@pytest.mark.parametrize("backend", ["composed", "fused"])
def test_contrastive_loss_flops(backend):
    rows, columns = 6, 9
    pairs, query, candidate = 2 * rows * columns * D, leaf(rows, D), leaf(columns, D)
    module = mmfused.MaskedInfoNCE(symmetric=True, learnable_temperature=True)
    assert count(module, query, candidate, backend=backend) == (pairs, 3 * pairs)
    assert count(module, query, candidate.detach(), backend=backend) == (pairs, 2 * pairs)
    # Pairs that the keys exclude are counted, too, because the count cannot depend on values.
    keys = dict(query_key=torch.arange(rows) % 2, candidate_key=torch.arange(columns) % 2)
    found = count(lambda q, c: module(q, c, **keys), query, candidate, backend=backend)
    assert found == (pairs, 3 * pairs)
    assert count(module, query, candidate, backend="reference") == (pairs, 2 * pairs)


def test_cuda_router_flops():
    """The formula is called directly, because the CUDA router does not run without a GPU."""
    for name in ("topk_routing_cuda_fwd", "topk_routing_cuda_bwd"):
        formula = flop_registry[getattr(torch.ops.mmfused, name)]
        assert formula(leaf(N, 4), None, out_val=leaf(N, 4)) == 0


def test_operator_registered_later_is_counted():
    @operator("(Tensor x) -> Tensor", torch.clone, lambda x, *, out_shape: 3 * x[0], devices="all")
    def registered_later(x):
        return x.clone()

    with FlopCounterMode(display=False) as counter:
        registered_later(torch.ones(5))
    assert counter.get_total_flops() == 15


def test_counter_imported_after_mmfused_counts_flops():
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
