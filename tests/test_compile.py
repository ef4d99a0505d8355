"""Tests of torch.compile, and of compiling kernels for GPUs that this machine does not have.

Tests that compile start a Python process.
"""

import pytest
import torch
from compiling import inspect, oldest_triton, run_python  # noqa: F401 (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfused
import mmfused.cli.inspect as inspect_command
import mmfused.ops.query_pooling.functional as functional
from mmfused import cli

# Cases of `mmfused inspect` that together use every kernel of query pooling and masked InfoNCE.
CASES = ("fluid text", "siglip", "widest", "nce keys ids", "nce narrow all")


def test_query_pooling_is_one_graph_for_three_lengths():
    """Compare results and gradients on each available backend, with and without padding.

    With dropout, calls without a seed draw new seeds.
    """
    code = """
import torch, mmfused
from torch._dynamo.utils import counters

device = "cuda" if torch.cuda.is_available() else "cpu"
every = (("mask", 0.3), ("lengths", 0.0), (None, 0.0))
for name in ["reference", "composed"] + (["fused"] if device == "cuda" else []):
    for padding, dropout in (("mask", 0.0),) if name == "reference" else every:
        torch._dynamo.reset()
        torch.manual_seed(0)
        mmfused.set_backend(name)
        options = dict(q_proj=True, out_proj=True, bias=True, norm_kv=True, dropout=dropout)
        model = mmfused.QueryPooling(64, 4, 2, **options).to(device)
        counters.clear()
        # "aot_eager" also traces the gradients, which takes long.
        backend = "eager" if name == "reference" or padding is None else "aot_eager"
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for length in (17, 40, 33):
            x = torch.randn(5, length, 64, device=device, requires_grad=True)
            ignore = torch.rand(5, length, device=device) < 0.3
            kwargs = {
                "mask": dict(key_padding_mask=ignore),
                "lengths": dict(lengths=(~ignore).sum(1)),
            }.get(padding, {})
            if dropout:
                kwargs["dropout_seed"] = torch.tensor(length, device=device)
            want, got = model(x, **kwargs), compiled(x, **kwargs)
            upstream = torch.randn_like(want)
            wants, gots = (
                torch.autograd.grad(o, [x, *model.parameters()], upstream) for o in (want, got)
            )
            for a, b in zip([want, *wants], [got, *gots], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1, (name, padding, counters["stats"])
        if dropout:
            assert not torch.equal(compiled(x), compiled(x))
        assert not counters["graph_break"], (name, padding, counters["graph_break"])
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fluid_is_one_graph():
    """Compile a model without encoders for texts of three lengths, and a model with encoders."""
    code = """
import torch, mmfused
from torch._dynamo.utils import counters
from mmfused.models import FLUID, FLUIDConfig


def check(model, compiled, batch):
    parameters = list(model.parameters())
    want, got = model(**batch), compiled(**batch)
    torch.testing.assert_close(want.loss, got.loss)
    for a, b in zip(
        *(
            torch.autograd.grad(o.loss, parameters, materialize_grads=True, allow_unused=True)
            for o in (want, got)
        )
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"], counters["graph_break"]


labels, there = torch.randint(0, 7, (5,)), torch.tensor([True, True, False, True, True])
bare = ("q_transform", "gate", "bottleneck", "moe")
# "aot_eager" also traces the gradients, which takes long.
for without, backend in (
    ((), "aot_eager"),
    (bare, "eager"),
):
    torch._dynamo.reset(), counters.clear(), torch.manual_seed(0)
    model = FLUID(
        FLUIDConfig.preset(
            "tiny", num_classes=7, image=None, text=None, balance="gshard", without=without
        )
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (9, 21, 14):
        tokens = {
            "image_tokens": torch.randn(5, 17, 128),
            "text_tokens": torch.randn(5, length, 128),
        }
        masks = {"text_padding_mask": torch.rand(5, length) < 0.3, "image_present": there}
        check(model, compiled, {**tokens, **masks, "labels": labels})
    assert counters["stats"]["unique_graphs"] == 1, without

counters.clear()
model = FLUID(
    FLUIDConfig.preset("tiny", num_classes=7, vocab_size=50, text={"hidden_dropout_prob": 0.0})
)
compiled = torch.compile(model, fullgraph=True, backend="eager")
ids = torch.randint(5, 50, (5, 11))
batch = {
    "pixel_values": torch.randn(5, 3, 32, 32),
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
}
check(model.eval(), compiled, {**batch, "image_present": there, "labels": labels})
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fused_query_pooling_runs_on_fake_tensors(monkeypatch):
    """The fused op and its backward give outputs and gradients of the right shapes."""
    monkeypatch.setattr(functional, "choose", lambda *args: "fused")
    with FakeTensorMode():
        x = torch.empty(3, 17, 64, device="meta", requires_grad=True)
        q, w = (
            torch.empty(4, 64, device="meta", requires_grad=True),
            torch.empty(64, 64, device="meta", requires_grad=True),
        )
        out = mmfused.query_pooling(
            x, q, w, w, form="absorbed", lengths=torch.empty(3, dtype=torch.int64, device="meta")
        )
        grads = torch.autograd.grad(out, [x, q, w], torch.empty_like(out))
        assert out.shape == (3, 4, 64) and [g.shape for g in grads] == [x.shape, q.shape, w.shape]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])  # `make compile-matrix` tests all
def test_plans_compile_without_spills(arch, tmp_path):
    rows = inspect(tmp_path, arch, CASES)
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "hopper_forward" if arch == "sm_90" else "onepass_forward",
        "logits",
        "pool",
        "moments",
        "pack_mask",
        "dlogits",
        "dx",
        "dq",
    }
    assert kernels >= {"sweep", "merge", "pairs", "apply_ds", "owner"}
    assert not any(row["spilled"] or row["fault"] for row in rows)
    instruction = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma")
    for row in rows:
        if row["kernel"] not in ("moments", "pack_mask", "merge"):
            # A tile of 32 tokens is too small for the instructions of sm_90 and sm_100.
            small = row["tile"].startswith("32x") and row["instructions"]["mma"]
            assert row["instructions"][instruction] or small, row


def test_plans_compile_on_the_oldest_triton(tmp_path, oldest_triton):  # noqa: F811
    rows = inspect(tmp_path, "sm_90", ("fluid text", "nce keys ids"), PYTHONPATH=str(oldest_triton))
    assert rows and not any(row["fault"] for row in rows)


def test_inspect_reports_a_fault():
    """The command fails for a kernel that needs more shared memory than the GPU has."""
    code = """
import importlib, sys
from mmfused import cli
from mmfused.kernels.query_pooling.plans import Plan, Tile

steps = {kernel: Tile(32, 16, 64, 4, 1) for kernel in ("dlogits", "dx", "dq")}
bad = Plan({"onepass": Tile(64, 32, 256, 8, 4)}, steps, 128)
for name in ("", ".forward", ".backward"):
    module = importlib.import_module("mmfused.kernels.query_pooling" + name)
    if hasattr(module, "plan"):
        module.plan = lambda *args, **options: bad
sys.exit(cli.main(["inspect", "--arch", "sm_90", "--case", "bottleneck", "--jobs", "1"]))
"""
    done = run_python("-W", "ignore", "-c", code)
    assert done.returncode == 1, done.stderr[-3000:]
    assert (
        "bytes of shared memory, but the GPU has 232448" in done.stdout or "spills" in done.stdout
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["--arch", "90"], "--arch: got '90', expected one of sm_80"),
        (["--case", "none"], "expected some of fluid"),
    ],
)
def test_inspect_rejects_bad_arguments(args, message, monkeypatch, capsys):
    monkeypatch.setattr(inspect_command, "INTERPRETED", False)
    assert cli.main(["inspect", *args]) == 2 and message in capsys.readouterr().err


def test_inspect_is_rejected_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(inspect_command, "INTERPRETED", True)
    assert cli.main(["inspect", "--arch", "sm_90"]) == 2
    assert "TRITON_INTERPRET: got '1', expected it unset" in capsys.readouterr().err
