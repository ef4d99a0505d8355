"""Baselines of other libraries: arguments as in the libraries' sources, results as in float64.

The libraries are not installed here. Functions with their signatures, and with what their
documentation says that they compute, take their places.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmfused.benchmarks import (
    attention,
    gated_cross_attention,
    grouped_mlp,
    masked_info_nce,
    measure,
    query_pooling,
    run,
)
from mmfused.testing import relative_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flash_attn_2(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert dropout_p == 0.0 or dropout_p == 0.5
    return attention.sdpa(q, k, v, dropout_p)


def flash_attn_3(q, k, v, softmax_scale=None, causal=False, qv=None):
    return attention.sdpa(q, k, v, 0.0)


def flash_attn_3_with_sums(q, k, v, softmax_scale=None, causal=False):
    return attention.sdpa(q, k, v, 0.0), None


def parallel_linear(
    inputs,
    expert_weights,  # (E, in, out)
    k,
    sorted_expert_idxs,
    sorted_scattered_idxs,
    expert_offsets,
    expert_biases=None,
    gates=None,
    grouped_in=False,
    grouped_out=False,
):
    """Multiply each row by the weight of its expert, as scattermoe 0.3 does."""
    ends = torch.bincount(sorted_expert_idxs, minlength=len(expert_weights)).cumsum(0)
    assert torch.equal(expert_offsets, ends)
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    out = torch.bmm(rows[:, None], expert_weights[sorted_expert_idxs])[:, 0]
    if expert_biases is not None:
        out = out + expert_biases[sorted_expert_idxs]
    if grouped_out:
        return out
    by_token = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
    return (gates[:, None] @ by_token.view(*gates.shape, -1))[:, 0]


@pytest.fixture
def installed(monkeypatch):
    """Put made-up libraries in the places of the real ones; torch.compile does nothing."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_2))
    package = SimpleNamespace(flash_attn_func=flash_attn_3)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return package


def check_of(op, case) -> measure.AccuracyCheck:
    return measure.AccuracyCheck(op, case, op.make(case, CPU, torch.float32))


def attends():
    """Yield each attention, built for the CPU or, of packages, as if for a GPU."""
    yield attention.sdpa_with("FLASH", 2, 8, 0.0, CPU, torch.float32)
    yield attention.flash_attention(2, 8, 0.0, CUDA, torch.bfloat16)
    yield attention.flash_attention(3, 8, 0.0, CUDA, torch.bfloat16)


def test_every_attention_computes_pooling_and_cross_attention(installed):
    pooling = query_pooling.Case("", B=3, N=7, D=16, L=2, H=2)
    cross = gated_cross_attention.custom({"B": 3, "N": 7, "M": 5, "D": 16, "H": 2})
    built = (
        (query_pooling, pooling, query_pooling.projected_sdpa),
        (gated_cross_attention, cross, gated_cross_attention.merged),
    )
    for op, case, build in built:
        check = check_of(op, case)
        for attend in attends():
            provider = check.build(lambda *a, attend=attend, build=build: build(*a, attend=attend))
            assert check.faults(provider) == []
    installed.flash_attn_func = flash_attn_3_with_sums
    attend = attention.flash_attention(3, 8, 0.0, CUDA, torch.bfloat16)
    provider = check.build(lambda *a: gated_cross_attention.merged(*a, attend=attend))
    assert check.faults(provider) == []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_attention_of_sdpa(installed):
    """On a CPU it has no backward."""
    q, k, v = (torch.randn(3, n, 2, 16) for n in (5, 9, 9))
    found = attention.flex()(q, k, v, 0.0)
    assert torch.allclose(found, attention.sdpa(q, k, v, 0.0), atol=1e-6)


def test_flash_attention_gets_the_dropout(installed):
    q = torch.ones(1, 4, 2, 8)
    attend = attention.flash_attention(2, 8, 0.5, CUDA, torch.float16)
    assert not torch.equal(attend(q, q, q, 0.5), q) and torch.equal(attend(q, q, q, 0.0), q)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: attention.flash_attention(2, 64, 0.0, CPU, torch.bfloat16), "16-bit tensors on"),
        (lambda: attention.flash_attention(2, 64, 0.0, CUDA, torch.float32), "16-bit tensors on"),
        (lambda: attention.flash_attention(3, 768, 0.0, CUDA, torch.bfloat16), "at most 256 chan"),
        (lambda: attention.flash_attention(3, 64, 0.1, CUDA, torch.bfloat16), "it has no dropout"),
        (lambda: attention.flash_attention(2, 64, 0.1, CUDA, torch.bfloat16), "flash_attn is not"),
        (lambda: attention.flash_attention(3, 64, 0.0, CUDA, torch.bfloat16), r"ntion 3\) is not"),
        (lambda: attention.sdpa_with("CUDNN", 2, 8, 0.0, CPU, torch.float32), "only on CUDA"),
        (
            lambda: attention.sdpa_with("FLASH", 2, 8, 0.1, CPU, torch.float32),
            "heads of 8 channels",
        ),
        (lambda: grouped_mlp.scatter_moe(None, CUDA, None), "scattermoe is not installed"),
        (lambda: masked_info_nce.quack(None, CUDA, None), "quack is not installed"),
        (lambda: masked_info_nce.quack(None, CPU, None), "its kernels need CUDA"),
        (lambda: grouped_mlp.scatter_moe(None, CPU, None), "its kernels need CUDA"),
    ],
)
@pytest.mark.filterwarnings("error")  # of a backend that is not available
def test_what_cannot_run_gives_a_reason(build, message, monkeypatch):
    for name in ("flash_attn", "flash_attn_interface", "scattermoe", "quack"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(measure.Unavailable, match=message):
        build()


@pytest.mark.parametrize("gated", [False, True])
def test_scattermoe_computes_the_experts(gated):
    case = grouped_mlp.custom({"T": 11, "D": 8, "I": 12, "E": 4, "k": 2})
    check = check_of(grouped_mlp, dataclasses.replace(case, gated=gated))
    provider = check.build(
        lambda case, device, dtype: measure.Provider(
            grouped_mlp.ScatterMoE(case, device, dtype, parallel_linear), grouped_mlp.layout(case)
        )
    )
    assert check.faults(provider) == []


def test_an_older_scattermoe_without_biases_is_not_compared(monkeypatch):
    def old(inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets):
        raise AssertionError

    monkeypatch.setitem(sys.modules, "scattermoe", SimpleNamespace(parallel_linear=old))
    with pytest.raises(measure.Unavailable, match="this scattermoe has no biases"):
        grouped_mlp.scatter_moe(grouped_mlp.custom({}), CUDA, torch.bfloat16)


# ---- losses --------------------------------------------------------------------------------------


def cut_cross_entropy(
    e,
    c,
    targets,
    ignore_index=-100,
    softcap=None,
    reduction="mean",
    shift=False,
    filter_eps="high",
    impl="cce",
):
    assert (impl, filter_eps) == ("cce", None)  # no gradient is left out
    return F.cross_entropy(e @ c.T, targets)


class Liger:
    def __init__(self, ce_weight=None, ignore_index=-100, accum_dtype=None):
        assert accum_dtype is torch.float32

    def __call__(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(_input @ lin_weight.T, target)


def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    return F.cross_entropy(q @ k.T, labels, reduction="none")


def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True
):
    return F.cross_entropy(x @ weight.T, target)


@pytest.mark.parametrize(
    "name, module, contents",
    [
        (
            "Cut Cross-Entropy, exact",
            "cut_cross_entropy",
            {"linear_cross_entropy": cut_cross_entropy, "LinearCrossEntropyImpl": object},
        ),
        (
            "Liger, float32 accumulation",
            "liger_kernel.transformers",
            {"LigerFusedLinearCrossEntropyLoss": Liger},
        ),
        ("Inf-CL", "inf_cl.flash", {"cal_flash_loss": cal_flash_loss}),
        (
            "QuACK",
            "quack.linear_cross_entropy",
            {"chunked_linear_cross_entropy": chunked_linear_cross_entropy},
        ),
    ],
)
def test_every_loss_of_a_language_model_computes_the_contrastive_loss(
    name, module, contents, monkeypatch
):
    monkeypatch.setattr(masked_info_nce, "need_cuda", lambda device: None)
    for parent in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace(**contents))
    check = check_of(masked_info_nce, masked_info_nce.custom({"B": 24, "D": 16}))
    results = check.build(masked_info_nce.PROVIDERS[name]).results(check.problem)
    assert results.keys() == check.exact.keys()
    for key, want in check.exact.items():
        assert relative_error(results[key], want) < 1e-5, key


def test_a_loss_of_many_blocks_is_not_compiled():
    for size, compiled in ((4096, True), (65536, False)):
        provider = masked_info_nce.chunked(masked_info_nce.custom({"B": size}), CPU, torch.float32)
        assert (provider.uncompiled is None) == compiled


def test_flex_attention_may_recompile_in_each_case_without_torch_compile(monkeypatch):
    """Beyond torch's limit of recompilations it would run uncompiled, and be timed so."""
    resets = []
    monkeypatch.setattr("torch._dynamo.reset", lambda: resets.append(True))
    settings = SimpleNamespace(compiled=False, device=torch.device("cuda"), dtype=torch.bfloat16)
    bench = SimpleNamespace(make=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.measure_case(bench, None, settings)
    assert resets == [True]
