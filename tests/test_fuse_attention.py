"""Tests of fuse(model) on cross-attention between two inputs.

UniECS's and UniCA's layers in plain PyTorch are also compared with this library's modules.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fuse_models import DEVICE
from torch import nn

import mmfused
from mmfused import (
    BidirectionalGatedCrossAttention,
    GatedCrossAttention,
    fuse,
    query_pooling,
    unfuse,
)
from mmfused.fuse import attention
from mmfused.testing import over_budget

B, N, M = 3, 11, 7  # samples, tokens of input a, tokens of input b
D, E, H = 36, 20, 3  # width of a, width of b in some cases, heads


class Exchange(nn.Module):
    """Two inputs attend to each other, with residuals and post-norm, as in LXMERT and UniCA."""

    def __init__(self, **options):
        super().__init__()
        self.a_reads_b, self.b_reads_a = (nn.MultiheadAttention(D, H, **options) for _ in range(2))
        self.norm_a, self.norm_b = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mix = nn.MultiheadAttention(D, H, **options)

    def forward(self, a, b, mask_a=None, mask_b=None):
        if not self.mix.batch_first:
            a, b = a.transpose(0, 1), b.transpose(0, 1)
        read_a = self.a_reads_b(a, b, b, key_padding_mask=mask_b, need_weights=False)[0]
        read_b = self.b_reads_a(b, a, a, key_padding_mask=mask_a, need_weights=False)[0]
        a, b = self.norm_a(a + read_a), self.norm_b(b + read_b)
        a = a + self.mix(a, a, a, key_padding_mask=mask_a, need_weights=False)[0]
        return torch.cat((a, b), 1 if self.mix.batch_first else 0)


class BiAttention(nn.Module):
    """GroundingDINO's fusion layer with torch's attention, pre-norm and scaled residuals."""

    def __init__(self, **options):
        super().__init__()
        self.norm_vision, self.norm_text = nn.LayerNorm(D), nn.LayerNorm(E)
        self.vision_attn = nn.MultiheadAttention(D, H, kdim=E, vdim=E, batch_first=True, **options)
        self.text_attn = nn.MultiheadAttention(E, 2, kdim=D, vdim=D, batch_first=True, **options)
        self.vision_scale, self.text_scale = (
            nn.Parameter(torch.ones(D)),
            nn.Parameter(torch.ones(E)),
        )

    def forward(self, vision, text, vision_mask=None, text_mask=None):
        vision, text = self.norm_vision(vision), self.norm_text(text)
        v, _ = self.vision_attn(vision, text, text, key_padding_mask=text_mask, need_weights=False)
        t, _ = self.text_attn(
            text, vision, vision, key_padding_mask=vision_mask, need_weights=False
        )
        return torch.cat(
            ((vision + self.vision_scale * v).flatten(1), (text + self.text_scale * t).flatten(1)),
            1,
        )


class Resampler(nn.Module):
    """One query of each sample attends to many tokens."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, a, b, mask_a=None, mask_b=None):
        return self.attn(b[:, :1], a, a, key_padding_mask=mask_a, need_weights=False)[0]


def decoder():
    return nn.TransformerDecoderLayer(D, H, 24, dropout=0.0)


def read_memory(model, a, b, mask_a=None, mask_b=None):
    return model(a.transpose(0, 1), b.transpose(0, 1), memory_key_padding_mask=mask_b)


def plain_call(model, *inputs):
    return model(*inputs)


# name -> (make a model, width of b, call the model, swapped names, left names, number of calls of
# ``attend``, number of calls of ``query_pooling``)
CASES = {
    "exchange": (
        lambda: Exchange(batch_first=True),
        D,
        plain_call,
        {"a_reads_b", "b_reads_a", "mix"},
        set(),
        2,
        0,
    ),
    "sequence first": (
        lambda: Exchange(bias=False),
        D,
        plain_call,
        {"a_reads_b", "b_reads_a", "mix"},
        set(),
        2,
        0,
    ),
    "bi-attention": (BiAttention, E, plain_call, {"vision_attn", "text_attn"}, set(), 2, 0),
    "few queries": (Resampler, D, plain_call, {"attn"}, set(), 1, 1),
    "torch's decoder": (decoder, D, read_memory, {"multihead_attn"}, {"self_attn"}, 1, 0),
}


@pytest.fixture
def library_calls(monkeypatch):
    """Return a list that collects the names of this library's attention calls."""
    calls = []
    for module, name in (
        (attention, "attend"),
        (attention, "query_pooling"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))[1],
        )
    return calls


def randomised(model, dtype=torch.float64):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape)
                * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
            )
    return model.to(DEVICE, dtype)


def data(width, masked=True, dtype=torch.float64):
    inputs = {
        "a": torch.randn(B, N, D, dtype=dtype, device=DEVICE),
        "b": torch.randn(B, M, width, dtype=dtype, device=DEVICE),
    }
    if masked:
        for name, length, ends in (("mask_a", N, (N, 4, 7)), ("mask_b", M, (1, M, 5))):
            inputs[name] = (torch.arange(length) >= torch.tensor(ends)[:, None]).to(DEVICE)
    return inputs


def results(model, call, inputs):
    """Return the output, and the gradient of every parameter and floating input."""
    inputs = {
        k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()
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


def assert_same(got, want, rtol=1e-10, atol=1e-11):
    assert got.keys() == want.keys()
    for name in want:  # atol: the key bias's gradient is 0, up to rounding errors
        torch.testing.assert_close(
            got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_fused_model_matches_the_original_in_float64(case, masked, training, library_calls):
    make, width, call, swapped, left, calls, pooled = CASES[case]
    model, inputs = randomised(make()).train(training), data(width, masked)
    names = {name: type(module) for name, module in model.named_modules()}
    want = results(model, call, inputs)
    report = fuse(model)
    assert (set(report.swapped), set(report.left)) == (swapped, left), report
    assert_same(results(model, call, inputs), want)
    assert (library_calls.count("attend"), library_calls.count("query_pooling")) == (calls, pooled)
    assert all("including self-attention, runs" in phrase for phrase in report.swapped.values())
    assert all(
        reason == "Self-attention: its tokens are its queries." for reason in report.left.values()
    )
    assert (
        set(unfuse(model)) == swapped
        and {name: type(module) for name, module in model.named_modules()} == names
    )


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_fused_model_matches_the_original_on_other_backends(backend, library_calls):
    """The backends reference and fused do not use torch's attention."""
    model, inputs = (
        randomised(Exchange(batch_first=True), torch.float32),
        data(D, dtype=torch.float32),
    )
    want = results(model, plain_call, inputs)
    fuse(model)
    with mmfused.backend(backend):
        assert_same(results(model, plain_call, inputs), want, 1e-3, 1e-4)
    assert library_calls.count("query_pooling") == 2


@pytest.mark.parametrize("case", CASES)
def test_fused_model_keeps_the_error_budget_in_float32(case):
    make, width, call, *_ = CASES[case]
    model, inputs = randomised(make(), torch.float32).double(), data(width, dtype=torch.float32)
    exact = results(
        model, call, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    )
    plain = results(model.float(), call, inputs)
    fuse(model)
    actual = results(model, call, inputs)
    # The exact gradient of a key bias is 0.
    noise = {name for name, value in exact.items() if value.norm() < 1e-10}
    assert all(actual[name].norm() < 1e-4 for name in noise)
    assert not over_budget(
        *({k: v for k, v in d.items() if k not in noise} for d in (actual, exact, plain))
    )


@pytest.mark.parametrize("case", CASES)
def test_fused_model_keeps_the_error_budget_under_autocast(case, library_calls):
    make, width, call, *_, calls, _ = CASES[case]
    model, inputs = randomised(make(), torch.float32), data(width, dtype=torch.float32)
    exact = call(model, *inputs.values())
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = call(model, *inputs.values())
        fuse(model)
        actual = call(model, *inputs.values())
        assert actual.dtype == plain.dtype and library_calls.count("attend") == calls
        actual.float().sum().backward()
    assert not over_budget({"out": actual}, {"out": exact.double()}, {"out": plain})


def test_nan_in_padding_has_no_effect():
    model, inputs = randomised(Exchange(batch_first=True)), data(D)
    a_reads_b = model.a_reads_b

    def read(model, a, b, mask_a, mask_b):
        return model(a, b, b, key_padding_mask=mask_b, need_weights=False)[0]

    want = results(a_reads_b, read, inputs)
    fuse(model)
    inputs["b"][inputs["mask_b"]] = float("nan")
    assert_same(results(a_reads_b, read, inputs), want)
    inputs["mask_b"][1] = True
    got = results(a_reads_b, read, inputs)
    bias = a_reads_b.out_proj.bias
    assert torch.equal(got["out"][1], bias.expand_as(got["out"][1]))
    assert all(value.isfinite().all() for value in got.values())


ATTN_MASK = torch.rand(N, M, generator=torch.Generator().manual_seed(0)) < 0.3
ATTN_MASK[:, 0] = False

OTHER_CALLS = {
    "self-attention": lambda m, a, b: m(a, a, a, need_weights=False),
    "need_weights": lambda m, a, b: m(a, b, b),
    "weights of each head": lambda m, a, b: m(a, b, b, average_attn_weights=False),
    "attn_mask": lambda m, a, b: m(a, b, b, need_weights=False, attn_mask=ATTN_MASK.to(a.device)),
    "is_causal": lambda m, a, b: m(
        a, b, b, need_weights=False, attn_mask=ATTN_MASK.to(a.device), is_causal=True
    ),
    "float mask": lambda m, a, b: m(a, b, b, b[..., 0], need_weights=False),
    "other values": lambda m, a, b: m(a, b, b + 1, need_weights=False),
    "unbatched": lambda m, a, b: m(a[0], b[0], b[0], need_weights=False),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_unsupported_calls_run_the_original(name, library_calls):
    model, (a, b) = (
        randomised(nn.ModuleList([nn.MultiheadAttention(D, H, batch_first=True)])),
        data(D, False).values(),
    )
    want = OTHER_CALLS[name](copy.deepcopy(model[0]), a, b)
    assert fuse(model).swapped.keys() == {"0"}
    got = OTHER_CALLS[name](model[0], a, b)
    assert not library_calls
    for x, y in zip(got, want, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_left_modules_are_reported_with_a_reason():
    class Layer(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.cross_attn = nn.MultiheadAttention(D, H, **options)
            self.self_attention = nn.MultiheadAttention(D, H)

    for words, options in {
        "adds extra tokens": dict(add_bias_kv=True),
        "add_zero_attn": dict(add_zero_attn=True),
        "kdim 20, vdim 36": dict(kdim=E),
        "dropout is 1.0": dict(dropout=1.0),
    }.items():
        report = fuse(Layer(**options))
        assert words in report.left["cross_attn"] and report.left["self_attention"].startswith(
            "Self-attention: "
        )
        assert not report.swapped


def test_open_clip_block_is_left_because_key_is_not_value():
    block = pytest.importorskip("open_clip.transformer").ResidualAttentionBlock
    assert "key is not value" in fuse(block(D, H, is_cross_attention=True)).left["attn"]
    assert "Self-attention: " in fuse(block(D, H)).left["attn"]


def test_dropout_of_attention_weights_keeps_its_distribution(library_calls):
    """Compare the output's mean and standard deviation over 4000 copies of one sample.

    In eval mode, compare the output itself.
    """
    model = randomised(nn.MultiheadAttention(D, H, batch_first=True, dropout=0.3))
    a, b = (t[:1].repeat(4000, 1, 1) for t in data(D, False).values())

    def call():
        return model(a, b, b, need_weights=False)[0].detach()

    want, exact = call(), model.eval()(a, b, b, need_weights=False)[0].detach()
    assert "; dropout 0.3 of attention weights has the same distribution" in fuse(model).swapped[""]
    torch.testing.assert_close(call(), exact, rtol=1e-10, atol=1e-12)
    model.train()
    got = call()
    assert library_calls == ["attend"] * 2 and not torch.equal(got[0], got[1])
    sigma = want.std(0)
    assert ((got.mean(0) - exact[0]).abs() < 6 * sigma / 4000**0.5).all()
    torch.testing.assert_close(got.std(0), sigma, rtol=0.1, atol=0.0)


def test_fused_model_compiles_without_a_graph_break():
    code = """
import torch, mmfused, test_fuse_attention as t
from torch._dynamo.utils import counters

for case, (make, width, call, *_) in t.CASES.items():
    torch._dynamo.reset()
    model, inputs = t.randomised(make()), t.data(width)
    assert mmfused.fuse(model).swapped
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    counters.clear()
    t.assert_same(
        t.results(model, lambda m, *i: call(compiled, *i), inputs), t.results(model, call, inputs)
    )
    assert counters["stats"]["unique_graphs"] == 1, (case, counters["stats"])
print("done")
"""
    here = mmfused.__path__[0] + "/.."
    env = {"PYTHONPATH": f"{here}:{here}/tests", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


# ---- GroundingDINO -------------------------------------------------------------------------------


class SharedLogits(nn.Module):
    """GroundingDINO's bi-attention, written with two calls of query_pooling.

    One direction's logits are the transpose of the other's: ``vision_proj`` and ``text_proj`` each
    give the queries of one direction and the keys of the other.
    """

    def __init__(self, dim, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for name in ("vision_proj", "text_proj", "values_vision_proj", "values_text_proj"):
            self.add_module(name, nn.Linear(dim, embed_dim))
        self.out_vision_proj, self.out_text_proj = (
            nn.Linear(embed_dim, dim),
            nn.Linear(embed_dim, dim),
        )

    def read(self, x, query, context, key, value, mask):
        weights = (key.weight, value.weight, value.bias, key.bias)
        return query_pooling(
            context, query(x), *weights, num_heads=self.num_heads, key_padding_mask=mask
        )

    def forward(self, vision, text, vision_mask, text_mask):
        v, t = self.vision_proj, self.text_proj
        read_vision = self.read(vision, v, text, t, self.values_text_proj, text_mask)
        read_text = self.read(text, t, vision, v, self.values_vision_proj, vision_mask)
        return torch.cat((self.out_vision_proj(read_vision), self.out_text_proj(read_text)), 1)


@pytest.mark.parametrize(
    "model, prefix", [("grounding_dino", "GroundingDino"), ("mm_grounding_dino", "MMGroundingDino")]
)
def test_grounding_dino_is_left_and_matches_two_query_poolings(model, prefix):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    config = getattr(
        pytest.importorskip(f"transformers.models.{model}.configuration_{model}"), f"{prefix}Config"
    )
    sizes = dict(d_model=D, encoder_ffn_dim=2 * 24, encoder_attention_heads=2 * H)
    layer = randomised(
        getattr(modeling, f"{prefix}FusionLayer")(
            config(**sizes, fusion_dropout=0.0, fusion_droppath=0.0)
        )
    )
    report = fuse(layer)
    assert not report.swapped and report.left.keys() == {"attn"}
    assert report.left["attn"].startswith(
        "It returns the attention weights of both directions in every call"
    )
    ours = SharedLogits(D, 24, H).to(DEVICE, torch.float64)
    ours.load_state_dict(layer.attn.state_dict())
    inputs = data(D)

    def original(attn, *inputs):
        (v, _), (t, _) = attn(*inputs)
        return torch.cat((v, t), 1)

    assert_same(results(ours, plain_call, inputs), results(layer.attn, original, inputs))


# ---- layers of the papers in plain PyTorch -------------------------------------------------------


class PlainUniECS(nn.Module):
    """UniECS's gated layer as in its released code, with other parameter names."""

    def __init__(self):
        super().__init__()
        self.ln_v, self.ln_t = nn.LayerNorm(D), nn.LayerNorm(D)
        for way in ("v2t", "t2v"):
            for part in ("query", "key", "value", "out"):
                self.add_module(f"{way}_{part}", nn.Linear(D, D))
            self.add_module(f"{way}_gate", nn.Linear(2 * D + 1, D))

    def read(self, way, x, context):
        def heads(part, y):
            return getattr(self, f"{way}_{part}")(y).view(*y.shape[:2], H, D // H).transpose(1, 2)

        q, k, v = heads("query", x), heads("key", context), heads("value", context)
        probs = (q @ k.transpose(-1, -2) / (D // H) ** 0.5).softmax(-1)
        return getattr(self, f"{way}_out")((probs @ v).transpose(1, 2).reshape(x.shape))

    def forward(self, v, t):
        vn, tn = self.ln_v(v), self.ln_t(t)
        outs = []
        for way, x, xn, other in (("v2t", v, vn, tn), ("t2v", t, tn, vn)):
            read = self.read(way, xn, other)
            present = (other.abs().sum() > 1e-6).to(x).expand(*x.shape[:2], 1)
            g = torch.sigmoid(getattr(self, f"{way}_gate")(torch.cat([x, read, present], -1)))
            outs.append(g * read + (1 - g) * x)
        return torch.cat(outs, 1)


UNIECS = {"ln_v": "norm_a", "ln_t": "norm_b"} | {
    f"{theirs}_{part}": f"{ours}.{name}_proj"
    for theirs, ours in (("v2t", "to_a"), ("t2v", "to_b"))
    for part, name in (
        ("query", "q"),
        ("key", "k"),
        ("value", "v"),
        ("out", "out"),
        ("gate", "gate"),
    )
}


def renamed(state, names):
    parts = {name: name.rpartition(".") for name in state}
    return {f"{names[head]}.{tail}": state[name] for name, (head, _, tail) in parts.items()}


@pytest.mark.parametrize("missing", [None, "a", "b"])
def test_uniecs_layer_matches_the_module(missing):
    """Compare the three passes of UniECS: with both inputs, without input a, without input b.

    A missing input is all zeros and still attended to. One presence flag holds for the whole batch.
    """
    plain = randomised(PlainUniECS())
    if missing:  # with a bias in the norms, normalised zeros would count as present
        nn.init.zeros_(plain.ln_v.bias), nn.init.zeros_(plain.ln_t.bias)
    ours = BidirectionalGatedCrossAttention(D, H, missing="attend", indicator="batch").to(
        DEVICE, torch.float64
    )
    ours.load_state_dict(renamed(plain.state_dict(), UNIECS))
    inputs = data(D, False)
    if missing:
        inputs[missing] = torch.zeros_like(inputs[missing])
    flags = {f"{side}_present": torch.full((B,), side != missing, device=DEVICE) for side in "ab"}
    want = results(plain, plain_call, inputs)
    got = results(ours, lambda m, a, b: torch.cat(m(a, b, **flags), 1), inputs)
    assert_same(got, {"out": want["out"]} | renamed_gradients(want))


def renamed_gradients(found):
    """Rename the parameters' gradients to the module's names; keep the inputs' gradients."""
    parameters = {name[1:]: value for name, value in found.items() if "." in name}
    inputs = {name: value for name, value in found.items() if name in ("da", "db")}
    return inputs | {f"d{name}": value for name, value in renamed(parameters, UNIECS).items()}


def test_unica_layer_matches_the_module():
    """UniCA's layer is nn.MultiheadAttention, then residual and norm."""
    attention, norm = (
        randomised(nn.MultiheadAttention(D, H, kdim=E, vdim=E, batch_first=True)),
        randomised(nn.LayerNorm(D)),
    )
    ours = GatedCrossAttention(D, H, context_dim=E, gate="none", pre_norm=False).to(
        DEVICE, torch.float64
    )
    theirs = attention.state_dict()
    state = {f"{part}_proj.weight": theirs[f"{part}_proj_weight"] for part in "qkv"}
    state |= {
        f"{part}_proj.bias": bias
        for part, bias in zip("qkv", theirs["in_proj_bias"].chunk(3), strict=True)
    }
    state |= {f"out_proj.{kind}": theirs[f"out_proj.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(
        state | {f"norm_x.{name}": value for name, value in norm.state_dict().items()}
    )
    a, b, _, mask = data(E).values()
    want = norm(a + attention(a, b, b, key_padding_mask=mask, need_weights=False)[0])
    torch.testing.assert_close(
        ours(a, b, context_key_padding_mask=mask), want, rtol=1e-10, atol=1e-12
    )
    assert F.mse_loss(ours(a, b), want) > 1e-6
