"""Tests of the mixture of experts under torch.compile, and of compiling its kernels."""

import pytest
import torch
from compiling import inspect, oldest_triton, run_python  # noqa: F401 (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmfused
import mmfused.ops.grouped_mlp.functional as experts
import mmfused.ops.topk_routing.functional as router

# Cases of `mmfused inspect` that together use every kernel of the router and the experts.
CASES = ("logits 5", "route exact", "moe fluid 512")


def test_moe_is_one_graph_for_three_lengths():
    """Compare router and experts, with masks, segments, a selection bias and jitter.

    Reading the number of tokens per expert on the host would break the graph.
    """
    code = """
import torch, mmfused
from torch._dynamo.utils import counters

device = "cuda" if torch.cuda.is_available() else "cpu"
for name in ["reference", "composed"] + (["fused"] if device == "cuda" else []):
    for activation, options in (
        ("gelu", {}),
        ("swiglu", dict(score="sigmoid", num_segments=2, selection_bias=True)),
    ):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        mmfused.set_backend(name)
        model = mmfused.TopKMoE(32, 48, 5, 2, activation=activation, jitter=0.1, **options).to(
            device
        )
        # "aot_eager" also traces the gradients, which takes long.
        backend = "eager" if name == "reference" else "aot_eager"
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
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
                total = (
                    (out * upstream).sum() + routing.balance_loss + routing.z_loss + routing.entropy
                )
                results.append([out, *torch.autograd.grad(total, [x, *model.parameters()])])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1, (name, activation, counters["stats"])
        assert not counters["graph_break"], (name, activation, counters["graph_break"])
print("done")
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


def test_fused_moe_calls_five_ops_on_fake_tensors(monkeypatch):
    """The router and the experts each have one op for the forward and one for the backward.

    The fifth op computes the gradients of the router's input and weight.
    """
    for function in (experts, router):
        monkeypatch.setattr(function, "choose", lambda *args: "fused")
    with FakeTensorMode(), Watch() as watch:
        with torch.device("meta"):
            moe = mmfused.TopKMoE(32, 48, 5, 2, activation="swiglu")
        watch.called.clear()
        x = torch.empty(3, 17, 32, device="meta", requires_grad=True)
        out, routing = moe(x)
        total = out.sum() + routing.balance_loss + routing.z_loss
        grads = torch.autograd.grad(total, [x, *moe.parameters()])
        assert out.shape == x.shape
        assert [g.shape for g in grads] == [x.shape, *(p.shape for p in moe.parameters())]
        assert [getattr(routing, n).shape for n in ("indices", "counts", "order", "offsets")] == [
            (51, 2),
            (1, 5),
            (102,),
            (6,),
        ]
    names = sorted(name.split(".")[1] for name in watch.called if name.startswith("mmfused"))
    assert names == [
        "grouped_mlp_bwd",
        "grouped_mlp_fwd",
        "topk_routing_bwd",
        "topk_routing_fwd",
        "topk_routing_input_bwd",
    ]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])  # `make compile-matrix` tests all
def test_plans_compile_without_spills(arch, tmp_path):
    rows = inspect(tmp_path, arch, CASES)
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"route", "route_x", "scan", "finish", "logits", "dx", "dw"}
    assert kernels >= {"rows", "hidden", "weights", "combine"}
    assert not any(row["spilled"] or row["fault"] for row in rows)
    instruction = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma")
    for row in rows:
        if row["kernel"] in ("rows", "hidden", "weights"):
            assert row["instructions"][instruction], row


def test_plans_compile_on_the_oldest_triton(tmp_path, oldest_triton):  # noqa: F811
    rows = inspect(tmp_path, "sm_90", CASES, PYTHONPATH=str(oldest_triton))
    assert rows and not any(row["fault"] for row in rows)
