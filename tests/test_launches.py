"""Tests of what a call launches on a GPU, counted without one (tools/bounds/launches.py)."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmfused
from mmfused.kernels import recording
from mmfused.tools.bounds import count_launches, launch_cases, torch_work
from mmfused.tools.bounds.count_launches import PAGE, model_rows, op_launches, op_rows
from mmfused.tools.bounds.launch_cases import OPS
from mmfused.tools.bounds.launches import recorded
from mmfused.tools.bounds.torch_work import untouched

TORCH = torch.__version__.split("+")[0]
SAME_TORCH = pytest.mark.skipif(
    f"with torch {TORCH}." not in PAGE.read_text(),
    reason="other versions of torch have other operators",
)


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """Leave allocations alone, in place of conftest.py's fixture: to fill them is a launch."""


def lines_of(heading):
    """Return the lines of a table of benchmarks/launches.md."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)[1]
    return section.strip().split("| --- |\n")[1].split("\n")


def names(launches):
    return [launch.name for launch in launches]


# ---- the counts ----------------------------------------------------------------------------------


@SAME_TORCH
@pytest.mark.parametrize("op", OPS)
def test_each_case_launches_what_its_line_says(op):
    rows = [row for name, make in OPS[op].items() for row in op_rows(name, make())]
    expected = lines_of(op[0].upper() + op[1:])
    hint = "if this is intended: python -m mmfused.tools.bounds.count_launches --write"
    assert rows == expected, hint


@SAME_TORCH
@pytest.mark.parametrize("name", ["fluid", "unite"])
def test_each_part_of_a_training_step_launches_what_its_line_says(name):
    assert set(model_rows(name)) <= set(lines_of("Models"))


@pytest.mark.parametrize("op", OPS)
def test_the_host_never_waits_for_an_op(op):
    assert not [line for line in lines_of(op[0].upper() + op[1:]) if "*" in line]


def test_targets_of_routing_are_met():
    for name in ("logits", "logits, all losses", "logits, gshard", "logits, padding mask"):
        forward, backward = op_launches(OPS["routing"][name]())
        assert len(forward) <= 3
        assert len(backward) == 1


def test_what_only_a_cpu_does_is_not_counted():
    q, weight = torch.randn(8, 4, requires_grad=True), torch.full((8,), -1.0)

    def loss():
        return mmfused.masked_info_nce(q, q.detach(), temperature=1.0, row_weight=weight)

    with pytest.raises(ValueError, match="negative"):
        loss()
    with recorded(skip_above=None) as launches:  # values are real, and are not read
        loss().backward()
    assert "_local_scalar_dense" not in names(launches)
    # On a CPU this is index_add_, see _add_rows in mmfused/ops/masked_info_nce/autograd.py.
    c = torch.randn(8, 4, requires_grad=True)
    with recorded() as launches:
        mmfused.masked_info_nce(q, c, temperature=1.0).backward()
    assert "index_put_" in names(launches) and "index_add_" not in names(launches)


def test_the_command_prints_the_chosen_tables(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["count_launches", "routing"])
    count_launches.main()
    printed = capsys.readouterr().out
    assert printed.startswith("## Routing\n")
    assert "| logits | forward | 3 | 3 | 0 | route_kernel, scan_kernel, finish_kernel |" in printed
    assert "InfoNCE" not in printed


# ---- against fake CUDA tensors -------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Notes torch's operators on fake tensors, and runs those of this library."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, key = kwargs or {}, torch._C.DispatchKey
        if function.namespace == "mmfused":
            with self:
                return function._op_dk(key.CUDA, *args, **kwargs)
        if function.namespace != "aten":
            return function(*args, **kwargs)
        for kind in (key.CompositeImplicitAutograd, key.CompositeExplicitAutograd):
            composed = kind == key.CompositeImplicitAutograd or torch_work.is_composed(function)
            if composed and function.has_kernel_for_dispatch_key(kind):
                with self:
                    return function._op_dk(kind, *args, **kwargs)
        out = function(*args, **kwargs)
        free = torch_work.is_view(function) or torch_work.is_allocation(function)
        if not free and torch_work.elements(out):
            self.names.append(torch_work.name_of(function))
        return out


def fake_cuda(size, stride=None, *, dtype):
    return torch.empty(size, dtype=dtype, device="cuda")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no operators for CUDA")
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("query pooling", "dropout, bias, LayerNorm, mask"),
        ("gated cross-attention", "missing: skip, masks, dropout"),
        ("routing", "logits, given indices"),
        ("experts", "TopKMoE, jitter"),
        ("masked InfoNCE", "all options"),
    ],
)
@torch.no_grad()  # torch's engine cannot run on fake CUDA tensors without a GPU
def test_a_forward_launches_what_it_launches_on_fake_cuda_tensors(monkeypatch, op, name):
    call = OPS[op][name]()
    with recorded() as launches:
        call.run()
    monkeypatch.setattr(launch_cases, "untouched", fake_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = OPS[op][name]()
        with recording.launches_for(90) as kernels, Operators() as operators:
            call.run()
    expected = [*operators.names, *(kernel.name for kernel in kernels)]
    assert Counter(names(launches)) == Counter(expected)


# ---- the recorder --------------------------------------------------------------------------------


def test_views_and_allocations_launch_nothing():
    x = torch.randn(4, 6)
    with recorded() as launches:
        x.view(6, 4).t()[1:].unsqueeze(0).expand(3, 3, 6)
        torch.empty(5, device=x.device), x.new_empty(3), torch.empty_like(x)
        x.contiguous(), x.to(x.dtype), x.detach(), x[:0] + 1
    assert launches == []


def test_an_operator_has_the_flops_and_bytes_that_arithmetic_gives():
    x, w = untouched((100, 30), dtype=torch.bfloat16), untouched((20, 30), dtype=torch.bfloat16)
    with recorded() as launches:
        F.linear(x, w)
        x + 1
    product, addition = launches
    assert (product.name, product.flops) == ("mm", 2 * 100 * 30 * 20)
    assert product.bytes == 2 * (100 * 30 + 20 * 30 + 100 * 20)
    assert product.shapes == ((100, 30), (30, 20), (100, 20))
    assert (addition.flops, addition.bytes) == (0, 2 * 2 * 100 * 30)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: x.sum().item(), ["sum", "_local_scalar_dense*"]),
        (lambda x: bool((x > 0).all()), ["gt", "all", "_local_scalar_dense*"]),
        (lambda x: x[x > 0], ["gt", "index*"]),
        (lambda x: (x > 0).nonzero(), ["gt", "nonzero*"]),
        (lambda x: x.cpu(), ["cpu*"]),
        (lambda x: x.tolist(), ["tolist*"]),
        (lambda x: torch.tensor([1.0], device=x.device), ["tensor*"]),
        (lambda x: x[[0, 1]], ["index*"]),  # a list is copied to the GPU
        (lambda x: torch.arange(2, device=x.device), ["arange"]),
        (lambda x: x[torch.arange(2, device=x.device)], ["arange", "index"]),
        (lambda x: x.cpu() + 1, ["cpu*"]),
        (lambda x: x * torch.tensor(2.0), ["mul"]),  # a number of the host is an argument
        (lambda x: torch.where(x > 0, x, 0.0), ["gt", "scalar_tensor", "where"]),
        (lambda x: x.masked_fill(x > 0, 0.0), ["gt", "clone", "masked_fill_"]),
        (lambda x: F.dropout(x, 0.1), ["native_dropout"]),
        (lambda x: F.one_hot((x > 0).long(), 3), ["gt", "_to_copy", "new_zeros", "scatter_"]),
    ],
)
def test_operators_are_those_of_a_gpu_and_a_star_is_a_wait(call, expected):
    x = torch.randn(3, 4)
    with recorded() as launches:
        call(x)
    assert [launch.name + "*" * launch.waits for launch in launches] == expected


def test_nothing_is_computed_and_no_memory_is_touched():
    x = untouched((1 << 16, 1 << 14), dtype=torch.float32)  # 4 GiB
    with recorded() as launches:
        out = (x + 1).exp_()
        untouched((5,), dtype=torch.float32) + 1  # on the GPU too
    assert [launch.name for launch in launches] == ["add", "exp_", "add"]
    assert out.shape == x.shape
    assert out[0, 0] == 0 and not any(launch.computed for launch in launches)


def test_small_operators_are_computed_on_request():
    keys, x = torch.tensor([2, 0, 1]), torch.ones(3, 100)
    with recorded(skip_above=50) as launches:
        order = keys.argsort()
        rows = x[order] + 1
    assert order.tolist() == [1, 2, 0]
    assert rows.shape == (3, 100) and not rows.any()
    assert [launch.computed for launch in launches] == [True, False, False]


def test_a_launch_knows_its_op_and_its_line():
    pool = mmfused.QueryPooling(16, 2)
    x = torch.randn(2, 9, 16, requires_grad=True)
    with recorded() as forward:
        out = pool(2 * x)
    with recorded() as backward:
        out.sum().backward()
    assert (forward[0].op, forward[0].source) == ("", "")
    assert {launch.op for launch in forward[1:]} == {"query_pooling"}
    kernels = [launch for launch in (*forward, *backward) if launch.kind == "triton"]
    assert kernels
    for launch in kernels:
        assert launch.op == "query_pooling"
        assert re.match(r"kernels/query_pooling/\w+\.py:\d+$", launch.source)
        assert launch.kernel.name == launch.name and launch.grid
    # torch's own backward: the line of the forward that made the node of the graph
    products = [launch for launch in backward if launch.name == "mm"]
    assert {launch.source.split(":")[0] for launch in products} == {
        "mmfused/ops/query_pooling/composed.py"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels take tensors on the CPU elsewhere")
@pytest.mark.parametrize("skip_above", [None, 10**6])
def test_kernels_run_on_request(skip_above):
    pool = mmfused.QueryPooling(16, 2)
    x = torch.randn(2, 9, 16, requires_grad=True)
    with mmfused.backend("composed"):
        expected = pool(x)
    (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
    with recorded(skip_above=skip_above, run_kernels=True) as launches:
        out = pool(x)
        (dx,) = torch.autograd.grad(out.square().sum(), x)
    assert any(launch.kind == "triton" for launch in launches)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dx, expected_dx, atol=1e-5, rtol=1e-5)


def test_tensors_say_the_truth_again_afterwards():
    x = torch.randn(3)
    with recorded():
        assert x.device == (x + 1).device == torch.device("cuda:0") and x.is_cuda
        assert torch.ones(3).device.type == "cpu"
    assert x.device == torch.ones(3).device == torch.device("cpu") and not x.is_cuda
    assert not hasattr(torch.Tensor, "__wrapped__") and "device" not in vars(torch.Tensor)
