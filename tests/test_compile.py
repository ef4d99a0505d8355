"""torch.compile and compilation for cards that are not there: in processes of their own, without Triton's interpreter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMFUSED_BACKEND")}
# Between them these reach every kernel; the other cases of `mmfused inspect` differ in sizes.
CASES = ("fluid", "fluid text", "siglip", "widest", "nce keys ids", "nce narrow all")


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [env.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=ENV | env | {"PYTHONPATH": path})


def test_one_graph_for_three_lengths():
    """fullgraph and dynamic, forward and backward, for each backend that runs here, with and without padding."""
    code = """
import torch, mmfused
from torch._dynamo.utils import counters

device = "cuda" if torch.cuda.is_available() else "cpu"
for name in ["reference", "composed"] + (["fused"] if device == "cuda" else []):
    for padding in (None, "mask", "lengths"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        mmfused.backend(name)
        model = mmfused.QueryPooling(64, 4, 2, q_proj=True, out_proj=True, bias=True, norm_kv=True).to(device)
        counters.clear()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (17, 40, 33):
            x = torch.randn(5, length, 64, device=device, requires_grad=True)
            ignore = torch.rand(5, length, device=device) < 0.3
            kwargs = {"mask": dict(key_padding_mask=ignore), "lengths": dict(lengths=(~ignore).sum(1))}.get(padding, {})
            want, got = model(x, **kwargs), compiled(x, **kwargs)
            upstream = torch.randn_like(want)
            wants, gots = (torch.autograd.grad(o, [x, *model.parameters()], upstream) for o in (want, got))
            for a, b in zip([want, *wants], [got, *gots], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1, (name, padding, counters["stats"])
        assert not counters["graph_break"], (name, padding, counters["graph_break"])
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fluid_is_one_graph():
    """Loss and gradients of the whole model, over three text lengths from tokens, and once with its encoders."""
    code = """
import torch, mmfused
from torch._dynamo.utils import counters
from mmfused.models import FLUID, FLUIDConfig

def check(model, compiled, batch):
    parameters = list(model.parameters())
    want, got = model(**batch), compiled(**batch)
    torch.testing.assert_close(want.loss, got.loss)
    for a, b in zip(*(torch.autograd.grad(o.loss, parameters, materialize_grads=True, allow_unused=True) for o in (want, got))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"], counters["graph_break"]

labels, there = torch.randint(0, 7, (5,)), torch.tensor([True, True, False, True, True])
for backend in ("reference", "composed"):
    mmfused.backend(backend)
    for without in ((), ("q_transform", "gate", "bottleneck", "moe")):
        torch._dynamo.reset(), counters.clear(), torch.manual_seed(0)
        model = FLUID(FLUIDConfig.preset("tiny", num_classes=7, image=None, text=None, balance="gshard", without=without))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (9, 21, 14):
            tokens = {"image_tokens": torch.randn(5, 17, 128), "text_tokens": torch.randn(5, length, 128)}
            masks = {"text_padding_mask": torch.rand(5, length) < 0.3, "image_present": there}
            check(model, compiled, {**tokens, **masks, "labels": labels})
        assert counters["stats"]["unique_graphs"] == 1, (backend, without)

counters.clear()
model = FLUID(FLUIDConfig.preset("tiny", num_classes=7, vocab_size=50, text={"hidden_dropout_prob": 0.0}))
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
ids = torch.randint(5, 50, (5, 11))
batch = {"pixel_values": torch.randn(5, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
check(model.eval(), compiled, {**batch, "image_present": there, "labels": labels})
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fused_op_is_one_node_of_the_graph():
    """The kernels stay opaque to the compiler: traced on fake CUDA tensors, one call forward and one backward, no graph break."""
    code = """
import torch, mmfused
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfused.ops.query_pooling.function as function

function.choose = lambda *args: "fused"
with FakeTensorMode():
    x = torch.empty(3, 17, 64, device="meta", requires_grad=True)
    q, w = torch.empty(4, 64, device="meta", requires_grad=True), torch.empty(64, 64, device="meta", requires_grad=True)
    out = mmfused.query_pooling(x, q, w, w, form="absorbed", lengths=torch.empty(3, dtype=torch.int64, device="meta"))
    grads = torch.autograd.grad(out, [x, q, w], torch.empty_like(out))
    assert out.shape == (3, 4, 64) and [g.shape for g in grads] == [x.shape, q.shape, w.shape]
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_moe_is_one_graph_for_three_lengths():
    """Router and experts, with masks, segments, a selection bias and jitter: nothing in them asks how many tokens an expert got."""
    code = """
import torch, mmfused
from torch._dynamo.utils import counters

device = "cuda" if torch.cuda.is_available() else "cpu"
for name in ["reference", "composed"] + (["fused"] if device == "cuda" else []):
    for activation, options in (("gelu", {}), ("swiglu", dict(score="sigmoid", num_segments=2, selection_bias=True))):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        mmfused.backend(name)
        model = mmfused.TopKMoE(32, 48, 5, 2, activation=activation, jitter=0.1, **options).to(device)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (17, 40, 33):
            x = torch.randn(3, length, 32, device=device, requires_grad=True)
            kwargs = dict(token_padding_mask=torch.rand(3, length, device=device) < 0.3)
            if options:
                kwargs["segments"] = torch.randint(0, 2, (3, length), device=device)
            upstream = torch.randn_like(x)
            results = []
            for step in (model, compiled):
                torch.manual_seed(1)
                out, routing = step(x, **kwargs)
                total = (out * upstream).sum() + routing.balance_loss + routing.z_loss + routing.entropy
                results.append([out, *torch.autograd.grad(total, [x, *model.parameters()])])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1, (name, activation, counters["stats"])
        assert not counters["graph_break"], (name, activation, counters["graph_break"])
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_fused_moe_is_five_nodes_of_the_graph():
    """Traced on fake CUDA tensors: router and experts are one opaque call each, forward and backward, plus the router's input."""
    code = """
import torch, mmfused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmfused.ops.grouped_mlp.function as experts
import mmfused.ops.topk_routing.function as router

router.choose = experts.choose = lambda *args: "fused"
called = []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        called.append(str(function))
        return function(*args, **(kwargs or {}))

with FakeTensorMode(), Watch():
    with torch.device("meta"):
        moe = mmfused.TopKMoE(32, 48, 5, 2, activation="swiglu")
    called.clear()
    x = torch.empty(3, 17, 32, device="meta", requires_grad=True)
    out, routing = moe(x)
    total = out.sum() + routing.balance_loss + routing.z_loss
    grads = torch.autograd.grad(total, [x, *moe.parameters()])
    assert out.shape == x.shape and [g.shape for g in grads] == [x.shape, *(p.shape for p in moe.parameters())]
    assert [getattr(routing, n).shape for n in ("indices", "counts", "order", "offsets")] == [(51, 2), (1, 5), (102,), (6,)]
names = sorted(name.split(".")[1] for name in called if name.startswith("mmfused"))
experts, route = ["grouped_mlp_bwd", "grouped_mlp_fwd"], ["topk_routing_bwd", "topk_routing_fwd", "topk_routing_input_bwd"]
assert names == experts + route, names
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def inspect(tmp_path: Path, arch: str, **env: str) -> list[dict]:
    table = tmp_path / "inspect.json"
    cases = [word for case in CASES for word in ("--case", case)]
    done = run_python("-W", "ignore", "-m", "mmfused", "inspect", "--arch", arch, *cases, "--json", str(table), **env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(table.read_text())


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_plans_compile_without_spills(arch, tmp_path):
    rows = inspect(tmp_path, arch)
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"onepass fwd", "logits", "pool", "moments", "pack_mask", "dlogits", "dx", "dq"}
    assert kernels >= {"sweep", "merge", "pairs", "spread", "owner"}
    assert ("onepass bwd" in kernels) == (arch in ("sm_90", "sm_100"))
    assert not any(row["spilled"] or row["fault"] for row in rows)
    meant = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma")
    for row in rows:
        if row["kernel"] not in ("moments", "pack_mask", "merge"):
            assert row["instructions"][meant], row


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_plans_compile_on_the_oldest_triton(arch, tmp_path, triton_3_6):
    rows = inspect(tmp_path, arch, PYTHONPATH=str(triton_3_6))
    assert rows and not any(row["fault"] for row in rows)


@pytest.fixture(scope="session")
def triton_3_6(tmp_path_factory):
    """Triton 3.6 unpacked beside the installed one; kept in .venv for the next run."""
    import triton

    if triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 is the installed one; the other tests compile with it")
    if sys.platform != "linux":
        pytest.skip("Triton has wheels for Linux only")
    home = ROOT / ".venv" / "triton-3.6.0"
    if not (home / "triton").is_dir():
        folder = tmp_path_factory.mktemp("triton")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--target",
            folder / "t",
            "triton==3.6.0",
        ]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("Triton 3.6.0 cannot be fetched: no network")
        home.parent.mkdir(exist_ok=True)
        shutil.move(folder / "t", home)
    return home


def test_inspect_reports_a_fault():
    """A kernel that cannot launch makes the command fail: here, more shared memory than any card has."""
    code = """
import sys
from mmfused import cli
from mmfused.kernels import query_pooling
from mmfused.kernels.query_pooling.plans import Plan, Tile

bad = Plan({"onepass": Tile(64, 32, 256, 8, 4)}, {"onepass": Tile(32, 16, 256, 8, 1)})
query_pooling.plan = lambda *args: bad
sys.exit(cli.main(["inspect", "--arch", "sm_90", "--case", "bottleneck", "--jobs", "1"]))
"""
    done = run_python("-W", "ignore", "-c", code)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "bytes of shared memory, the card has 232448" in done.stdout or "spills" in done.stdout


@pytest.mark.parametrize(
    "args, sentence",
    [(["--arch", "90"], "--arch is '90'; it takes names like sm_90"), (["--case", "none"], "it takes some of fluid")],
)
def test_inspect_bad_arguments(args, sentence):
    done = run_python("-m", "mmfused", "inspect", *args)
    assert done.returncode == 2 and sentence in done.stderr


def test_inspect_needs_a_compiler():
    done = run_python("-m", "mmfused", "inspect", "--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is 1, so nothing is compiled" in done.stderr
