"""Tests of grouped experts: reference, composed backend and module.

Expected values come from a literal transcription of the equations. The kernels are tested in
test_grouped_mlp_fused.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import TopKMoE, grouped_linear, grouped_mlp, topk_routing
from mmfused.ops.grouped_mlp import composed
from mmfused.testing import relative_error, saved_bytes

EXPERTS, DIM, HIDDEN, OUT = 5, 10, 14, 6
ACTIVATIONS = ("gelu", "relu", "swiglu", "packed")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make(activation="gelu", tokens=19, k=2, bias=True, masked=0.2, logits=None):
    """Return tensors, routing and activation for grouped_mlp.

    "packed" is swiglu with w_gate and w_up in one tensor.
    """
    logits = torch.randn(tokens, EXPERTS, dtype=torch.float64) if logits is None else logits
    routing = topk_routing(logits, k, token_padding_mask=torch.rand(tokens) < masked)
    routing = routing._replace(weights=routing.weights.detach().requires_grad_())
    leaves = {"x": randn(tokens, DIM), "w_down": randn(EXPERTS, OUT, HIDDEN)}
    leaves["w_up"] = randn(EXPERTS, 2 * HIDDEN if activation == "packed" else HIDDEN, DIM)
    if activation == "swiglu":
        leaves["w_gate"] = randn(EXPERTS, HIDDEN, DIM)
    if bias:
        leaves |= {"b_up": randn(EXPERTS, HIDDEN), "b_down": randn(EXPERTS, OUT)}
    return leaves, routing, "swiglu" if activation == "packed" else activation


def run(leaves, routing, activation, backend, upstream=None):
    with mmfused.backend(backend):
        out = grouped_mlp(**leaves, routing=routing, activation=activation)
    upstream = torch.ones_like(out) if upstream is None else upstream
    gradients = torch.autograd.grad(out, [*leaves.values(), routing.weights], upstream)
    return {"out": out.detach()} | dict(zip([*leaves, "weights"], gradients, strict=True))


def literal(leaves, routing, activation):
    """Compute the output by loops over tokens and experts."""
    x, out = leaves["x"], []
    w_up, w_gate = leaves["w_up"], leaves.get("w_gate")
    if activation == "swiglu" and w_gate is None:
        w_gate, w_up = w_up[:, :HIDDEN], w_up[:, HIDDEN:]
    live = {a // routing.indices.shape[1] for a in routing.order[: routing.offsets[-1]].tolist()}
    for t in range(len(x)):
        total = torch.zeros(OUT, dtype=torch.float64)
        for e, w in zip(routing.indices[t].tolist(), routing.weights[t], strict=True):
            h = w_up[e] @ x[t] + (leaves["b_up"][e] if "b_up" in leaves else 0)
            if activation == "swiglu":
                gate = w_gate[e] @ x[t]
                a = gate / (1 + torch.exp(-gate)) * h
            else:
                a = (
                    h.clamp(min=0)
                    if activation == "relu"
                    else h * (1 + torch.erf(h / math.sqrt(2))) / 2
                )
            y = leaves["w_down"][e] @ a + (leaves["b_down"][e] if "b_down" in leaves else 0)
            total = total + w * y if t in live else total
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_grouped_mlp_matches_the_equations(backend, activation, bias):
    leaves, routing, activation = make(activation, bias=bias)
    upstream = torch.randn(19, OUT, dtype=torch.float64)
    got, want = (
        run(leaves, routing, activation, backend, upstream),
        literal(leaves, routing, activation),
    )
    gradients = torch.autograd.grad(want, [*leaves.values(), routing.weights], upstream)
    torch.testing.assert_close(got.pop("out"), want.detach(), rtol=1e-12, atol=1e-12)
    for (name, value), expected in zip(got.items(), gradients, strict=True):
        torch.testing.assert_close(
            value, expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = {
    "no tokens": dict(tokens=0),
    "one token": dict(tokens=1, masked=0),
    "three tokens, three choices": dict(tokens=3, k=3),
    "all masked": dict(tokens=7, masked=1),
    "one choice": dict(k=1),
    "all to one expert": dict(
        k=1, masked=0, logits=torch.eye(EXPERTS, dtype=torch.float64)[[3]].expand(19, -1)
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ["gelu", "packed"])
def test_composed_matches_the_reference(activation, case):
    leaves, routing, activation = make(activation, **CASES[case])
    upstream = torch.randn(len(leaves["x"]), OUT, dtype=torch.float64)
    want, got = (
        run(leaves, routing, activation, backend, upstream) for backend in ("reference", "composed")
    )
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12)
    if case == "all to one expert":
        for name in ("w_up", "w_down"):
            assert not got[name][[0, 1, 2, 4]].any() and got[name][3].any()


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_masked_tokens_may_be_nan(backend):
    leaves, routing, activation = make()
    want = run(leaves, routing, activation, backend)
    masked = routing.position.view(19, 2)[:, 0] >= routing.offsets[-1]
    assert masked.any()
    with torch.no_grad():
        leaves["x"][masked] = math.nan
    got = run(leaves, routing, activation, backend)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert (
        not got["out"][masked].any()
        and not got["x"][masked].any()
        and not got["weights"][masked].any()
    )


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_grouped_linear_matches_einsum_and_grouped_mlp(gather, combine):
    """Two calls of grouped_linear, with an activation in between, give grouped_mlp."""
    leaves, routing, _ = make()
    x = leaves["x"] if gather else randn(38, DIM)
    bias = leaves["b_up"]
    outs = []
    for backend in ("reference", "composed"):
        with mmfused.backend(backend):
            out = grouped_linear(x, routing, leaves["w_up"], bias, gather=gather, combine=combine)
        inputs = [x, leaves["w_up"], bias, *([routing.weights] if combine else [])]
        outs.append(
            [
                out,
                *torch.autograd.grad(
                    out, inputs, torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
                ),
            ]
        )
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    rows = x[routing.order // 2] if gather else x
    expert = routing.indices.flatten()[routing.order]
    y = torch.einsum("roi,ri->ro", leaves["w_up"][expert], rows) + bias[expert]
    y = y * (torch.arange(38) < routing.offsets[-1])[:, None]
    want = (
        (y[routing.position].view(19, 2, -1) * routing.weights[:, :, None]).sum(1) if combine else y
    )
    torch.testing.assert_close(outs[0][0], want, rtol=1e-12, atol=1e-12)
    hidden = F.relu(grouped_linear(leaves["x"], routing, leaves["w_up"], leaves["b_up"]))
    out = grouped_linear(
        hidden, routing, leaves["w_down"], leaves["b_down"], gather=False, combine=True
    )
    torch.testing.assert_close(out, grouped_mlp(**leaves, routing=routing, activation="relu"))


def test_grouped_mm_matches_the_loop_over_experts(monkeypatch):
    """On a CPU, run torch's grouped_mm, which replaces the loop in bfloat16 on CUDA."""
    leaves, routing, activation = make(
        "swiglu", tokens=40, logits=torch.randn(40, EXPERTS).index_fill(1, torch.tensor(2), -99.0)
    )
    leaves = {
        name: F.pad(v, (0, 2)).detach().bfloat16().requires_grad_()
        for name, v in leaves.items()
        if name[0] != "b"
    }
    leaves["w_down"] = torch.randn(EXPERTS, 8, 16).bfloat16().requires_grad_()
    leaves["x"], leaves["w_up"], leaves["w_gate"] = (
        torch.randn(*s, 16).bfloat16().requires_grad_() for s in ((40,), (5, 16), (5, 16))
    )
    leaves |= {
        "b_up": torch.randn(5, 16).bfloat16().requires_grad_(),
        "b_down": torch.randn(5, 8).bfloat16().requires_grad_(),
    }
    routing = routing._replace(weights=routing.weights.detach().float().requires_grad_())
    want = run(leaves, routing, activation, "composed")
    if composed._grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    called = []
    real = composed._grouped_mm
    monkeypatch.setattr(composed, "_has_grouped_mm", lambda x, weight: True)
    monkeypatch.setattr(
        composed, "_grouped_mm", lambda *args, **kwargs: called.append(1) or real(*args, **kwargs)
    )
    got = run(
        leaves, routing, activation, "composed", torch.ones((), dtype=torch.bfloat16).expand(40, 8)
    )
    assert len(called) == 9
    for name, value in want.items():
        assert relative_error(got[name], value) < 2e-2, name
    assert not got["w_up"][2].any() and not got["b_down"][2].any()


def test_strided_weights_and_gradients_give_the_same_results():
    leaves, routing, activation = make("swiglu", bias=False)
    want = run(leaves, routing, activation, "composed")
    packed = torch.cat([leaves["w_gate"], leaves["w_up"]], 1).detach().requires_grad_()
    strided = {
        "x": leaves["x"].detach().T.contiguous().T.requires_grad_(),
        "w_down": leaves["w_down"]
        .detach()
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
        .requires_grad_(),
        "w_gate": packed[:, :HIDDEN],
        "w_up": packed[:, HIDDEN:],
    }
    got = run(
        strided,
        routing,
        activation,
        "composed",
        torch.ones((), dtype=torch.float64).expand(19, OUT),
    )
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-11, atol=1e-12)


def test_autocast_and_mixed_dtypes_work_and_second_derivatives_raise():
    leaves, routing, activation = make()
    exact = run(leaves, routing, activation, "reference")
    low = {name: value.detach().float().requires_grad_() for name, value in leaves.items()}
    routing = routing._replace(weights=routing.weights.detach().float().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(low, routing, activation, "composed")
    assert (
        got["out"].dtype == torch.bfloat16
        and got["w_up"].dtype == got["weights"].dtype == torch.float32
    )
    for name, value in got.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        assert error < 2e-2, (name, error)
    mixed = low | {"x": low["x"].detach().bfloat16().requires_grad_()}
    assert run(mixed, routing, activation, "composed")["w_down"].dtype == torch.float32
    out = grouped_mlp(**low, routing=routing, activation=activation)
    gradient = torch.autograd.grad(out.sum(), low["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("only", ["x", "w_up", "w_down", "b_up", "b_down", "weights"])
def test_gradient_of_a_single_input(only):
    leaves, routing, activation = make()
    want = run(leaves, routing, activation, "composed")[only]
    free = {name: value.detach().requires_grad_(name == only) for name, value in leaves.items()}
    weights = routing.weights.detach().requires_grad_(only == "weights")
    out = grouped_mlp(**free, routing=routing._replace(weights=weights), activation=activation)
    leaf = weights if only == "weights" else free[only]
    assert torch.equal(torch.autograd.grad(out.sum(), leaf)[0], want)


# ---- the module ----------------------------------------------------------------------------------


def test_module_matches_topk_routing_and_grouped_mlp():
    moe = TopKMoE(
        DIM, HIDDEN, EXPERTS, 2, out_dim=OUT, activation="swiglu", score="sigmoid", num_segments=2
    ).double()
    x, segments, mask = randn(3, 7, DIM), torch.randint(0, 2, (3, 7)), torch.rand(3, 7) < 0.3
    out, routing = moe(x, segments=segments, token_padding_mask=mask)
    options = dict(
        score="sigmoid",
        num_segments=2,
        segments=segments.flatten(),
        token_padding_mask=mask.flatten(),
    )
    want = topk_routing(x.flatten(0, 1) @ moe.router.weight.T, 2, **options)
    assert (
        torch.equal(routing.indices, want.indices)
        and out.shape == (3, 7, OUT)
        and not out[mask].any()
    )
    weights = dict(
        w_up=moe.w_up, w_gate=moe.w_gate, w_down=moe.w_down, b_up=moe.b_up, b_down=moe.b_down
    )
    torch.testing.assert_close(
        out.flatten(0, 1), grouped_mlp(x.flatten(0, 1), want, **weights, activation="swiglu")
    )
    (out.square().sum() + routing.balance_loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in moe.parameters())
    again, _ = moe(x, segments=segments, token_padding_mask=mask, indices=routing.indices)
    assert torch.equal(again, out)


def test_module_state_jitter_and_options():
    available = torch.ones(1, EXPERTS, dtype=torch.bool)
    available[0, 1] = False
    moe = TopKMoE(
        DIM, HIDDEN, EXPERTS, bias=False, selection_bias=True, available=available, jitter=0.2
    )
    assert set(moe.state_dict()) == {
        "router.weight",
        "w_up",
        "w_down",
        "selection_bias",
        "available",
    }
    other = TopKMoE(
        DIM, HIDDEN, EXPERTS, bias=False, selection_bias=True, available=~available, jitter=0.2
    )
    other.load_state_dict(moe.state_dict())
    x = torch.randn(9, DIM)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    assert torch.equal(moe.eval()(x)[0], other.eval()(x)[0]) and torch.equal(moe(x)[0], moe(x)[0])
    mmfused.update_selection_bias(moe.selection_bias, moe(x)[1].counts, rate=0.5)
    assert moe.selection_bias[1] > 0 and moe(x)[1].counts[0, 1] == 0
    meta = TopKMoE(DIM, HIDDEN, EXPERTS, selection_bias=True).to("meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert (
        all(p.abs().max() <= max(DIM, HIDDEN) ** 0.5 for p in meta.parameters())
        and not meta.selection_bias.any()
    )
    assert "num_experts=5, top_k=2" in repr(moe)


def test_repeated_and_checkpointed_calls_agree_bit_for_bit():
    moe, x = TopKMoE(DIM, HIDDEN, EXPERTS, jitter=0.3), torch.randn(50, DIM, requires_grad=True)

    def step(wrap):
        torch.manual_seed(7)
        out, routing = wrap(x)
        total = out.square().sum() + routing.balance_loss + routing.z_loss
        return [out.detach(), *torch.autograd.grad(total, [x, *moe.parameters()])]

    want = step(moe)
    for got in (step(moe), step(lambda x: checkpoint(moe, x, use_reentrant=False))):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backward_saves_only_tensors_of_the_routed_rows():
    """No tensor of size tokens x experts x hidden may be saved."""
    moe, x = TopKMoE(32, 64, 16, 2, bias=False), torch.randn(256, 32)
    routed = 4 * 512 * (32 + 64 + 64 + 32 + 32)
    assert saved_bytes(lambda: moe(x)[0], (x, *moe.parameters())) < 2 * routed


BAD = {
    "weight: got shape (5, 14, 10), expected (5, out, 9)": lambda v, r: grouped_linear(
        v["x"][:, :9], r, v["w_up"]
    ),
    "bias: got shape (14,), expected (5, 14)": lambda v, r: grouped_linear(
        v["x"], r, v["w_up"], v["b_up"][0]
    ),
    "x: got shape (18, 10), expected (19, dim): the tokens": lambda v, r: grouped_linear(
        v["x"][1:], r, v["w_up"]
    ),
    "x: got shape (19, 10), expected (38, dim): the sorted rows": lambda v, r: grouped_linear(
        v["x"], r, v["w_up"], gather=False
    ),
    "routing: got a Tensor": lambda v, r: grouped_linear(v["x"], r.indices, v["w_up"]),
    "weight: got dtype torch.float16": lambda v, r: grouped_linear(v["x"], r, v["w_up"].half()),
    "x: got dtype torch.int64": lambda v, r: grouped_linear(v["x"].long(), r, v["w_up"]),
    "activation: got 'tanh', expected one of gelu, relu, swiglu": lambda v, r: grouped_mlp(
        **v, routing=r, activation="tanh"
    ),
    "w_gate: got a tensor with activation 'gelu'": lambda v, r: grouped_mlp(
        **v, routing=r, w_gate=v["w_up"]
    ),
    "w_up: got shape (5, 13, 10), expected (5, 14, 10)": lambda v, r: grouped_mlp(
        **{**v, "w_up": v["w_up"][:, 1:]}, routing=r
    ),
    "w_up: got shape (5, 14, 10), expected (5, 28, 10)": lambda v, r: grouped_mlp(
        **v, routing=r, activation="swiglu"
    ),
    "w_down: got shape (4, 6, 14), expected (5, out": lambda v, r: grouped_mlp(
        **{**v, "w_down": v["w_down"][1:]}, routing=r
    ),
    "b_down: got shape (5, 5), expected (5, 6)": lambda v, r: grouped_mlp(
        **{**v, "b_down": v["b_down"][:, 1:]}, routing=r
    ),
    "top_k: got 6, expected 1 to 5": lambda v, r: TopKMoE(DIM, HIDDEN, EXPERTS, 6),
    "activation: got 'silu'": lambda v, r: TopKMoE(DIM, HIDDEN, EXPERTS, activation="silu"),
    "unexpected keyword argument 'capacity'": lambda v, r: TopKMoE(
        DIM, HIDDEN, EXPERTS, capacity=1.25
    ),
    "x: got shape (19, 9), expected (..., 10)": lambda v, r: TopKMoE(DIM, HIDDEN, EXPERTS)(
        v["x"][:, :9].float()
    ),
    "segments: got shape (19, 1), expected (19,)": lambda v, r: TopKMoE(DIM, HIDDEN, EXPERTS)(
        v["x"].float(), segments=torch.zeros(19, 1).long()
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises(message):
    leaves, routing, _ = make()
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message](leaves, routing)
    assert message in str(caught.value)
