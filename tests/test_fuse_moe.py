"""Tests of fuse(model) on transformers' mixtures of experts.

The experts implementation "mmfused" is tested, too. All results must match the original model's.
"""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuse_moe_models import (
    BLOCKS,
    CASES,
    DEVICE,
    B,
    E,
    N,
    batch,
    block,
    expert_inputs,
    experts,
    filled,
    mixtral,
    qwen2,
    qwen3,
    run,
    run_block,
    run_experts,
)
from torch import nn

import mmfused
from mmfused import fuse, unfuse
from mmfused.fuse import experts as experts_swaps
from mmfused.testing import over_budget

pytest.importorskip("transformers.integrations.moe")


@pytest.fixture
def library_calls(monkeypatch):
    """Return a list that collects the names of the called functions of this library."""
    calls = []
    for name in ("grouped_mlp", "grouped_linear"):
        real = getattr(experts_swaps, name)
        monkeypatch.setattr(
            experts_swaps,
            name,
            lambda *a, real=real, **k: (calls.append(real.__name__), real(*a, **k))[1],
        )
    return calls


def assert_same(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).norm() <= tolerance * max(value.norm(), 1e-3), name


def last_experts(model):
    """Return the experts of the last layer."""
    return model.model.layers[-1].mlp.experts


def expert_names(case):
    return (
        ["model.layers.1.mlp.experts"]
        if "dense" in case
        else [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_fused_model_matches_the_original_in_float64(case, training, library_calls):
    """Compare logits, loss with aux loss, router logits and all gradients, with a padding mask."""
    model = filled(CASES[case]()).train(training)
    want, seen = run(model), []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *args: seen.append(args[2][0].shape))
    report = fuse(model)
    assert list(report.swapped) == expert_names(case) and not report.left and not library_calls
    assert_same(run(model), want)
    assert library_calls == ["grouped_mlp"] * len(expert_names(case)) and seen == [
        (B * N, E)
    ] * len(library_calls)


@pytest.mark.parametrize("case", CASES)
def test_fused_model_keeps_the_error_budget_in_float32(case):
    model = filled(CASES[case]()).float().double()
    exact = run(model.eval())
    plain = run(model.float())
    fuse(model)
    assert not over_budget(run(model), exact, plain)


@pytest.mark.parametrize("case", ["mixtral", "qwen2"])
def test_fused_backend_keeps_the_error_budget(case, library_calls):
    model = filled(CASES[case]()).float().double()
    exact = run(model.eval())
    plain = run(model.float())
    fuse(model)
    with mmfused.backend("fused"):
        assert not over_budget(run(model), exact, plain)
    assert library_calls == ["grouped_mlp"] * 2


@pytest.mark.parametrize("model", BLOCKS)
def test_other_models_with_the_same_experts_match_the_original(model, library_calls):
    module = block(model)
    want = run_block(module)
    assert list(fuse(module).swapped) == ["experts"]
    assert_same(run_block(module), want)
    assert library_calls == ["grouped_mlp"]


@pytest.mark.parametrize("case", ["mixtral", "qwen2", "qwen3"])
def test_unfuse_restores_the_model(case, library_calls):
    model = filled(CASES[case]())
    types = {name: type(module) for name, module in model.named_modules()}
    state, parameters, want = model.state_dict(), list(map(id, model.parameters())), run(model)
    dry = fuse(model, dry_run=True)
    assert {name: type(module) for name, module in model.named_modules()} == types
    report = fuse(model)
    assert report == dry and list(report.swapped) == expert_names(case)
    for name, module in model.named_modules():
        assert isinstance(module, types[name]) and type(module).__name__ == types[name].__name__
        assert (type(module) is not types[name]) == (name in report.swapped)
    assert all(phrase.startswith("already swapped") for phrase in fuse(model).swapped.values())
    fused_state = model.state_dict()
    assert list(fused_state) == list(state) and all(
        torch.equal(fused_state[k], state[k]) for k in state
    )
    assert list(map(id, model.parameters())) == parameters

    fresh = CASES[case]().to(DEVICE, torch.float64)
    fresh.load_state_dict(fused_state)
    assert_same(run(fresh), want, 0.0)
    assert not library_calls
    # Fuse before transformers puts its recorders on the routers, because recorders cannot be
    # pickled.
    other = filled(CASES[case]())
    fuse(other)
    other.load_state_dict(state)
    for copied in (pickle.loads(pickle.dumps(other)), other, copy.deepcopy(model)):
        library_calls.clear()
        assert_same(run(copied), want)
        assert len(library_calls) == 2 and unfuse(copied) == expert_names(case)
    assert (
        unfuse(model) == expert_names(case)
        and {name: type(module) for name, module in model.named_modules()} == types
    )
    library_calls.clear()
    assert_same(run(model), want, 0.0)
    assert not library_calls


def test_fused_model_supports_gradient_checkpointing_and_autocast(library_calls):
    model = filled(qwen3()).train()
    want = run(model)
    fuse(model)
    model.gradient_checkpointing_enable()
    assert_same(run(model), want)
    assert len(library_calls) == 4  # the backward computes each layer again
    model.gradient_checkpointing_disable()

    exact = run(unfuse(model) and model.float().double())
    model.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = run(model)
        fuse(model)
        got = run(model)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in plain.items()}
    names = (
        "logits",
        "loss",
        "router 1",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.gate.weight",
    )
    assert not over_budget(*({k: results[k] for k in names} for results in (got, exact, plain)))


# ---- modules that are left, and calls that run the original --------------------------------------


def after(module, change):
    change(module)
    return module


def changed(change, make=mixtral):
    return lambda: after(make(), lambda model: change(last_experts(model)))


class Quantised(nn.Parameter):
    """A stand-in for a quantised parameter."""


def quantise(module):
    module.down_proj = Quantised(module.down_proj.detach())


def to_float8(module):
    module.down_proj = nn.Parameter(
        module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False
    )


def hook(module):
    module.act_fn.register_forward_hook(lambda *args: None)


def make_subclass(module):
    module.__class__ = type("MyExperts", (type(module),), {})


LEFT = {
    "One expert for each token and renormalised weights": lambda: mixtral(num_experts_per_tok=1),
    "its router learns nothing": lambda: qwen3(num_experts_per_tok=1, norm_topk_prob=True),
    "act_fn is a GELUActivation, not silu": lambda: mixtral(hidden_act="gelu"),
    "has_bias is True: the kernels take": changed(lambda m: setattr(m, "has_bias", True)),
    "is_transposed is True": changed(lambda m: setattr(m, "is_transposed", True)),
    "is_concatenated is False": changed(lambda m: setattr(m, "is_concatenated", False)),
    "have no gate, or a custom one": changed(lambda m: setattr(m, "_apply_gate", len)),
    "distributed over ranks": changed(lambda m: setattr(m, "_is_expert_parallel", True)),
    "'deepgemm_megamoe', which changes": lambda: after(
        mixtral(),
        lambda m: setattr(m.config, "_experts_implementation_internal", "deepgemm_megamoe"),
    ),
    "down_proj is a Quantised of torch.float32": changed(quantise),
    "down_proj is a Parameter of torch.float8_e4m3fn": changed(to_float8),
    "act_fn has hooks": changed(hook),
    "forward of this module was replaced": changed(lambda m: setattr(m, "forward", len)),
    "has no gate_up_proj": changed(lambda m: delattr(m, "gate_up_proj")),
    "MyExperts is a subclass of MixtralExperts": changed(make_subclass),
}


@pytest.mark.parametrize("words", LEFT)
def test_left_modules_are_reported_with_a_reason(words):
    model = LEFT[words]()
    types = [type(module) for module in model.modules()]
    report = fuse(model, dry_run=True)
    reason = report.left["model.layers.1.mlp.experts"]
    assert (
        words in reason
        and reason.endswith(".")
        and [type(module) for module in model.modules()] == types
    )


def test_single_expert_with_its_softmax_weight_is_swapped():
    assert len(fuse(qwen2(num_experts_per_tok=1, norm_topk_prob=False)).swapped) == 2
    assert len(fuse(mixtral(num_experts_per_tok=1)).left) == 2
    # Without the router, fuse cannot know that the routing weights are always 1, so it swaps.
    assert fuse(last_experts(mixtral(num_experts_per_tok=1))).swapped


@pytest.mark.parametrize(
    "change",
    [hook, quantise, lambda m: setattr(m, "act_fn", nn.Tanh())],
    ids=["hook", "quantised", "tanh"],
)
def test_experts_changed_after_fuse_run_the_original(change, library_calls):
    model = filled(mixtral())
    fuse(model)
    change(last_experts(model))
    got = run(model)
    assert library_calls == ["grouped_mlp"]  # only the layer that was not changed
    unfuse(model)
    assert_same(got, run(model))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm", "mmfused"])
def test_fuse_overrides_the_experts_implementation(implementation, library_calls):
    mmfused.register_experts()
    model = mixtral(experts_implementation=implementation)
    filled(model, torch.float32)
    want = run(model)
    called = len(library_calls)
    assert called == (2 if implementation == "mmfused" else 0)
    fuse(model)
    assert_same(run(model), want, 1e-4)
    model.set_experts_implementation("eager")  # the swap stays until unfuse
    assert_same(run(model), want, 1e-4)
    assert len(library_calls) == called + 4 and unfuse(model)
    assert_same(run(model), want, 1e-4)
    assert len(library_calls) == called + 4


# ---- the experts implementation "mmfused" --------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_experts_implementation_matches_the_original(case, library_calls):
    mmfused.register_experts()
    model = filled(CASES[case]()).train()
    want = run(model)
    model.set_experts_implementation("mmfused")
    assert_same(run(model), want)
    assert len(library_calls) == len(expert_names(case))


def test_experts_implementation_is_set_by_from_config_and_from_pretrained(tmp_path, library_calls):
    transformers = pytest.importorskip("transformers")
    mmfused.register_experts()
    model = filled(mixtral())
    want, state = run(model), model.state_dict()
    named = transformers.AutoModelForCausalLM.from_config(
        model.config, experts_implementation="mmfused"
    ).to(DEVICE, torch.float64)
    named.load_state_dict(state)
    assert_same(run(named), want)
    named.save_pretrained(tmp_path)
    assert "mmfused" not in (tmp_path / "config.json").read_text()
    read = (
        type(model)
        .from_pretrained(tmp_path, experts_implementation="mmfused", dtype=torch.float64)
        .to(DEVICE)
    )
    assert_same(run(read), want)
    assert len(library_calls) == 4


OTHER_EXPERTS = {
    "mixtral.modeling_mixtral.MixtralExperts": dict(hidden_act="gelu"),
    "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": dict(
        swiglu_limit=0.7, swiglu_alpha=1.702
    ),
    "nemotron_h.modeling_nemotron_h.NemotronHExperts": dict(
        moe_latent_size=None, mlp_hidden_act="relu2"
    ),
}


@pytest.mark.parametrize("path", OTHER_EXPERTS)
def test_experts_implementation_supports_other_activations(path, library_calls):
    mmfused.register_experts()
    module, inputs = experts(path, **OTHER_EXPERTS[path]), expert_inputs()
    want = run_experts(module, *inputs)
    module.config._experts_implementation = "mmfused"
    assert_same(run_experts(module, *inputs), want)
    assert library_calls == ["grouped_linear"] * 2


@pytest.mark.parametrize("tokens", [19, 0])
def test_experts_implementation_accepts_float32_tokens_for_bfloat16_experts(tokens):
    """Under autocast, a float32 norm may come before 16-bit experts."""
    mmfused.register_experts()
    module = experts("mixtral.modeling_mixtral.MixtralExperts", torch.bfloat16, hidden_act="silu")
    module.config._experts_implementation = "mmfused"
    x, index, weights = expert_inputs(tokens=tokens, dtype=torch.float32)
    out = module(x, index, weights)
    assert out.dtype == torch.float32 and torch.equal(
        out, module(x.bfloat16(), index, weights).float()
    )


def test_experts_implementation_rejects_unsupported_experts():
    mmfused.register_experts()
    gpt_oss = experts("gpt_oss.modeling_gpt_oss.GptOssExperts", swiglu_alpha=1.7, swiglu_limit=7.0)
    gpt_oss.config._experts_implementation = "mmfused"
    with pytest.raises(
        ValueError,
        match="'mmfused' cannot run GptOssExperts: is_transposed is True: the kernels take",
    ):
        gpt_oss(*expert_inputs())


@pytest.mark.parametrize("backend", ["composed", "reference", "fused"])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_experts_implementation_ignores_experts_of_other_ranks(act, backend):
    """In expert parallelism, the index E stands for every expert of another rank."""
    mmfused.register_experts()
    module = experts("mixtral.modeling_mixtral.MixtralExperts", torch.float32, hidden_act=act)
    module._is_expert_parallel = True
    # Nearly half of the indices are at least E.
    x, index, weights = expert_inputs(3, dtype=torch.float32, experts=E + 4)
    assert (index >= E).any(1).any() and (index < E).any()
    index = index.clamp(max=E)
    weights = weights.masked_fill(index == E, 0.0)
    module.config._experts_implementation = "batched_mm"
    want = run_experts(module, x, index, weights)
    # Older releases of transformers give a gradient to the weights of experts of other ranks.
    want["weights"] = want["weights"].masked_fill(index == E, 0.0)
    module.config._experts_implementation = "mmfused"
    with mmfused.backend(backend):
        got = run_experts(module, x, index, weights)
        assert_same(got, want, 1e-5)
    assert not got["weights"][index == E].any()


def test_register_experts_raises_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="register_experts needs transformers 5 or newer"):
        mmfused.register_experts()


# ---- the aux loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_transformers_balance_loss_is_k_times_ours(k, masked):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    layers = tuple(
        torch.randn(B * N, E, device=DEVICE) * 2 + torch.randn(E, device=DEVICE) for _ in range(3)
    )
    mask = batch()["attention_mask"] if masked else None
    ignore = None if mask is None else mask.flatten() == 0

    def theirs(*logits):
        return modeling.load_balancing_loss_func(logits, E, k, mask)

    def ours(logits, times=1):
        pad = None if ignore is None else ignore.repeat(times)
        return mmfused.topk_routing(logits, k, token_padding_mask=pad)

    for logits in layers:
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        torch.testing.assert_close(theirs(a), k * ours(b).balance_loss)
        (da,), (db,) = (
            torch.autograd.grad(theirs(a), a),
            torch.autograd.grad(k * ours(b).balance_loss, b),
        )
        torch.testing.assert_close(da, db, rtol=1e-4, atol=1e-7)

    together = theirs(*layers)  # one loss of all layers, not the mean over layers
    torch.testing.assert_close(together, k * ours(torch.cat(layers), 3).balance_loss)
    routings = [ours(logits) for logits in layers]
    live = torch.ones(B * N, dtype=torch.bool, device=DEVICE) if ignore is None else ~ignore
    share = torch.stack([r.counts[0] / (k * live.sum()) for r in routings])
    probability = torch.stack([logits[live].softmax(-1).mean(0) for logits in layers])
    covariance = ((share - share.mean(0)) * (probability - probability.mean(0))).mean(0).sum()
    mean = torch.stack([r.balance_loss for r in routings]).mean()
    torch.testing.assert_close(together, k * (mean - E * covariance))
    assert abs(together - k * mean) > 1e-2


# ---- torch.compile -------------------------------------------------------------------------------


def test_fused_block_compiles_without_a_graph_break():
    """Compile a fused block, and a block with the experts implementation "mmfused"."""
    code = """
import torch, mmfused, fuse_moe_models as models
from torch._dynamo.utils import counters

mmfused.register_experts()
for make in (models.mixtral, models.qwen2):
    for fused in (True, False):
        torch._dynamo.reset()
        block = models.filled(make().model.layers[0].mlp)
        want = models.run_block(block)
        if fused:
            assert mmfused.fuse(block).swapped
        block.experts.config._experts_implementation = "eager" if fused else "mmfused"
        counters.clear()
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
        got = models.run_block(compiled)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
        for a, b in zip(got.values(), want.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
print("done")
"""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMFUSED_BACKEND")}
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent, here)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "done", done.stderr[-3000:]
