"""Tests that warmup records the launches of a step, and leaves everything else as it was."""

import contextlib
import functools
import random
from collections import deque
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.utils.checkpoint import checkpoint
from triton import knobs

import mmfused
from mmfused import library, models, tuned_file
from mmfused.kernels import jobs, tiles, tuned
from mmfused.kernels.jobs import Outcome
from mmfused.kernels.query_pooling.plans import Tile
from mmfused.kernels.recording import launches_for
from mmfused.warmup import api, on_meta, steps
from mmfused.warmup.api import _Call
from mmfused.warmup.report import WarmedKernel, WarmupReport

DRY = {"arch": "sm_90", "workers": 0}
CPU = torch.device("cpu")
BF16 = torch.bfloat16
NCE = ((32, 16), (32, 16))


def call_of(model, shapes, backward=True, input_gradients=False):
    return _Call(model, shapes, None, backward, input_gradients, "sm_90", 0)


def products_of(rows=8):
    return {
        "pixel_values": (rows, 3, 32, 32),
        "input_ids": ((rows, 10), torch.int64),
        "attention_mask": torch.arange(10).repeat(rows, 1) < 7,
        "image_present": ((rows,), torch.bool),
        "labels": ((rows,), torch.int64),
    }


def fluid():
    return models.FLUID(models.FLUIDConfig.preset("tiny", num_classes=5, vocab_size=50))


def uniecs():
    return models.UniECS(models.UniECSConfig.preset("tiny", vocab_size=50, image_size=32))


def pooling():
    pool = mmfused.QueryPooling(32, num_queries=4, norm_kv=True, dropout=0.1)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(128, 3))


# ---- what is recorded ----------------------------------------------------------------------------


def _zeroed(allocate):
    def filled(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x if x.is_meta else x.zero_()

    return filled


@pytest.fixture
def zeros(monkeypatch):
    """Let memory be 0 that the kernels would have written."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _zeroed(getattr(owner, name)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CPU tensors")
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "make, batch, input_gradients",
    [
        (pooling, ((8, 50, 32),), False),
        (lambda: mmfused.GatedCrossAttention(32, 2), ((4, 9, 32), (4, 12, 32)), True),
        (lambda: mmfused.TopKMoE(32, 64, 4, 2), ((4, 9, 32),), False),
        (lambda: mmfused.MaskedInfoNCE(symmetric=True), NCE, True),
        (fluid, products_of(), False),
        (uniecs, (products_of(), products_of()), False),
    ],
    ids=["pooling", "gated", "experts", "loss", "fluid", "uniecs"],
)
def test_the_recorded_launches_are_those_of_a_step(make, batch, input_gradients, amp, zeros):
    call = call_of(make(), batch, input_gradients=input_gradients)
    with torch.autocast("cpu", BF16, enabled=amp), mmfused.backend("fused"):
        recorded = call.record(WarmupReport("sm_90"))
        with launches_for(90) as launches:
            call.run_once(call.batches[0], CPU)
    made = [jobs.as_launched(jobs.job_of(op_of(x), "", "sm_90", x)) for x in launches]
    assert set(recorded) == set(map(repr, made))
    assert len(recorded) > 1


def op_of(launch):
    return launch.kernel.fn.__module__.split("kernels.")[-1].split(".")[0]


@pytest.mark.parametrize("where", ["around", "inside", "of the tensor's device"])
def test_autocast_around_and_inside_of_the_step_counts(where):
    pool = pooling()

    def step(x):
        inside = {"inside": "cuda", "of the tensor's device": x.device.type}
        if where not in inside:
            return pool(x)
        with torch.autocast(inside[where], BF16):
            return pool(x)

    with torch.autocast("cpu", BF16) if where == "around" else contextlib.nullcontext():
        found = call_of(step, ((8, 50, 32),)).record(WarmupReport("sm_90"))
    types = {str(kind) for job in found.values() for kind in job.signature.values()}
    assert any("bf16" in kind for kind in types)
    assert not torch.is_autocast_enabled("cuda")


def test_autocast_casts_as_on_a_gpu():
    dtypes = []

    def step(x, weight):
        with torch.autocast("cuda", BF16):
            product = F.linear(x, weight)
            normed = F.layer_norm(product, (4,))
            with torch.autocast("cuda", enabled=False):
                full = x @ weight
            attended = F.scaled_dot_product_attention(normed, normed, normed)
        results = (product, normed, product.softmax(-1), full, attended, x @ weight)
        dtypes.extend(result.dtype for result in results)
        return product + normed

    mmfused.warmup(step, ((2, 4, 4), (4, 4)), input_gradients=True, **DRY)
    full = torch.float32
    assert dtypes == [BF16, full, BF16, full, BF16, full]


def test_factors_of_two_dtypes_are_refused_as_on_a_gpu():
    linear, pool = nn.Linear(64, 64), mmfused.QueryPooling(64, num_queries=4)

    def step(x):
        return pool(linear(x)).sum()

    message = "addmm got float32 and float16, expected one dtype"
    with pytest.raises(RuntimeError, match=message):
        mmfused.warmup(step, ((8, 197, 64),), dtype=torch.float16, **DRY)
    with torch.autocast("cpu", BF16):
        assert mmfused.warmup(step, ((8, 197, 64),), dtype=torch.float16, **DRY).kernels


def test_shared_parameters_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    seen = []
    step = lambda x: seen.append((model[0].weight, model[1].weight, model[0].bias))  # noqa: E731
    mmfused.warmup(step, ((2, 4),), **DRY)
    assert seen[0][0] is seen[0][1] and seen[0][2].is_meta and not model[0].bias.is_meta


def test_without_a_backward_pass_fewer_kernels_are_recorded():
    full = mmfused.warmup(pooling(), ((8, 50, 32),), **DRY)
    half = mmfused.warmup(pooling(), ((8, 50, 32),), backward=False, **DRY)
    assert 0 < len(half.kernels) < len(full.kernels)
    assert full.notes == half.notes == ["workers=0: nothing was compiled"]


def test_a_step_without_gradients_is_noted():
    report = mmfused.warmup(mmfused.MaskedInfoNCE(), NCE, **DRY)
    assert report.kernels and "nothing that the step returned requires a gradient" in str(report)


def test_a_step_may_run_its_own_backward_pass_if_it_returns_nothing():
    pool = pooling()
    own = call_of(lambda x: pool(x).sum().backward(), ((8, 50, 32),))
    loss = call_of(lambda x: pool(x).sum(), ((8, 50, 32),))
    assert set(own.record(WarmupReport("sm_90"))) == set(loss.record(WarmupReport("sm_90")))
    own.run_once(own.batches[0], CPU)
    assert all(p.grad is None for p in pool.parameters())


def test_input_gradients_add_the_kernels_of_dx():
    gated = mmfused.GatedCrossAttention(32, 2).requires_grad_(False)
    shapes = ((4, 9, 32), (4, 12, 32))
    tensors = tuple(torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    by_option = mmfused.warmup(gated, shapes, input_gradients=True, **DRY)
    by_tensor = mmfused.warmup(gated, tensors, **DRY)
    assert [k.name for k in by_option.kernels] == [k.name for k in by_tensor.kernels]
    assert len(by_option.kernels) > len(mmfused.warmup(gated, shapes, **DRY).kernels)


def test_the_backward_pass_starts_at_the_loss_if_there_is_one():
    @dataclass
    class Output:
        other: torch.Tensor
        loss: torch.Tensor

    pool, head = mmfused.QueryPooling(32, num_queries=2), nn.Linear(32, 1)
    both = lambda x: Output(pool(x), head(x).mean())  # noqa: E731
    alone = call_of(both, ((8, 50, 32),)).record(WarmupReport("sm_90"))
    forward = call_of(both, ((8, 50, 32),), backward=False).record(WarmupReport("sm_90"))
    assert set(alone) == set(forward)  # no backward kernel of the pooling
    without_loss = lambda x: (pool(x), head(x).mean())  # noqa: E731
    assert len(call_of(without_loss, ((8, 50, 32),)).record(WarmupReport("sm_90"))) > len(alone)


def test_several_batches_give_the_kernels_of_each():
    one, other = ((8, 50, 32),), ((8, 51, 32), ((8, 51), torch.bool))
    model = mmfused.QueryPooling(32, num_queries=4)
    both = mmfused.warmup(model, [one, other, one], **DRY)
    alone = [mmfused.warmup(model, batch, **DRY) for batch in (one, other)]
    assert max(len(r.kernels) for r in alone) < len(both.kernels)
    assert len(both.kernels) <= sum(len(r.kernels) for r in alone)
    assert "pack_mask" in {kernel.name for kernel in both.kernels}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recorded_and_run(reentrant):
    pool, first = mmfused.QueryPooling(32, num_queries=4, norm_kv=True), nn.Linear(32, 32)

    def checkpointed(layer):
        return lambda x: checkpoint(layer, x, use_reentrant=reentrant)

    def step_with(layer):
        def step(x):
            x = first(x)
            with torch.autocast("cuda" if x.is_meta else "cpu", BF16):
                return layer(x)

        return call_of(step, ((8, 50, 32),))

    plain, nested = step_with(pool), step_with(checkpointed(checkpointed(pool)))
    assert set(plain.record(WarmupReport("sm_90"))) <= set(nested.record(WarmupReport("sm_90")))
    nested.run_once(nested.batches[0], CPU)
    assert all(p.grad is None for p in (*pool.parameters(), *first.parameters()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CPU tensors")
@pytest.mark.parametrize("start", [1, 16])
def test_addresses_of_views_are_divisible_as_in_a_step(start, zeros):
    flat = nn.Parameter(torch.randn(4 * 32 + start))
    pool = mmfused.QueryPooling(32, None)
    pool.queries = nn.Parameter(flat.data[start:].view(4, 32))  # as an optimizer's flat buffer

    def step(x, mask):
        return pool(x, mask[:, start:], pool.queries)

    call = call_of(step, ((8, 48 - start, 32), torch.zeros(8, 48, dtype=torch.bool)))
    with mmfused.backend("fused"):
        recorded = call.record(WarmupReport("sm_90"))
        with launches_for(90) as launches:
            call.run_once(call.batches[0], CPU)
    made = [jobs.as_launched(jobs.job_of(op_of(x), "", "sm_90", x)) for x in launches]
    assert set(recorded) == set(map(repr, made))


def test_code_that_reads_given_values_is_recorded_with_them():
    seen = []

    def step(x, lengths, mask):
        longest = int(lengths.max())
        seen.append((longest, bool(mask.all()), (lengths.cumsum(0) > 3).tolist()))
        seen.append(torch.tensor([2, 3], device=x.device).tolist())
        seen.append(len(mask.nonzero()))
        return x[:, :longest]

    given = torch.tensor([2, 3]), torch.tensor([True, False])
    mmfused.warmup(step, ((2, 9, 4), *given), **DRY)
    assert seen == [(3, False, [False, True]), [2, 3], 1]
    assert given[0].tolist() == [2, 3] and not on_meta._VALUES
    with pytest.raises(RuntimeError, match="cannot run on meta tensors: RuntimeError: Tensor.item"):
        mmfused.warmup(lambda x: x * float(x.sum()), ((2, 9, 4),), **DRY)


def test_given_masks_select_rows_of_other_tensors():
    pool, seen = mmfused.QueryPooling(32, num_queries=4), []

    def step(x, present):
        seen.append((x[present].shape, x[:, :2][:, present[:2]].shape))
        x[present] = x[present] * 2
        return pool(x[present])

    first = nn.Linear(32, 32)
    present = torch.tensor([True, False, True, False])
    mmfused.warmup(lambda x, present: step(first(x), present), ((4, 9, 32), present), **DRY)
    assert seen == [((2, 9, 32), (4, 1, 32))]


def test_values_that_are_overwritten_or_too_many_are_not_known():
    def overwritten(x, flags):
        flags[:1].copy_(x.sum() > 0)
        return bool(flags.all())

    def many(x, flags):
        return bool(flags.expand(on_meta._KNOWN, 2).all())

    for step in (overwritten, many):
        with pytest.raises(RuntimeError, match="item\\(\\) cannot be called on meta tensors"):
            mmfused.warmup(step, ((2, 4), torch.tensor([True, True])), **DRY)


def test_a_step_may_make_tensors_on_a_gpu_that_is_not_there():
    def step(x):
        made = torch.zeros(4, device="cuda") + torch.arange(4, device="cuda").to("cuda:0")
        return x.cuda() + made + torch.ones(4).cuda()

    assert mmfused.warmup(step, ((2, 9, 4),), **DRY).kernels == []
    assert torch.cuda.is_available() == bool(torch.cuda.device_count())


def test_torch_compile_and_fuse_are_seen_through():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 4, 32))
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x):
            query = self.query.expand(len(x), -1, -1)
            return self.attention(query, x, x, need_weights=False)[0]

    model = Pool()
    assert mmfused.warmup(model, ((8, 50, 32),), **DRY).kernels == []
    mmfused.fuse(model)
    compiled = []
    inner = torch.compile(model, backend=lambda graph, inputs: compiled.append(graph) or graph)
    for each in (model, inner, nn.DataParallel(model), lambda x: inner(x)):
        assert mmfused.warmup(each, ((8, 50, 32),), **DRY).kernels
    assert not compiled


@triton.jit
def kernel_of_a_user(x_ptr):
    tl.store(x_ptr, 1.0)


def test_kernels_of_others_are_left_to_them():
    pool = mmfused.QueryPooling(32, num_queries=4)

    def step(x):
        kernel_of_a_user[(1,)](x)
        return pool(x)

    both, alone = (mmfused.warmup(each, ((8, 50, 32),), **DRY) for each in (step, pool))
    assert [kernel.name for kernel in both.kernels] == [kernel.name for kernel in alone.kernels]


def test_plans_are_chosen_for_the_multiprocessors_of_this_gpu(monkeypatch):
    card = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(api, "_gpu_arch", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    call = call_of(nn.Linear(4, 4), ((6, 4),))
    assert call.runs is False  # workers=0
    with call._replaced():
        assert tiles.MULTIPROCESSORS[90] == 7
    assert tiles.MULTIPROCESSORS[90] == 132


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


def test_the_plans_are_those_of_the_named_architecture():
    model = mmfused.QueryPooling(64, num_queries=4).bfloat16()
    names = {}
    for arch in ("sm_80", "sm_90"):
        report = mmfused.warmup(model, ((8, 197, 64),), arch=arch, workers=0)
        names[arch] = {kernel.name for kernel in report.kernels}
    assert names["sm_80"] != names["sm_90"] and tiles.pretended_arch is None


def test_the_plans_of_the_tuned_file_are_recorded(monkeypatch):
    pool = mmfused.QueryPooling(64, num_queries=4).bfloat16()

    def warps():
        found = call_of(pool, ((8, 197, 64),)).record(WarmupReport("sm_90"))
        return {job.options["num_warps"] for job in found.values() if "hopper" not in job.kernel}

    monkeypatch.setattr(tuned_file, "current", lambda: None)
    with tuned.observed() as reached:
        assert warps() == set()
    (call,) = {(one.op, one.arguments): one for one in reached}.values()
    tiles_of_two_passes = {name: Tile(64, 16, 64, 2, 2) for name in ("logits", "pool")}
    plan = replace(call.default, forward=tiles_of_two_passes)
    entry = tuned.Entry(call.op, call.arguments, call.default, plan)
    found = tuned_file.Tuned("NVIDIA H200", "3.6.0", entries=[entry])
    monkeypatch.setattr(tuned_file, "current", lambda: found)
    assert warps() == {2}
