"""Tests that a model gives the same numbers after fuse(model).

The models are small, random instances of real classes of torch, timm, open_clip and transformers.
"""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children_cases import ATTACHMENTS
from fuse_models import (
    CASES,
    DEVICE,
    B,
    D,
    H,
    K,
    N,
    after,
    cross,
    data,
    latent,
    open_clip_pool,
    plain_call,
    q_former,
    setting,
    siglip2_head,
    torch_attention,
)
from torch import nn

import mmfused
from mmfused import fuse, unfuse
from mmfused.fuse import attention as attention_swaps
from mmfused.fuse import pooling as pooling_swaps
from mmfused.fuse import q_former as q_former_swaps
from mmfused.testing import over_budget


@pytest.fixture
def library_calls(monkeypatch):
    """Return a list that collects the query shapes of this library's attention calls."""
    calls = []
    for module, name in (
        (attention_swaps, "attend"),
        (pooling_swaps, "query_pooling"),
        (q_former_swaps, "query_pooling"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda x, q, *a, real=real, **k: (calls.append(q.shape), real(x, q, *a, **k))[1],
        )
    return calls


def build(case, dtype=torch.float64):
    # A case may omit up to three values at the end.
    make, inputs, call, swapped, left = (
        CASES[case] + (plain_call, {""}, set())[len(CASES[case]) - 2 :]
    )
    model = make().to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # parameters of 0 would hide a wrong gradient
            parameter.copy_(
                torch.randn(parameter.shape)
                * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
            )
    return model.to(dtype), data(inputs), call, swapped, left


def results(model, call, inputs, dtype=torch.float64):
    """Return the output, and the gradient of every parameter and floating input."""
    inputs = {
        k: v.to(dtype).detach().requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    out = call(model, *inputs.values())
    leaves = {k: v for k, v in inputs.items() if v.requires_grad} | dict(model.named_parameters())
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return {"out": out.detach()} | {
        f"d{k}": g for k, g in zip(leaves, gradients, strict=True) if g is not None
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_fused_model_matches_the_original_in_float64(case, training, library_calls):
    model, inputs, call, swapped, left = build(case)
    model.train(training)
    want = results(model, call, inputs)
    report = fuse(model)
    assert set(report.swapped) == swapped and set(report.left) == left, report
    got = results(model, call, inputs)
    assert len(library_calls) == len(swapped)
    for name in want:  # atol: the key bias's gradient is 0, up to rounding errors
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert got.keys() == want.keys()


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("blip2")])
def test_fused_model_keeps_the_error_budget_in_float32(case, library_calls):
    """Whole Q-Formers are skipped, because self-attention magnifies rounding errors.

    The case "instructblip" tests the cross-attention module alone.
    """
    model, inputs, call, swapped, _ = build(case)
    inputs = {k: v.float().double() if v.is_floating_point() else v for k, v in inputs.items()}
    model.float().double()
    exact = results(model, call, inputs)
    model.float()
    plain = results(model, call, inputs, torch.float32)
    fuse(model)
    actual = results(model, call, inputs, torch.float32)
    assert len(library_calls) == len(swapped)
    # The exact gradient of a key bias is 0.
    noise = {name for name, value in exact.items() if value.norm() < 1e-10}
    assert all(actual[name].norm() < 1e-4 for name in noise)
    assert not over_budget(
        *({k: v for k, v in d.items() if k not in noise} for d in (actual, exact, plain))
    )


@pytest.mark.parametrize("case", CASES)
def test_unfuse_restores_the_model(case, library_calls):
    model, inputs, call, swapped, _ = build(case)
    names = {name: type(module) for name, module in model.named_modules()}
    state, parameters = model.state_dict(), list(map(id, model.parameters()))
    want = call(model, *inputs.values())
    dry = fuse(model, dry_run=True)
    assert {name: type(module) for name, module in model.named_modules()} == names
    report = fuse(model)
    assert (report, dict(model.named_modules()).keys()) == (dry, names.keys())
    for name, module in model.named_modules():
        assert isinstance(module, names[name]) and type(module).__name__ == names[name].__name__
        assert (type(module) is not names[name]) == (name in swapped)
    again = fuse(model)
    assert set(again.swapped) == swapped and all(
        phrase.startswith("already swapped") for phrase in again.swapped.values()
    )
    fused_state = model.state_dict()
    assert list(fused_state) == list(state) and all(
        torch.equal(fused_state[k], state[k]) for k in state
    )
    assert list(map(id, model.parameters())) == parameters
    model.load_state_dict(state)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        library_calls.clear()
        torch.testing.assert_close(call(copied, *inputs.values()), want, rtol=1e-10, atol=1e-12)
        assert len(library_calls) == len(swapped)
        assert set(unfuse(copied)) == swapped and fuse(copied) == report
    assert set(unfuse(model)) == swapped and unfuse(model) == []
    assert {name: type(module) for name, module in model.named_modules()} == names
    library_calls.clear()
    assert torch.equal(call(model, *inputs.values()), want) and not library_calls


def test_expanded_queries_are_passed_unexpanded(library_calls):
    for case in ("torch, sequence first", "torch, batch first"):
        model, inputs, call, _, _ = build(case)
        fuse(model)
        call(model, *inputs.values())
    assert library_calls == [(5, D), (5, D)]


def test_report_lists_swapped_and_left_modules():
    model, *_ = build("open_clip, a tower")
    report = fuse(model)
    assert report.swapped["attn_pool"].startswith("pools; ln_k is folded")
    assert report.left == {
        "transformer.resblocks.0.attn": "Self-attention: its tokens are its queries."
    }
    assert str(report).startswith("fuse: 1 swapped, 1 left\n") and "FusedAttentionalPooler" in repr(
        model
    )
    assert "(root)" in str(fuse(nn.MultiheadAttention(D, H)))
    # The original classes are unchanged.
    assert type(nn.MultiheadAttention(D, H)) is nn.MultiheadAttention
    assert "Fused" not in repr(open_clip_pool())
    assert fuse(nn.Linear(2, 2)) == mmfused.FuseReport() and str(mmfused.FuseReport()).startswith(
        "fuse: 0 swapped, 0 left. No module that fuse knows"
    )
    with pytest.raises(TypeError, match="fuse: model: got a int, expected a torch.nn.Module"):
        fuse(1)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


INT8 = nn.Parameter(torch.ones(3 * D, D, dtype=torch.int8), requires_grad=False)


def hook(model):
    model.kv.register_forward_hook(lambda *args: None)


LEFT = {
    "OwnAttention is a subclass of MultiheadAttention": lambda: OwnAttention(D, H),
    "dropout is 1.0: query_pooling takes": lambda: nn.MultiheadAttention(D, H, dropout=1.0),
    "kdim 20, vdim 36": lambda: nn.MultiheadAttention(D, H, kdim=K),
    "add_bias_kv": lambda: nn.MultiheadAttention(D, H, add_bias_kv=True),
    "add_zero_attn": lambda: nn.MultiheadAttention(D, H, add_zero_attn=True),
    "not floating-point": lambda: after(torch_attention(), setting("in_proj_weight", INT8)),
    "Self-attention: its tokens": lambda: nn.TransformerEncoderLayer(D, H, 24, dropout=0.0),
    "k_norm is a LayerNorm": lambda: latent(qk_norm=True),
    "q_norm is a BatchNorm1d": lambda: after(latent(), setting("q_norm", nn.BatchNorm1d(D // H))),
    "scale is 1.0": lambda: after(latent(), setting("scale", 1.0)),
    "kv is a torch.nn.modules.container.Sequential": lambda: after(
        latent(), setting("kv", nn.Sequential(nn.Linear(D, 2 * D)))
    ),
    "kv has hooks": lambda: after(latent(), hook),
    "has no latent_len": lambda: after(latent(), lambda m: delattr(m, "latent_len")),
    "forward of this module was replaced": lambda: after(latent(), setting("forward", len)),
    "attention inside is a OwnAttention": lambda: after(
        siglip2_head(), setting("attention", OwnAttention(D, H))
    ),
    "attention_probs_dropout_prob is 1.0: query_pooling takes": lambda: cross(dropout=1.0),
    "attention implementation is 'eager'": lambda: cross(implementation="eager"),
}


@pytest.mark.parametrize("words", LEFT)
def test_left_modules_are_reported_with_a_reason(words):
    model = LEFT[words]()
    types = [type(module) for module in model.modules()]
    report = fuse(model)
    (reason,) = (text for text in report.left.values() if words in text)
    assert (
        reason.endswith(".")
        and [type(module) for module in model.modules()] == types
        and not report.swapped
    )


def test_module_with_an_unknown_argument_is_left(monkeypatch):
    pooler = siglip2_head()
    monkeypatch.setattr(
        type(pooler),
        "forward",
        lambda self, hidden_state, attention_mask=None, temperature=1.0: hidden_state,
    )
    assert "takes temperature, which fuse does not know" in fuse(pooler).left[""]


def test_unfuse_rejects_a_subclass_of_a_fused_class():
    model = after(latent(), fuse)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(
        TypeError, match="unfuse: .root.: got a .*Wrapped, derived from a fused class"
    ):
        unfuse(model)
    assert "subclass of AttentionPoolLatent" in fuse(model).left[""]


# ---- unsupported calls run the original ----------------------------------------------------------


def go_eager(model):
    model.config._attn_implementation = "eager"


QUERY_MASK = torch.rand(B, 1, 5, N, generator=torch.Generator().manual_seed(0)) < 0.7
QUERY_MASK[..., 0] = True
KEY_MASK = QUERY_MASK[:, :, :1]


FALLBACKS = {
    "need_weights": (torch_attention, lambda m, q, x: m(q, x, x)),
    "weights of each head": (
        torch_attention,
        lambda m, q, x: m(q, x, x, average_attn_weights=False),
    ),
    "attn_mask": (
        torch_attention,
        lambda m, q, x: m(q, x, x, need_weights=False, attn_mask=QUERY_MASK[0, 0].to(x.device)),
    ),
    "float padding": (torch_attention, lambda m, q, x: m(q, x, x, x[..., 0], need_weights=False)),
    "other values": (torch_attention, lambda m, q, x: m(q, x, x + 1, need_weights=False)),
    "self-attention": (torch_attention, lambda m, q, x: m(x, x, x, need_weights=False)),
    "unbatched": (torch_attention, lambda m, q, x: m(q[0], x[0], x[0], need_weights=False)),
    "dropout set later": (
        torch_attention,
        lambda m, q, x: after(m.eval(), setting("dropout", 1.0))(q, x, x, need_weights=False),
    ),
    "timm, float mask": (latent, lambda m, q, x: m(x, x[:, None, None, :, 0])),
    "timm, a mask for each query": (
        lambda: latent(latent_len=5),
        lambda m, q, x: m(x, QUERY_MASK.to(x.device)),
    ),
    "timm, unfused bool mask": (
        lambda: after(latent(), setting("fused_attn", False)),
        lambda m, q, x: m(x, KEY_MASK.to(x.device)),
    ),
    "timm, hook set later": (latent, lambda m, q, x: after(m, hook)(x)),
    "siglip2, 4-D mask": (siglip2_head, lambda m, q, x: m(x, KEY_MASK.to(x.device))),
    "blip2, mask repeated": (
        q_former,
        lambda m, q, x: m(q, 5, None, x[..., :K], KEY_MASK[:, 0, 0].to(x.device))[0],
    ),
    "blip2, mask for each query": (
        cross,
        lambda m, q, x: m(q, None, x[..., :K], QUERY_MASK.to(x.device))[0],
    ),
    "blip2, float mask": (cross, lambda m, q, x: m(q, None, x[..., :K], x[:, None, None, :, 0])[0]),
    "blip2, eager set later": (cross, lambda m, q, x: after(m, go_eager)(q, None, x[..., :K])),
    "blip2, output_attentions": (
        cross,
        lambda m, q, x: m(q, None, x[..., :K], output_attentions=True)[0],
    ),
    "blip2, position bias": (
        cross,
        lambda m, q, x: m(q, None, x[..., :K], position_bias=x[:, None, :5, :N])[0],
    ),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_unsupported_calls_run_the_original(name, library_calls):
    make, call = FALLBACKS[name]
    model = make().to(DEVICE, torch.float64)
    q, x = data("q, x").values()
    want = call(copy.deepcopy(model), q, x)
    got = call(after(model, fuse), q, x)
    assert not library_calls
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (got, want)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("case", [case for case in CASES if "mask" in CASES[case][1]])
def test_nan_in_padding_has_no_effect(case):
    model, inputs, call, _, _ = build(case)
    want = results(model, call, inputs)
    fuse(model)
    inputs["x" if "x" in inputs else "k"][inputs["mask"]] = float("nan")
    got = results(model, call, inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


# The heads of SigLIP 2 and Phi-4 differ there: docs/fuse.md.
@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize(
    "case", ["torch, sequence first", "torch, batch first", "timm, masked", "blip2, padded"]
)
def test_a_sample_with_padding_only_gives_the_original_result(case, backend):
    model, inputs, call, _, _ = build(case)
    inputs["mask"][1] = True
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros at first, which would hide a bias that is left out
                parameter.normal_()
    want = results(model, call, inputs)
    fuse(model)
    with mmfused.backend(backend):
        got = results(model, call, inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_fused_model_keeps_the_error_budget_under_autocast(case, library_calls):
    model, inputs, call, swapped, _ = build(case, torch.float32)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = call(model, *inputs.values())
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = call(model, *inputs.values())
        fuse(model)
        actual = call(model, *inputs.values())
        assert actual.dtype == plain.dtype and len(library_calls) == len(swapped)
        actual.float().sum().backward()
    assert not over_budget({"out": actual}, {"out": exact.double()}, {"out": plain})


def test_dropout_after_the_attention_draws_the_same_numbers(library_calls):
    model = latent(drop=0.5).double().to(DEVICE)
    x = data("x")["x"]
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(model(x))
        fuse(model)
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-12)
    assert len(library_calls) == 1


DROPOUT_CASES = {  # name -> (make a model, call it)
    "torch": (
        lambda: torch_attention(dropout=0.3),
        lambda m, q, x: m(q, x, x, need_weights=False)[0],
    ),
    "open_clip": (
        lambda: after(open_clip_pool(), lambda m: setting("dropout", 0.3)(m.attn)),
        lambda m, q, x: m(x[..., :K]),
    ),
    "blip2": (lambda: cross(dropout=0.3), lambda m, q, x: m(q, None, x[..., :K])[0]),
}


@pytest.mark.parametrize("name", DROPOUT_CASES)
def test_dropout_of_attention_weights_keeps_its_distribution(name, library_calls):
    """Compare the output's mean and standard deviation over 4000 copies of one sample.

    In eval mode, compare the output itself.
    """
    make, call = DROPOUT_CASES[name]
    model = make().to(DEVICE, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape)
                * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
            )
    q, x = (t[:1].expand(4000, -1, -1) for t in data("q, x").values())
    want, exact = call(model, q, x).detach(), call(model.eval(), q, x).detach()
    assert "; dropout 0.3 of attention weights has the same distribution" in fuse(model).swapped[""]
    torch.testing.assert_close(call(model, q, x), exact, rtol=1e-10, atol=1e-12)
    got = call(model.train(), q, x).detach()
    assert len(library_calls) == 2 and not torch.equal(got[0], got[1])
    sigma = want.std(0)
    assert ((got.mean(0) - exact[0]).abs() < 6 * sigma / 4000**0.5).all()
    torch.testing.assert_close(got.std(0), sigma, rtol=0.1, atol=0.0)


def run_python(code):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMFUSED_BACKEND")}
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent, here)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fused_model_compiles_without_a_graph_break():
    """A model that is fused after its compilation is compiled again."""
    for module in ("timm", "open_clip", "transformers"):
        pytest.importorskip(module)
    run_python("""
import torch, mmfused, test_fuse
from torch._dynamo.utils import counters

for case in test_fuse.CASES:
    torch._dynamo.reset()
    model, inputs, call, swapped, _ = test_fuse.build(case)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    counters.clear()
    if case == "timm":
        call(compiled, *inputs.values())
    assert mmfused.fuse(model).swapped
    want = test_fuse.results(model, call, inputs)
    got = test_fuse.results(model, lambda m, *i: call(compiled, *i), inputs)
    assert counters["stats"]["unique_graphs"] == 1 + (case == "timm"), (case, counters["stats"])
    assert got.keys() == want.keys()
    for name in want:
        message = lambda m: f"{case}, {name}: {m}"
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12, msg=message)
print("done")
""")


def test_another_process_loads_a_fused_model(tmp_path):
    model, inputs, call, _, _ = build("timm")
    torch.save(
        (after(model, fuse).cpu(), inputs["x"].cpu(), call(model, *inputs.values()).detach().cpu()),
        tmp_path / "model.pt",
    )
    run_python(f"""
import sys, torch
model, x, want = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert repr(model).startswith("FusedAttentionPoolLatent(")
torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)
print("done")
""")


def test_fuse_imports_no_other_library():
    run_python("""
import sys, torch, mmfused
assert mmfused.fuse(torch.nn.MultiheadAttention(8, 2)).swapped
assert not {"timm", "transformers", "open_clip"} & set(sys.modules)
print("done")
""")


# ---- modified children of a swapped module -------------------------------------------------------


@pytest.mark.parametrize(
    "attachment",
    ["LoRA", "LoRA, merged", "pruning", "weight_norm", "spectral_norm", "forward hook", "DoRA"],
)
@pytest.mark.parametrize("case", ["timm", "blip2"])
def test_modified_children_take_effect(case, attachment, library_calls):
    """The swapped module reads effective weights, or runs the original forward."""
    attached = ATTACHMENTS[attachment]
    if attached.needs:
        pytest.importorskip(attached.needs)
    make, names, call = {
        "timm": (latent, ["kv"], lambda m, q, x: m(x)),
        "blip2": (cross, ["key", "value"], lambda m, q, x: m(q, None, x[..., :K])[0]),
    }[case]
    model, results = make(), []
    model.train(attached.training)
    q, x = (t.requires_grad_() for t in data("q, x").values())
    for fused in (False, True):
        torch.manual_seed(4)
        copied = copy.deepcopy(model)
        if fused:
            assert fuse(copied).swapped
        attached.attach(copied, names).to(DEVICE, torch.float64).train(attached.training)
        out = call(copied, q, x)
        leaves = [t for t in (q, x, *copied.parameters()) if t.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        results.append([out, *(g for g in gradients if g is not None)])
    assert len(library_calls) == attached.reads
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
