"""Masked InfoNCE: invariances, sums of gradients, GradCache, and the module."""

import math

import pytest
import torch
import torch.distributed as dist
from info_nce_cases import DEVICE, B, C, assert_close, make, run
from torch import nn
from torch.nn.functional import normalize

import mmfused
from mmfused import MaskedInfoNCE, masked_info_nce
from mmfused.losses import unit_rows
from mmfused.ops.masked_info_nce import composed

# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
@pytest.mark.parametrize("by", ["key", "key, symmetric", "id"])
def test_masking_a_candidate_equals_deleting_it(by, value, backend):
    inputs = make(
        keys="none" if by == "id" else "three", symmetric="symmetric" in by, label_smoothing=0.1
    )
    if by == "id":  # every query has the id 7
        inputs |= dict(
            query_id=torch.full((B,), 7, device=DEVICE),
            candidate_id=torch.arange(100, 100 + C, device=DEVICE),
        )
    hidden = torch.arange(C, device=DEVICE) % 5 == 1
    hidden[:B] = False  # these candidates are the rows' targets
    mark = {"key": ("candidate_key", 9), "id": ("candidate_id", 7)}[by[:3].strip(",")]
    inputs[mark[0]][hidden] = mark[1]
    with torch.no_grad():
        inputs["candidate"][hidden, 1:] = value
    kept = {k: v[~hidden] for k, v in inputs.items() if k.startswith("candidate")}
    kept["candidate"] = kept["candidate"].detach().requires_grad_()
    got, want = run(inputs, backend), run(inputs | kept, backend)
    assert not got["dcandidate"][hidden].any()
    got["dcandidate"] = got["dcandidate"][~hidden]
    assert_close(got, want, 1e-13)


def test_the_order_of_rows_and_candidates_does_not_matter():
    inputs = make(
        keys="many", same_id="mean", target=True, weight=True, label_smoothing=0.1, reduction="none"
    )
    upstream = torch.rand(B, dtype=torch.float64, device=DEVICE)
    want = run(inputs, upstream=upstream)
    rows, columns = torch.randperm(B, device=DEVICE), torch.randperm(C, device=DEVICE)
    moved = {k: inputs[k][rows] for k in ("query", "query_key", "row_weight")}
    moved |= {k: inputs[k][columns] for k in ("candidate", "candidate_key", "candidate_id")}
    moved = {k: v.detach().requires_grad_(inputs[k].requires_grad) for k, v in moved.items()}
    moved["target"] = columns.argsort()[inputs["target"]][rows]
    got = run(inputs | moved, upstream=upstream[rows])
    want |= dict(
        out=want["out"][rows], dquery=want["dquery"][rows], dcandidate=want["dcandidate"][columns]
    )
    assert_close(got, want, 1e-13)


def test_symmetric_is_the_mean_of_both_directions():
    inputs = make(c=B, keys="many", same_id="sum", label_smoothing=0.1, positive_weight=0.3)
    key, ids = inputs["query_key"], inputs["candidate_id"]
    inputs |= dict(candidate_key=key, query_id=ids)
    mirrored = inputs | dict(query=inputs["candidate"], candidate=inputs["query"])
    both, one_way, other_way, exchanged = (
        run(i, symmetric=s) for s, i in ((1, inputs), (0, inputs), (0, mirrored), (1, mirrored))
    )
    exchange = dict(dquery="dcandidate", dcandidate="dquery")
    assert_close(
        both, {k: (one_way[k] + other_way[exchange.get(k, k)]) / 2 for k in one_way}, 1e-13
    )
    assert_close(both, {k: exchanged[exchange.get(k, k)] for k in both}, 1e-13)


def test_keys_separate_the_loss_into_one_loss_per_key():
    inputs = make(c=B, symmetric=True, reduction="sum")
    key = torch.arange(B, device=DEVICE) % 3
    got = run(inputs, query_key=key, candidate_key=key)
    parts = [
        {k: inputs[k].detach()[key == m].requires_grad_() for k in ("query", "candidate")}
        for m in range(3)
    ]
    parts = [run(inputs | part) for part in parts]
    want = {k: sum(part[k] for part in parts) for k in ("out", "dtemperature")}
    for name in ("dquery", "dcandidate"):
        want[name] = torch.zeros_like(got[name])
        for m, part in enumerate(parts):
            want[name][key == m] = part[name]
    assert_close(got, want, 1e-13)


def test_neutral_options_do_not_change_the_result():
    inputs = make(symmetric=True)
    want = run(inputs)
    ones, each = torch.ones(C, dtype=torch.int64, device=DEVICE), torch.arange(C, device=DEVICE)
    same = dict(
        one_key=dict(query_key=ones[:B], candidate_key=ones),
        shared_candidates=dict(query_key=ones[:B], candidate_key=-ones),
        one_positive_mean=dict(candidate_id=each, same_id="mean"),
        one_positive_sum=dict(candidate_id=each, same_id="sum"),
        one_positive_drop=dict(candidate_id=each),
        no_smoothing=dict(label_smoothing=1e-18),
        equal_weights=dict(row_weight=ones[:B]),
        no_margin=dict(false_negative_margin=9.0),
    )
    for options in same.values():
        assert_close(run(inputs, **options), want, 1e-13)


@pytest.mark.parametrize("keys", ["none", "three"])
def test_the_block_size_does_not_change_the_result(keys, monkeypatch):
    inputs = make(150, 170, keys=keys, same_id="mean", symmetric=True, label_smoothing=0.1)
    want = run(inputs)  # one block
    for rows in (1, 50, 149):
        monkeypatch.setattr(composed, "BLOCK_BYTES", rows * 4 * 170)
        assert_close(run(inputs), want, 1e-13)


@pytest.mark.parametrize("temperature", [0.2, 0.002])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_logits_sum_to_zero(symmetric, temperature):
    """The gradients of each row's logits sum to 0. In a symmetric loss, only the total is 0.

    A constant dimension is added to queries and candidates. The gradient of a query in this
    dimension is a multiple of the sum for its row.
    """
    inputs = make(
        keys="three",
        same_id="mean",
        temperature=temperature,
        symmetric=symmetric,
        label_smoothing=0.1,
    )
    want = run(inputs)
    assert want["out"] >= 0
    scale = 1 / temperature
    # sum(query * dquery) is scale * dscale, and dscale is -temperature^2 * dtemperature.
    product = (inputs["query"] * want["dquery"]).sum()
    torch.testing.assert_close(product, -want["dtemperature"] / scale, rtol=1e-10, atol=1e-12)
    for name in ("query", "candidate"):
        inputs[name] = torch.cat(
            [inputs[name].detach(), torch.full((len(inputs[name]), 1), 0.5, device=DEVICE)], 1
        ).requires_grad_()
    got = run(inputs)  # each logit grows by 0.25 * scale
    sums = got["dquery"][:, -1].sum() if symmetric else got["dquery"][:, -1]
    assert sums.abs().max() < 1e-12 * scale
    for name in ("dquery", "dcandidate"):
        got[name] = got[name][:, :-1]
    del got["dtemperature"], want["dtemperature"]  # the constant dimension changes this gradient
    assert_close(got, want, 1e-11)


# ---- GradCache, and the module -------------------------------------------------------------------


def test_gradient_cache():
    """GradCache gives the same gradients as one backward.

    GradCache embeds without a graph and passes the loss's gradients to the towers in chunks. The
    test runs the loss's backward twice, which doubles the gradients.
    """
    data = [torch.randn(n, 7, dtype=torch.float64) for n in (12, 20)]
    towers = [nn.Linear(7, 5).double() for _ in data]
    loss_of = MaskedInfoNCE(0.2, learnable_temperature=True, symmetric=True).double()
    parameters = [p for module in (*towers, loss_of) for p in module.parameters()]
    loss = loss_of(*(tower(x) for tower, x in zip(towers, data, strict=True)))
    want = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        leaves = [tower(x) for tower, x in zip(towers, data, strict=True)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    cached = loss_of(*leaves)
    cached.backward(retain_graph=True)
    cached.backward()
    for tower, x, leaf in zip(towers, data, leaves, strict=True):
        for chunk, gradient in zip(x.split(4), leaf.grad.split(4), strict=True):
            (tower(chunk) * gradient).sum().backward()
    assert torch.equal(cached, loss)
    for p, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient, rtol=1e-11, atol=1e-13)


def test_module():
    q, c = torch.randn(6, 4), torch.randn(9, 4)
    key = torch.arange(9) % 2
    options = dict(symmetric=True, label_smoothing=0.1, positive_weight=0.2, reduction="sum")
    want = masked_info_nce(
        normalize(q, dim=-1), normalize(c, dim=-1), temperature=0.2, candidate_key=key, **options
    )
    torch.testing.assert_close(MaskedInfoNCE(0.2, **options)(q, c, candidate_key=key), want)
    raw = MaskedInfoNCE(0.2, normalize=False)(q, c)
    torch.testing.assert_close(raw, masked_info_nce(q, c, temperature=0.2))
    for gather in ("global", "local"):  # without a process group, like gather=None
        assert torch.equal(MaskedInfoNCE(0.2, normalize=False, gather=gather)(q, c), raw)


def test_temperature_of_the_module():
    """A learned temperature is a parameter, clamped in training. A fixed one is not saved."""
    q, c = torch.randn(6, 4), torch.randn(6, 4)
    learned, fixed = (
        MaskedInfoNCE(0.5, learnable_temperature=True, max_scale=20.0),
        MaskedInfoNCE(0.1),
    )
    assert (
        set(learned.state_dict()) == {"log_scale"}
        and not fixed.state_dict()
        and not list(fixed.parameters())
    )
    learned.load_state_dict({"log_scale": torch.tensor(-math.log(0.1))})
    torch.testing.assert_close(learned(q, c), fixed(q, c))
    (slope,) = torch.autograd.grad(learned(q, c), learned.log_scale)
    with torch.no_grad():
        learned.log_scale.add_(1e-3)
        above = learned(q, c)
        learned.log_scale.sub_(2e-3)
        torch.testing.assert_close((above - learned(q, c)) / 2e-3, slope, rtol=1e-2, atol=1e-4)
        learned.log_scale.fill_(5.0)
    assert learned.eval()(q, c) != MaskedInfoNCE(1 / 20)(q, c) and learned.log_scale == 5
    # The second call clamps the parameter in place, which must not break the first call's graph.
    sum_of_losses = learned.train()(q, c) + learned(c, q)
    sum_of_losses.backward()
    assert (
        learned.log_scale.item() == pytest.approx(math.log(20))
        and learned.log_scale.grad is not None
    )
    torch.testing.assert_close(learned(q, c), MaskedInfoNCE(1 / 20)(q, c))
    assert repr(learned).startswith(
        "MaskedInfoNCE(learned, initial temperature=0.5, normalize=True, gather=None"
    )


def test_a_fixed_temperature_is_not_saved_and_not_rounded_by_casts():
    q, c = torch.randn(6, 4), torch.randn(6, 4)
    want = masked_info_nce(unit_rows(q), unit_rows(c), temperature=0.03)
    with torch.device("meta"):
        meta = MaskedInfoNCE(0.03)
    old = {"log_scale": torch.tensor(-math.log(0.07))}  # a state of version 0.1
    loaded = MaskedInfoNCE(0.03)
    loaded.load_state_dict(old)
    loaded.load_state_dict(MaskedInfoNCE(0.07).state_dict())
    assert "log_scale" in old  # the caller's state is unchanged
    for module in (MaskedInfoNCE(0.03).bfloat16(), meta.to_empty(device="cpu"), loaded):
        assert not module.state_dict()
        assert torch.equal(module(q, c), want)


def test_reset_parameters_restores_a_learned_temperature_after_to_empty():
    with torch.device("meta"):
        module = MaskedInfoNCE(0.03, learnable_temperature=True)
    module.to_empty(device="cpu").reset_parameters()
    assert module.log_scale.item() == pytest.approx(-math.log(0.03))


@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask", ["candidate_key", "candidate_id"])
def test_a_masked_non_finite_candidate_gets_a_gradient_of_zero(backend, value, mask):
    q, c = torch.randn(2, 4, requires_grad=True), torch.randn(4, 4)
    c[2, 1] = value
    # Candidate 2 is masked, because no query has its key 7 or because both queries have its id.
    vector = torch.tensor([0, 0, 7, 0]) if mask == "candidate_key" else None
    labels = {"candidate_key": vector}
    if mask == "candidate_id":
        labels = {"candidate_id": torch.tensor([0, 0, 0, 1]), "query_id": torch.tensor([0, 0])}
    results = []
    for candidate in (c, c.clone().index_fill_(0, torch.tensor(2), 1.0)):
        leaf = candidate.clone().requires_grad_()
        with mmfused.backend(backend):
            loss = MaskedInfoNCE(0.2)(q, leaf, **labels)
        results.append((loss, *torch.autograd.grad(loss, (q, leaf))))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)
    assert not results[0][2][2].any()
    assert MaskedInfoNCE(0.2)(q, c).isnan()  # candidate 2 is not masked here


def test_gather_in_one_process(tmp_path):
    q, c = torch.randn(6, 4), torch.randn(9, 4)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for gather in ("global", "local"):
            loss = MaskedInfoNCE(0.2, gather=gather, normalize=False)
            torch.testing.assert_close(loss(q, c), masked_info_nce(q, c, temperature=0.2))
            # Under autocast, the two sides may have different dtypes.
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(loss(q.bfloat16(), c), loss(q.bfloat16(), c.bfloat16()))
            with (
                mmfused.backend("reference"),
                pytest.raises(RuntimeError, match="gather: got backend 'reference', expected"),
            ):
                loss(q, c)
    finally:
        dist.destroy_process_group()


BAD_MODULES = {
    "temperature: got 0, expected a number above 0": dict(temperature=0),
    "gather: got 'all', expected None, 'global' or 'local'": dict(gather="all"),
    "reduction: got 'sum' with gather, expected 'mean'": dict(gather="global", reduction="sum"),
    "symmetric: got True with gather='local', expected gather='global'": dict(
        gather="local", symmetric=True
    ),
    "max_scale: got 0, expected a number above 0": dict(max_scale=0),
    "margin: got an unknown option, expected same_id, symmetric": dict(margin=0.1),
}


@pytest.mark.parametrize("sentence", BAD_MODULES)
def test_bad_options_raise_a_one_line_message(sentence):
    with pytest.raises((TypeError, ValueError)) as error:
        MaskedInfoNCE(**BAD_MODULES[sentence])
    assert (
        str(error.value).startswith("MaskedInfoNCE: ")
        and sentence in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e30])
@pytest.mark.parametrize("gather", [None, "global"])
def test_a_masked_candidate_gets_no_gradient_through_the_normalization(value, gather, tmp_path):
    query, candidate = torch.randn(4, 5), torch.randn(6, 5)
    candidate[5] = value
    key = torch.tensor([0, 0, 1, 1, 0, 7])
    if gather:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
        )
    try:
        leaves = [x.requires_grad_() for x in (query, candidate)]
        dq, dc = torch.autograd.grad(
            MaskedInfoNCE(0.2, gather=gather)(*leaves, candidate_key=key), leaves
        )
        kept = [query, candidate[:5].detach().requires_grad_()]
        want = torch.autograd.grad(
            MaskedInfoNCE(0.2, gather=gather)(*kept, candidate_key=key[:5]), kept
        )
        assert not dc[5].any()
        torch.testing.assert_close((dq, dc[:5]), want)
        with torch.no_grad():
            candidate[2] = math.nan
        dq, dc = torch.autograd.grad(
            MaskedInfoNCE(0.2, gather=gather)(*leaves, candidate_key=key), leaves
        )
        assert (
            dq[2:].isnan().all()
            and dc[2].isnan().all()
            and dq[:2].isfinite().all()
            and not dc[5].any()
        )
    finally:
        if gather:
            dist.destroy_process_group()


def test_a_fixed_temperature_survives_casts_and_loaded_states():
    fixed = MaskedInfoNCE(0.03).bfloat16()
    assert fixed.temperature == 0.03 and not fixed.state_dict()
    with torch.device("meta"):
        moved = MaskedInfoNCE(0.03)
    assert moved.to_empty(device="cpu").temperature == 0.03
    # States of version 0.1 hold the temperature as a buffer.
    for holder, prefix in ((fixed, ""), (nn.Sequential(fixed), "0.")):
        with pytest.warns(UserWarning, match="is 0.3679; the module keeps its own, 0.03"):
            holder.load_state_dict({f"{prefix}log_scale": torch.tensor(1.0)})
        holder.load_state_dict(
            {f"{prefix}log_scale": torch.tensor(-math.log(0.03), dtype=torch.bfloat16)}
        )
        with pytest.raises(RuntimeError, match="Unexpected"):
            holder.load_state_dict({f"{prefix}other": torch.tensor(1.0)})
    q, c = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.equal(fixed(q, c), MaskedInfoNCE(0.03)(q, c)) and fixed.temperature == 0.03


def test_reset_parameters_keeps_a_learned_temperature_a_parameter():
    with torch.device("meta"):
        learned = MaskedInfoNCE(0.03, learnable_temperature=True)
    learned.to_empty(device="cpu").reset_parameters()
    assert learned.log_scale.item() == pytest.approx(-math.log(0.03)) and isinstance(
        learned.log_scale, nn.Parameter
    )
