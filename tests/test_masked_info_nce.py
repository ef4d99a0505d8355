"""Masked InfoNCE without kernels: the reference against loops, composed against the reference.

test_masked_info_nce_properties.py tests properties and the module, ..._values.py special values,
..._fused.py the kernels, and test_distributed.py several ranks.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from info_nce_cases import DEVICE, B, C, D, assert_close, cast, in_loops, make, run
from torch.nn.functional import normalize

import mmfused
from mmfused import masked_info_nce, masked_info_nce_reference
from mmfused.ops.masked_info_nce import autograd, composed
from mmfused.testing import over_budget, relative_error, saved_bytes, value_and_gradients

KEYS, IDS = ("none", "one", "three", "many"), (None, "drop", "mean", "sum")


# ---- the definition ------------------------------------------------------------------------------


DEFINITION_CASES = {
    "plain": dict(target=True, weight=True, positive_weight=0.7),
    "keys": dict(keys="many", symmetric=True),
    "default query keys": dict(keys="three", target=True, label_smoothing=0.2, reduction="none"),
    "drop": dict(keys="three", same_id="drop", symmetric=True, reduction="sum", weight=True),
    "mean": dict(same_id="mean", symmetric=True, label_smoothing=0.1, reduction="none"),
    "sum": dict(keys="many", same_id="sum", target=True, label_smoothing=0.1),
    "margin": dict(keys="three", same_id="sum", symmetric=True, false_negative_margin=-0.1),
}


@pytest.mark.parametrize("case", DEFINITION_CASES)
def test_reference_equals_the_definition_in_loops(case):
    inputs = make(6, 8, 4, **DEFINITION_CASES[case])
    upstream = torch.randn(
        6 if inputs.get("reduction") == "none" else (), dtype=torch.float64, device=DEVICE
    )
    assert_close(
        run(inputs, "reference", upstream), value_and_gradients(in_loops, inputs, upstream), 1e-12
    )


# ---- forward and all gradients -------------------------------------------------------------------


# At temperature 0.2, composed subtracts one number from all logits; at 0.002, it subtracts maxima.
@pytest.mark.parametrize("temperature", [0.2, 0.002])
@pytest.mark.parametrize("way", ["target", "symmetric"])
@pytest.mark.parametrize("same_id", IDS)
@pytest.mark.parametrize("keys", KEYS)
def test_composed_equals_reference_in_float64(keys, same_id, way, temperature, monkeypatch):
    monkeypatch.setattr(composed, "BLOCK_BYTES", 1)  # the minimum: 16 rows
    options = itertools.product(["mean", "sum", "none"], [0.0, 0.15], [None, 0.1])
    for n, (reduction, smoothing, margin) in enumerate(options):
        rest = dict(
            reduction=reduction,
            label_smoothing=smoothing,
            false_negative_margin=margin,
            positive_weight=[0.0, 0.4][n % 2],
        )
        given = dict(symmetric=True) if way == "symmetric" else dict(target=True)
        inputs = make(
            temperature=temperature, keys=keys, same_id=same_id, weight=n % 3 > 0, **given, **rest
        )
        upstream = torch.randn(B if reduction == "none" else (), dtype=torch.float64, device=DEVICE)
        assert_close(run(inputs, "composed", upstream), run(inputs, "reference", upstream))


def test_logits_have_a_safe_shift_at_temperature_0_2_but_not_at_0_002():
    q, c = (make()[name].detach() for name in ("query", "candidate"))
    shifts = [
        composed._safe_shift(q, c, bias, torch.tensor(1 / t))
        for t, bias in ((0.2, None), (0.2, 0 * c[:, 0]), (0.002, None))
    ]
    assert shifts == [pytest.approx(5), pytest.approx(5), None]
    assert composed._safe_shift(q, c, c[:, 0] * math.nan, torch.tensor(1.0)) is None


BUDGET_CASES = {
    "plain": dict(symmetric=True),
    "keys": dict(keys="three", symmetric=True, weight=True, positive_weight=0.5),
    "ids": dict(same_id="mean", target=True, label_smoothing=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("case", BUDGET_CASES)
def test_lower_precisions_stay_within_the_budget(case, temperature, dtype, monkeypatch):
    monkeypatch.setattr(composed, "BLOCK_BYTES", 64 * 4 * 150)
    inputs = make(130, 150, 40, dtype, temperature=temperature, **BUDGET_CASES[case])
    upstream = torch.randn((), device=DEVICE)
    exact, plain = (
        run(cast(inputs, torch.float64), "reference", upstream),
        run(inputs, "reference", upstream),
    )
    actual = run(inputs, "composed", upstream)
    assert actual["out"].dtype == torch.float32 and actual["dquery"].dtype == dtype
    assert not over_budget(actual, exact, plain)


# ---- adversarial values --------------------------------------------------------------------------


def extreme(case, dtype):
    inputs = make(33, 41, 8, dtype)
    q, c = (inputs[name].data for name in ("query", "candidate"))
    if case == "equal rows":
        q[:], c[:] = q[0].clone(), q[0].clone()
    if case == "one huge logit":
        q[3], c[7] = 100 * q[3], 100 * q[3]
    if case == "zero vectors":
        q[::2], c[::3] = 0, 0
    if case == "zero":
        q[:], c[:] = 0, 0
    return inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1, 36, 100, 1e4])
@pytest.mark.parametrize("case", ["random", "equal rows", "one huge logit", "zero vectors", "zero"])
def test_extreme_logits_stay_within_the_budget(case, scale, dtype):
    """If few logits dominate, the error of one batch is random, so four are compared together."""
    for options in (
        dict(symmetric=True),
        dict(symmetric=True, candidate_key=torch.arange(41, device=DEVICE) % 3),
    ):
        exact, plain, got = ({}, {}, {})
        for _ in range(4):
            inputs = extreme(case, dtype) | options
            inputs["temperature"].data.fill_(1 / scale)
            runs = (
                run(cast(inputs, torch.float64), "reference"),
                run(inputs, "reference"),
                run(inputs),
            )
            # A floor appended to each result bounds relative errors where gradients cancel.
            floor = {
                "out": 1,
                "dquery": scale / 33,
                "dcandidate": scale / 33,
                "dtemperature": scale**2,
            }
            for results, batch in zip((exact, plain, got), runs, strict=True):
                for k, v in batch.items():
                    results[k] = torch.cat(
                        [results.get(k, v.new_empty(0)), v.flatten(), v.new_ones(1) * floor[k]]
                    )
        # Errors grow with the logits.
        if dtype == torch.float64:
            assert max(relative_error(got[k], exact[k]) for k in got) < 1e-14 * max(scale, 100)
        else:
            assert not over_budget(got, exact, plain), options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("same_id", [None, "mean", "sum"])
def test_a_loss_near_zero_keeps_its_digits(same_id, dtype):
    """The target's logit is s and the 3 others are 0, so the loss is log(1 + 3 exp(-s)).

    With log_softmax, about three digits of this loss would be correct in float64.
    """
    s, eye = 30.0, torch.eye(4, dtype=dtype, device=DEVICE)
    inputs = dict(
        query=eye.clone().requires_grad_(),
        candidate=eye.clone().requires_grad_(),
        temperature=1 / s,
    )
    if same_id is not None:
        inputs |= dict(candidate_id=torch.arange(4, device=DEVICE), same_id=same_id)
    p = math.exp(-s) / (1 + 3 * math.exp(-s))
    slope = s * p / 4 * (torch.ones(4, 4, dtype=torch.float64) - 4 * torch.eye(4))
    for temperature in (1 / s, torch.tensor(1 / s, dtype=dtype, device=DEVICE)):
        got = run(inputs | dict(temperature=temperature))
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        assert abs(got["out"].item() / math.log1p(3 * math.exp(-s)) - 1) < tolerance
        assert (
            relative_error(got["dquery"].cpu(), slope) < tolerance
            and relative_error(got["dcandidate"].cpu(), slope) < tolerance
        )


@pytest.mark.parametrize("n", [1, 2, 37])
def test_the_loss_of_n_identical_embeddings_is_log_n(n):
    x = normalize(torch.ones(n, 3, dtype=torch.float64, device=DEVICE), dim=-1)
    for temperature in (1.0, 0.002):
        for symmetric in (False, True):
            with mmfused.backend("composed"):
                loss = masked_info_nce(x, x, temperature=temperature, symmetric=symmetric)
            assert abs(loss.item() - math.log(n)) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(symmetric=True),
        dict(label_smoothing=0.2),
        dict(same_id="sum"),
    ],
)
def test_rows_without_negatives_have_a_loss_of_exactly_zero(options, backend):
    """Every second row has a unique key. The mean includes these rows.

    With positive_weight, their loss is the positive term.
    """
    n, each = 24, torch.arange(24, device=DEVICE)
    alone, key = each % 2 == 0, torch.where(each % 2 == 0, each, 99)
    inputs = make(n, n, keys="one", **options) | dict(query_key=key, candidate_key=key)
    if "same_id" in options:
        inputs["candidate_id"] = torch.zeros_like(each)
    got = run(inputs, backend, torch.ones(n, device=DEVICE), reduction="none")
    assert not got["out"][alone].any() and got["out"][~alone].all()
    assert not got["dquery"][alone].any() and not got["dcandidate"][alone].any()
    assert_close(
        run(inputs, backend),
        {k: v.sum() / n if k == "out" else v / n for k, v in got.items()},
        1e-13,
    )
    dots = (inputs["query"] * inputs["candidate"]).sum(-1)
    with_term = run(
        inputs, backend, torch.ones(n, device=DEVICE), reduction="none", positive_weight=0.3
    )
    torch.testing.assert_close(with_term["out"][alone], 0.3 * (1 - dots[alone]))
    torch.testing.assert_close(with_term["dquery"][alone], -0.3 * inputs["candidate"][alone])


@pytest.mark.parametrize("b, c", [(1, 1), (1, 7), (7, 1), (17, 3), (16, 16), (33, 65)])
def test_odd_sizes(b, c, monkeypatch):
    monkeypatch.setattr(composed, "BLOCK_BYTES", 1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = make(
            b, c, 3, dtype, keys="three", target=c < b, symmetric=c >= b, positive_weight=0.1
        )
        assert_close(run(inputs), run(inputs, "reference"), tolerance)


@pytest.mark.parametrize("scale", [35.9, 39.9])  # shift by one number; shift by row and column
def test_large_upstream_gradients_do_not_overflow(scale):
    """All logits are at their lower bound, where exp(shift - logsumexp) is largest."""
    inputs = make(6, 6, 4, torch.float32, temperature=1 / scale, reduction="sum", symmetric=True)
    with torch.no_grad():
        inputs["query"][:] = inputs["query"][0].clone()
        inputs["candidate"][:] = -inputs["query"]
    got = run(inputs, upstream=torch.tensor(2.0**20, device=DEVICE))
    assert all(value.isfinite().all() for value in got.values())


# ---- layouts, operators, behaviour ---------------------------------------------------------------


def test_strided_inputs_and_gradients():
    inputs = make(keys="three", target=True, reduction="none", weight=True)
    want = run(inputs)
    wide = torch.randn(C, 2 * D, dtype=torch.float64, device=DEVICE)
    wide[:, ::2] = inputs["candidate"].detach()
    strided = dict(query=inputs["query"].detach().T.contiguous().T, candidate=wide[:, ::2])
    strided = {k: v.requires_grad_() for k, v in strided.items()}
    strided |= {
        k: v.repeat_interleave(3)[::3]
        for k, v in inputs.items()
        if k in ("candidate_key", "target", "row_weight")
    }
    assert_close(
        run(
            inputs | strided, upstream=torch.ones((), dtype=torch.float64, device=DEVICE).expand(B)
        ),
        want,
        1e-13,
    )


def test_opcheck(monkeypatch):
    calls = []
    for name in ("info_nce_sweep_composed", "info_nce_sweep_bwd_composed"):
        real = getattr(autograd, name)
        monkeypatch.setattr(
            autograd,
            name,
            lambda *args, real=real: (calls.append((real, args)), real(*args))[1],
        )
    run(make(keys="three", same_id="mean", dtype=torch.float32, symmetric=True))
    assert len(calls) == 2
    for operator, (*args, margin) in calls:
        assert margin is None
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(operator, (*args, 0.1))


COMPILED = """
import torch, mmfused
from torch._dynamo.utils import counters

def case(kind, n, dtype):
    q, c = (torch.randn(n, 6, requires_grad=True, dtype=dtype) for _ in "qc")
    key, temperature = torch.randint(0, 3, (n,)), torch.tensor(0.5, requires_grad=True)
    options = {
        "keys": dict(query_key=key, candidate_key=key, row_weight=torch.rand(n)),
        "itself": {},
        "everything": dict(
            candidate_key=key - 1,
            candidate_id=key,
            same_id="mean",
            label_smoothing=0.1,
            false_negative_margin=0.1,
        ),
    }
    return [q, q if kind == "itself" else c, temperature], dict(symmetric=True, **options[kind])

def loss(tensors, options):
    return mmfused.masked_info_nce(tensors[0], tensors[1], temperature=tensors[2], **options)

runs = [("composed", kind, torch.float32) for kind in ("keys", "itself", "everything")]
runs += [("composed", "keys", torch.float64), ("reference", "everything", torch.float32)]
for name, kind, dtype in runs:
    torch._dynamo.reset(), counters.clear()
    mmfused.set_backend(name)
    # aot_eager also traces the backward; it is slow, so one case uses it.
    backend = "aot_eager" if (name, kind) == ("composed", "everything") else "eager"
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (17, 40, 33):
        tensors, options = case(kind, n, dtype)
        want, got = loss(tensors, options), compiled(tensors, options)
        wants, gots = (torch.autograd.grad(out, tensors) for out in (want, got))
        for a, b in zip([want, *wants], [got, *gots], strict=True):
            torch.testing.assert_close(b, a)
    # torch 2.11 compiles the reference once for each size; the results are the same.
    graphs = 3 if name == "reference" and torch.__version__.startswith("2.11.") else 1
    assert counters["stats"]["unique_graphs"] == graphs, (name, kind, counters["stats"])
print("done")
"""


def run_python(code):
    """Run ``code`` in a new process, without a GPU, TRITON_INTERPRET and MMFUSED_BACKEND."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MMFUSED_BACKEND")}
    env |= {"PYTHONPATH": str(Path(__file__).parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_one_compiled_graph_serves_three_batch_sizes():
    done = run_python(COMPILED)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def test_double_backward():
    """The reference supports double backward; composed raises an error."""
    inputs = make(5, 7, 3, symmetric=True, positive_weight=0.3)
    rest = {k: v for k, v in inputs.items() if k != "query"}
    assert torch.autograd.gradgradcheck(
        lambda q: masked_info_nce_reference(q, **rest), (inputs["query"],)
    )
    with mmfused.backend("composed"):
        (dq,) = torch.autograd.grad(masked_info_nce(**inputs), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "options", [dict(target=True), dict(target=True, keys="three", same_id="mean")]
)
def test_repeated_runs_are_bitwise_equal(options):
    """Two threads run, and many rows share a target."""
    inputs = make(1024, 100, 64, torch.float32, temperature=0.07, **options)
    inputs["target"] %= 3
    leaves, threads = (
        [inputs[name] for name in ("query", "candidate", "temperature")],
        torch.get_num_threads(),
    )
    torch.set_num_threads(2)
    try:
        with mmfused.backend("composed"):
            losses = [masked_info_nce(**inputs) for _ in range(2)]
        runs = [torch.autograd.grad(losses[i], leaves, retain_graph=True) for i in (0, 1) * 3]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for other in runs for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("only", ["query", "candidate", "temperature"])
def test_only_the_required_gradient_is_computed(only, backend):
    inputs = make(keys="three", symmetric=True)
    want = run(inputs, backend)
    got = run(
        {
            k: v.detach().requires_grad_(k == only)
            if isinstance(v, torch.Tensor) and v.is_floating_point()
            else v
            for k, v in inputs.items()
        },
        backend,
    )
    assert got.keys() == {"out", f"d{only}"} and all(
        torch.equal(got[name], want[name]) for name in got
    )


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_autocast(backend):
    """Float32 embeddings are rounded to bfloat16; their loss and gradients are float32."""
    inputs = make(dtype=torch.float32, symmetric=True, positive_weight=0.2)
    low = {
        k: inputs[k].detach().bfloat16().float().requires_grad_() for k in ("query", "candidate")
    }
    exact, plain = (
        run(cast(inputs | low, torch.float64), "reference"),
        run(cast(inputs | low, torch.bfloat16), "reference"),
    )
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(inputs, backend)
        mixed = run(
            inputs | dict(candidate=inputs["candidate"].detach().bfloat16().requires_grad_()),
            backend,
        )
        assert run(make(), backend)["out"].dtype == torch.float64
        with pytest.raises(TypeError, match="dtype torch.int64"):
            masked_info_nce(ints[:, None], ints[:, None], temperature=1.0)
    assert all(value.dtype == torch.float32 for value in got.values()) and torch.equal(
        mixed["out"], got["out"]
    )
    assert relative_error(got["out"], exact["out"]) < 1e-6
    assert not over_budget(got, exact, plain)


def test_composed_saves_no_matrix_of_all_pairs():
    n, d = 1024, 16
    inputs = make(
        n,
        n,
        d,
        torch.float32,
        keys="three",
        same_id="mean",
        symmetric=True,
        label_smoothing=0.1,
        weight=True,
    )
    given = tuple(v for v in inputs.values() if isinstance(v, torch.Tensor))
    saved = {}
    for name in ("reference", "composed"):
        with mmfused.backend(name):
            saved[name] = saved_bytes(lambda: masked_info_nce(**inputs), given)
    assert saved["reference"] > 4 * n * n
    # One matrix as large as candidate, and vectors
    assert saved["composed"] < 4 * n * d + 30 * 8 * n


def test_peak_memory_is_far_below_one_matrix_of_all_pairs():
    """A float32 matrix of the 16384 x 16384 pairs has 1 GiB."""
    code = """
import torch, mmfused
torch.set_num_threads(1)
normalize = torch.nn.functional.normalize
x = [normalize(torch.randn(n, 256), dim=-1).requires_grad_() for n in (16384, 16384, 32, 32)]
loss = lambda q, c: mmfused.masked_info_nce(q, c, temperature=0.07, symmetric=True)
loss(*x[2:]).backward()  # the first call loads libraries
# VmHWM and not ru_maxrss, which starts at the peak of the parent process.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
loss(*x[:2]).backward()
print((peak() - before) / 1024)
"""
    done = run_python(code)
    assert not done.returncode, done.stderr
    assert 16 < float(done.stdout) < 250  # MiB, of which the gradients take 32


# ---- bad input -----------------------------------------------------------------------------------

x, ints = torch.randn(5, 4), torch.arange(5)
BAD = {
    "candidate: got dtype torch.float64, expected torch.float32 as query has": dict(
        candidate=x.double()
    ),
    "query: got dtype torch.int64, expected float32, float16, bfloat16 or float64": dict(
        query=x.long(), candidate=x.long()
    ),
    "query: got a list, expected a torch.Tensor": dict(query=[1.0]),
    "candidate: got None, expected a torch.Tensor": dict(candidate=None),
    "candidate: got a tensor on meta, expected cpu, where query is": dict(candidate=x.to("meta")),
    "query: got shape (4,), expected (rows, dim) with rows and dim above 0": dict(query=x[0]),
    "candidate: got shape (0, 4), expected (rows, dim)": dict(candidate=x[:0]),
    "candidate: got dim 3, expected 4 as query has": dict(candidate=x[:, :3]),
    "target: got dtype torch.int32, expected torch.int64": dict(target=ints.int()),
    "candidate_key: got shape (4,), expected (5,), one for each candidate": dict(
        candidate_key=ints[:4]
    ),
    "query_id: got shape (5, 1), expected (5,), one for each query": dict(
        query_id=ints[:, None], candidate_id=ints
    ),
    "query_key: got a tensor without candidate_key, expected both, or candidate_key alone": dict(
        query_key=ints
    ),
    "query_id: got a tensor without candidate_id, expected both": dict(query_id=ints),
    "symmetric: got True with a target, expected the default target": dict(
        symmetric=True, target=ints
    ),
    "candidate: got 4 rows, expected at least 5 as query has, or a target": dict(candidate=x[:4]),
    "same_id: got 'keep', expected one of drop, mean, sum": dict(same_id="keep"),
    "reduction: got 'max', expected one of mean, sum, none": dict(reduction="max"),
    "label_smoothing: got 1.0, expected a number from 0 to below 1": dict(label_smoothing=1.0),
    "positive_weight: got -1, expected a number of at least 0": dict(positive_weight=-1),
    "false_negative_margin: got nan, expected a finite number, or None": dict(
        false_negative_margin=math.nan
    ),
    "temperature: got 0.0, expected a number above 0": dict(temperature=0.0),
    "temperature: got shape (2,) and dtype torch.float32, expected a floating": dict(
        temperature=torch.ones(2)
    ),
    "temperature: got a number not above 0, expected a number above 0": dict(
        temperature=torch.tensor(-1.0)
    ),
    "row_weight: got shape (4,), expected (5,)": dict(row_weight=x[:4, 0]),
    "row_weight: got a tensor that requires grad, expected a constant: detach() it": dict(
        row_weight=torch.ones(5, requires_grad=True)
    ),
    "row_weight: got a negative number, expected numbers of at least 0": dict(
        row_weight=-torch.ones(5)
    ),
    "target: got a value outside [0, 5), expected the index of a candidate": dict(target=ints + 1),
    "query_key: got a negative value, expected keys of at least 0": dict(
        query_key=ints - 1, candidate_key=ints
    ),
    "candidate_key: got a value below -1, expected keys of at least 0, or -1": dict(
        candidate_key=ints - 2
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_raises_a_one_line_message(sentence):
    with pytest.raises((TypeError, ValueError)) as error:
        masked_info_nce(**dict(query=x, candidate=x, temperature=0.1) | BAD[sentence])
    assert (
        str(error.value).startswith("masked_info_nce: ")
        and sentence in str(error.value)
        and "\n" not in str(error.value)
    )


def test_fused_raises_if_it_cannot_run():
    with mmfused.backend("fused"):
        with pytest.raises(RuntimeError, match="cannot run here: .*dtype torch.float64"):
            masked_info_nce(x.double(), x.double(), temperature=0.1)
        with pytest.raises(RuntimeError, match="false_negative_margin has no kernel"):
            masked_info_nce(x, x, temperature=0.1, false_negative_margin=0.1)
