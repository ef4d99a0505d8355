"""Tests of gated cross-attention under torch.compile, and of compiling its kernels."""

import pytest
import torch
from compiling import inspect, oldest_triton, run_python  # noqa: F401 (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfused
import mmfused.ops.gated_cross_attention.functional as functional

# One case of `mmfused inspect` for each architecture; `make compile-matrix` compiles all of them.
CASES = {"sm_90": "uniecs", "sm_100": "cross 64"}


def test_gated_cross_attention_is_one_graph_for_three_lengths():
    """Compare both directions, with a padding mask, presence flags and dropout."""
    code = """
import torch, mmfused
from torch._dynamo.utils import counters

device = "cuda" if torch.cuda.is_available() else "cpu"
every = (
    dict(missing="skip", dropout=0.2, gate="none", pre_norm=False),
    dict(missing="zero", gate="token"),
)
for name in ["composed"] + (["fused"] if device == "cuda" else []):
    for options in every:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        mmfused.set_backend(name)
        model = mmfused.BidirectionalGatedCrossAttention(32, 4, **options).to(device)
        # "aot_eager" also traces the gradients, which takes long.
        backend = "aot_eager" if "dropout" in options else "eager"
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for n, m in ((17, 9), (40, 21), (33, 14)):
            a, b = (
                torch.randn(5, length, 32, device=device, requires_grad=True) for length in (n, m)
            )
            present = torch.tensor([True, True, False, True, True], device=device)
            kwargs = dict(
                b_key_padding_mask=torch.rand(5, m, device=device) < 0.3, a_present=present
            )
            results = []
            for step in (model, compiled):
                torch.manual_seed(1)
                outs = step(a, b, **kwargs)
                total = sum((out * torch.arange(32, device=device)).sum() for out in outs)
                results.append(
                    [
                        *outs,
                        *torch.autograd.grad(total, [a, b, *model.parameters()], allow_unused=True),
                    ]
                )
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)
        assert counters["stats"]["unique_graphs"] == 1, (name, options, counters["stats"])
        assert not counters["graph_break"], (name, options, counters["graph_break"])
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fused_cross_attention_runs_on_fake_tensors(monkeypatch):
    """The fused op and its backward give outputs and gradients of the right shapes."""
    monkeypatch.setattr(functional, "choose", lambda *args: "fused")
    with FakeTensorMode():
        with torch.device("meta"):
            model = mmfused.BidirectionalGatedCrossAttention(32, 4)
        a, b = (torch.empty(3, length, 32, device="meta", requires_grad=True) for length in (17, 9))
        outs = model(a, b, a_present=torch.empty(3, dtype=torch.bool, device="meta"))
        inputs = [a, b, *model.parameters()]
        grads = torch.autograd.grad(sum(out.sum() for out in outs), inputs)
        assert [out.shape for out in outs] == [a.shape, b.shape]
        assert [g.shape for g in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize("arch", CASES)
def test_plans_compile_without_spills(arch, tmp_path):
    rows = inspect(tmp_path, arch, [CASES[arch]])
    assert not any(row["spilled"] or row["fault"] for row in rows)
    instruction = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma")
    assert any(row["instructions"][instruction] for row in rows)


def test_plans_compile_on_the_oldest_triton(tmp_path, oldest_triton):  # noqa: F811
    rows = inspect(tmp_path, "sm_90", ["cross 768"], PYTHONPATH=str(oldest_triton))
    assert rows and not any(row["fault"] for row in rows)
