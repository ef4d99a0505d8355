"""Tests that warmup records the launches of a step."""

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from warmup_cases import (
    BF16,
    CPU,
    DRY,
    NCE,
    call_of,
    fluid,
    kernel_of_a_user,
    pooling,
    products_of,
    uniecs,
)

import mmfused
from mmfused import tuned_file
from mmfused.kernels import jobs, tiles, tuned
from mmfused.kernels.query_pooling.plans import Tile
from mmfused.kernels.recording import launches_for
from mmfused.warmup import api, on_meta
from mmfused.warmup.report import WarmupReport


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
