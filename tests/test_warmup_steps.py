"""Tests of what a warmup leaves as it was, of its arguments and its report."""

import contextlib
import functools
import random
from collections import deque
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton import knobs
from warmup_cases import CPU, DRY, call_of, kernel_of_a_user, pooling

import mmfused
from mmfused import library
from mmfused.kernels import jobs
from mmfused.kernels.jobs import Outcome
from mmfused.warmup import api, steps
from mmfused.warmup.report import WarmedKernel, WarmupReport

# ---- what stays as it was ------------------------------------------------------------------------


class Changing(nn.Module):
    """A module that changes all that a step may change."""

    def __init__(self):
        super().__init__()
        self.average = nn.Parameter(torch.ones(4), requires_grad=False)
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.cache, self.count, self.losses = {"lists": [[]]}, 0, deque(maxlen=1)

    def forward(self, x):
        self.calls += 1
        self.average.lerp_(self.linear.bias.detach(), 0.1)
        self.count += 1
        self.cache["last"] = self.last = x
        self.cache["lists"][0].append(x)
        self.losses.append(random.random() + numpy.random.rand())
        return self.linear(self.dropout(self.norm(x)))


@pytest.mark.parametrize("phase", ["record", "run"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_changes(phase, fails):
    model = Changing()
    model.linear.weight.grad = torch.ones(4, 4)
    call = call_of((lambda x: model(x).no) if fails else model, ((6, 4),))
    attributes = dict(vars(model))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    places = {name: x.data_ptr() for name, x in model.state_dict().items()}
    generator = torch.get_rng_state()
    random.seed(7), numpy.random.seed(7)
    expected = (random.random(), numpy.random.rand())
    random.seed(7), numpy.random.seed(7)
    with pytest.raises((RuntimeError, AttributeError)) if fails else contextlib.nullcontext():
        if phase == "record":
            call.record(WarmupReport("sm_90"))
        else:
            call.written = {(id(model), "average")}
            call.run_once(call.batches[0], CPU)
    if not fails and phase == "record":
        assert call.written == {(id(model), "average")}
    assert vars(model) == attributes and model.training
    assert model.cache == {"lists": [[]]} and not model.losses
    assert (random.random(), numpy.random.rand()) == expected
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == places
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model.linear.weight.grad, torch.ones(4, 4))
    assert model.linear.bias.grad is None


def test_a_recording_leaves_no_meta_tensors_in_objects_that_the_step_reaches():
    scaler = torch.amp.GradScaler("cpu")
    trainer = SimpleNamespace(model=nn.Linear(4, 4), last=None, count=0)

    def step(x):
        trainer.count += 1
        trainer.last = trainer.model(x).sum()
        trainer.results = {"loss": trainer.last}
        return scaler.scale(trainer.last)

    before = dict(vars(scaler))
    call_of(step, ((6, 4),)).record(WarmupReport("sm_90"))
    assert vars(scaler) == before
    assert vars(trainer) == {"model": trainer.model, "last": None, "count": 1}
    scaler.scale(trainer.model(torch.ones(2, 4)).sum()).backward()


def test_running_uses_the_given_values_and_dense_gradients():
    seen = []

    def step(x, lengths, ids, meta):
        x.register_hook(lambda gradient: seen.append((gradient.stride(), gradient.std() > 0)))
        seen.append((x.dtype, x.requires_grad, lengths.tolist(), ids.tolist(), meta.shape))
        return {"out": x * 1}

    meta = torch.empty(2, dtype=torch.int32, device="meta")
    shapes = ((3, 4), torch.tensor([5]), ((2,), torch.int64), meta)
    call = call_of(step, shapes, input_gradients=True)
    call.run_once(call.batches[0], CPU)
    assert seen == [(torch.float32, True, [5], [0, 0], (2,)), ((4, 1), True)]


def test_on_a_gpu_the_step_runs_and_late_kernels_are_counted(monkeypatch):
    done, hits = [], [True, False, False]
    kernel = SimpleNamespace(__module__="mmfused.kernels.query_pooling.forward")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(api.extension, "load", lambda: done.append("load"))
    listener = knobs.compilation.listener
    call, report = call_of(F.relu, [((6, 4),)] * 3), WarmupReport("sm_90")

    def run_once(batch, device):
        done.append((batch.args, str(device)))
        ours, other = ({"src": SimpleNamespace(fn=each)} for each in (kernel, kernel_of_a_user))
        knobs.compilation.listener(**ours, cache_hit=hits.pop())
        knobs.compilation.listener(**other, cache_hit=False)
        knobs.compilation.listener(src=None, cache_hit=False)

    monkeypatch.setattr(call, "run_once", run_once)
    with library.router("cuda"):
        call.rehearse(report)
    assert done == ["load", *[(((6, 4),), "cuda:1")] * 3, "synchronize"]
    assert report.ran and report.late == 2 and knobs.compilation.listener is listener


def test_a_model_on_the_host_does_not_run_on_a_gpu():
    call, report = call_of(nn.Linear(4, 4), ((6, 4),)), WarmupReport("sm_90")
    call.rehearse(report)
    assert report.notes == ["the model is on cpu, so the step did not run on the GPU"]
    assert not report.ran


def test_a_step_that_cannot_be_recorded_still_runs_on_a_gpu(monkeypatch):
    call, report = call_of(lambda x: x * float(x.sum()), ((6, 4),)), WarmupReport("sm_90")
    call.runs = True
    assert call.record(report) == {}
    assert "batch 0: the step cannot run on meta tensors: RuntimeError" in report.notes[0]


def test_a_module_under_fsdp_is_not_recorded_and_its_gradients_are_not_kept():
    class FSDPModule(nn.Linear):
        pass

    model = FSDPModule(4, 4)
    with pytest.raises(RuntimeError, match="under FSDP cannot be recorded; pass it before"):
        mmfused.warmup(model, ((6, 4),), **DRY)
    call = call_of(model, ((6, 4),))
    hooked = []
    model.weight.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad))
    call.run_once(call.batches[0], CPU)
    assert len(hooked) == 1 and model.weight.grad is None


# ---- the arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": 3}, "model: got a int, expected a module or a function"),
        ({"shapes": (8, 50, 32)}, r"expected a tuple of arguments, such as \(\(8, 50, 32\),\)"),
        ({"shapes": []}, "shapes: got an empty list, expected a batch"),
        (
            {"shapes": [[(2, 3)]]},
            "shapes: got a batch of type list, expected a tuple of positional",
        ),
        ({"shapes": {3: (2, 3)}}, r"shapes: got the keys \[3\], expected names of arguments"),
        ({"shapes": ((2, -3),)}, r"shapes: got \(2, -3\), expected sizes of 0 or more"),
        ({"dtype": "bf16"}, "dtype: got 'bf16', expected a torch.dtype or None"),
        ({"model": nn.LazyLinear(3)}, "model: got a lazy module, expected one that has run once"),
        ({"workers": -1}, "workers: got -1, expected an int of 0 or more, or None"),
        ({"arch": "sm_70"}, "arch: got 'sm_70', expected one of sm_80, "),
        ({"workers": 1}, "TRITON_INTERPRET: got '1', expected it unset"),
    ],
)
def test_bad_arguments_give_one_sentence(change, message, monkeypatch):
    monkeypatch.setattr(api, "INTERPRETED", True)
    arguments = {"model": nn.Linear(3, 3), "shapes": ((2, 3),), **DRY, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        mmfused.warmup(arguments.pop("model"), arguments.pop("shapes"), **arguments)


def test_frequent_mistakes_of_a_step_are_explained():
    layer, outside = nn.Linear(4, 4), torch.randn(2, 4)

    def runs_backward(x):
        loss = layer(x).sum()
        loss.backward()
        return loss

    def uses_a_tensor_of_its_own(x):
        return mmfused.masked_info_nce(layer(x), outside, temperature=1.0)

    for step, shapes, hint in (
        (runs_backward, ((2, 4),), "return the loss; warmup runs the backward pass"),
        (uses_a_tensor_of_its_own, ((2, 4),), "pass this tensor as an argument of the step"),
        (lambda x: layer(x) * float(x.sum()), ((2, 4),), "reads a value that is not known"),
        (layer, ([2, 4],), "a tuple of ints, or "),
    ):
        with pytest.raises(RuntimeError, match=hint):
            mmfused.warmup(step, shapes, **DRY)
    notes = mmfused.warmup(layer, ((2, 4),), **DRY).notes
    assert notes[0].startswith("the step launches no kernel of this library")


def test_what_ptxas_refuses_is_named():
    text = "PTXAS error\n`ptxas` stderr:\nptxas fatal   : (C7602) Too few registers\nmore"
    assert jobs.reason_of(OSError(text)) == "OSError: ptxas: (C7602) Too few registers"
    assert jobs.reason_of(OSError("at 3:4:\nno such name")) == "OSError: at 3:4: no such name"


def test_without_a_gpu_the_architecture_must_be_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="arch: got None on a machine without a GPU, expected one"):
        mmfused.warmup(nn.Linear(3, 3), ((2, 3),), workers=0)
    monkeypatch.setattr(api, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="warmup: triton is not installed"):
        mmfused.warmup(nn.Linear(3, 3), ((2, 3),), **DRY)


def test_shapes_may_be_nested_and_other_values_are_passed():
    seen = []
    step = lambda **batch: seen.append(batch)  # noqa: E731
    batch = {"a": {"b": [(2, 3), ((4,), torch.bool)]}, "n": 7, "s": "x", "l": [1, 2], "e": ()}
    mmfused.warmup(step, batch, dtype=torch.float16, **DRY)
    (got,) = seen
    assert got["a"]["b"][0].shape == (2, 3) and got["a"]["b"][0].dtype == torch.float16
    assert got["a"]["b"][1].dtype == torch.bool and got["e"].shape == ()
    assert (got["n"], got["s"], got["l"]) == (7, "x", [1, 2])


MODULE = nn.Linear(3, 3)


def global_step(x):
    return F.relu(MODULE(x))


class Trainer:
    def __init__(self):
        self.parts = {"model": nn.Linear(3, 3)}

    def step(self, x):
        return self.parts["model"](x)

    __call__ = step


def test_modules_are_found_where_a_step_reaches_them():
    local, trainer = nn.Sequential(nn.Linear(3, 3)), Trainer()
    outer = SimpleNamespace(inner=trainer)
    for step in (
        local,
        lambda x: local(x),
        lambda x, m=local: m(x),
        functools.partial(lambda m, x: m(x), local),
        local.forward,
    ):
        assert steps.reached_by(step).modules == [local, local[0]]
    assert steps.reached_by(lambda x: global_step(x)).modules == [MODULE]
    for step in (trainer.step, trainer, lambda x: trainer.step(x), lambda x: outer.inner.step(x)):
        assert steps.reached_by(step).modules == [trainer.parts["model"]]
    assert steps.reached_by(trainer.step).objects == [trainer]


def test_a_parameter_out_of_reach_gives_one_sentence():
    weights = iter([nn.Parameter(torch.ones(3))])
    with pytest.raises(RuntimeError, match="is not in a module that the step reaches, expected"):
        mmfused.warmup(lambda x: x * next(weights), ((2, 3),), **DRY)
    weights = iter([nn.Parameter(torch.ones(3))])
    call = call_of(lambda x: x * next(weights), ((2, 3),))
    with pytest.raises(ValueError, match="step: got no parameter that requires .* two deep$"):
        call.run_once(call.batches[0], CPU)


# ---- the report and the workers ------------------------------------------------------------------


def test_the_report_shows_faults_and_counts():
    def kernel(**fields):
        return WarmedKernel("op", "name", Outcome(**{"spilled": 0, "shared": 9, **fields}), 100)

    good, cached = kernel(registers=40, seconds=1.0), kernel(registers=41, cached=True)
    bad = [kernel(spilled=8), kernel(shared=200), kernel(error="Error: no")]
    report = WarmupReport("sm_90", [good, cached, *bad, WarmedKernel("op", "x", None, 100)], late=2)
    assert (report.compiled, report.cached) == (3, 1)
    faults = ["spills 8 bytes", "needs more than the GPU's 100 bytes", "Error: no"]
    assert all(text in fault for text, fault in zip(faults, report.faults, strict=True))
    text = str(report)
    assert "6 kernels, 3 compiled, 1 in the cache" in text and "2 compiled while the step" in text
    assert all(f"<- {fault.removeprefix('op.name: ')}" in text for fault in report.faults)


def test_a_job_has_the_options_that_a_launch_gets_from_the_environment(monkeypatch):
    (job, *_) = call_of(pooling(), ((8, 50, 32),)).record(WarmupReport("sm_90")).values()
    assert job.options["debug"] is False and job.options["instrumentation_mode"] == ""
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert jobs.as_launched(job).options["debug"] is True


def test_an_error_of_the_compiler_is_an_outcome(monkeypatch):
    monkeypatch.setattr(jobs, "compiled", lambda job: [][0])
    assert jobs.outcome_of(None).error == "IndexError: list index out of range"


def test_a_dead_worker_is_an_error(monkeypatch):
    monkeypatch.setattr(jobs, "_SERVE", "import os; os._exit(3)")
    job = jobs.Job("op", "", "sm_90", "m", "some_kernel", {}, {}, {}, {})
    with pytest.raises(RuntimeError, match="some_kernel: the process that compiled it .* status 3"):
        list(jobs.outcomes_of({"a": job}, 1))
