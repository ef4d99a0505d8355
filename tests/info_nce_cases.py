"""Helpers for the masked InfoNCE tests: inputs, a call, and the loss computed in loops."""

import torch
from sums_in_order import sums_of
from torch.nn.functional import normalize

import mmfused
from mmfused import masked_info_nce
from mmfused.testing import value_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, C, D = 37, 53, 6  # rows, candidates, width


def make(
    b=B,
    c=C,
    d=D,
    dtype=torch.float64,
    *,
    temperature=0.2,
    keys="none",
    same_id=None,
    target=False,
    weight=False,
    **options,
):
    """Return the arguments of masked_info_nce. Embeddings and temperature require gradients."""

    def integers(low, high, n):
        return torch.randint(low, high, (n,)).to(DEVICE)

    leaves = dict(
        query=normalize(torch.randn(b, d), dim=-1), candidate=normalize(torch.randn(c, d), dim=-1)
    )
    inputs = {k: v.to(DEVICE, dtype).requires_grad_() for k, v in leaves.items()}
    inputs["temperature"] = torch.tensor(
        temperature, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE
    ).requires_grad_()
    if keys != "none":
        high = {"one": 1, "three": 3, "many": 2 * c}[keys]
        inputs["candidate_key"] = integers(-(keys != "one"), high, c)  # -1: valid for every row
        if keys != "three":  # with "three", a row has the key of its target, possibly -1
            inputs["query_key"] = integers(0, high, b)
    if same_id is not None:
        inputs |= dict(candidate_id=integers(0, c // 3 + 1, c), same_id=same_id)
    if target:
        inputs["target"] = integers(0, c, b)
    if weight:
        inputs["row_weight"] = torch.rand(b, dtype=dtype, device=DEVICE) * (
            torch.arange(b, device=DEVICE) != 2
        )
    return inputs | options


def cast(inputs, dtype):
    floats = {
        k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    return inputs | {
        k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in floats.items()
    }


def run(inputs, backend="composed", upstream=None, **options):
    def call(**arguments):
        with mmfused.backend(backend):
            return masked_info_nce(**arguments)

    with sums_of(backend):
        return value_and_gradients(call, inputs | options, upstream)


def assert_close(actual, exact, tolerance=1e-10):
    assert actual.keys() == exact.keys()
    for name, want in exact.items():
        error = (actual[name] - want).norm() / max(want.norm(), 1)
        assert error <= tolerance, f"{name}: {error}"


def in_loops(
    query,
    candidate,
    temperature,
    target=None,
    query_key=None,
    candidate_key=None,
    query_id=None,
    candidate_id=None,
    same_id="drop",
    symmetric=False,
    positive_weight=0.0,
    row_weight=None,
    label_smoothing=0.0,
    false_negative_margin=None,
    reduction="mean",
):
    """Compute masked InfoNCE as documented, one pair at a time."""
    b, c = len(query), len(candidate)
    target = list(range(b)) if target is None else target.tolist()
    if candidate_key is not None:
        candidate_key = candidate_key.tolist()
        query_key = [candidate_key[t] for t in target] if query_key is None else query_key.tolist()
    if candidate_id is not None:
        candidate_id = candidate_id.tolist()
        query_id = [candidate_id[t] for t in target] if query_id is None else query_id.tolist()
    dot = [[(query[i] * candidate[j]).sum() for j in range(c)] for i in range(b)]

    def positive(i, j):
        return j == target[i] or (
            candidate_id is not None and same_id != "drop" and query_id[i] == candidate_id[j]
        )

    def allowed(i, j):
        if j == target[i]:
            return True
        if candidate_key is not None and candidate_key[j] not in (-1, query_key[i]):
            return False
        if candidate_id is not None and same_id == "drop" and query_id[i] == candidate_id[j]:
            return False
        valid_for_all = candidate_key is not None and candidate_key[j] == -1
        return (
            false_negative_margin is None
            or valid_for_all
            or bool(dot[i][j] <= dot[i][target[i]] + false_negative_margin)
        )

    def nce(pairs):
        pairs = [pair for pair in pairs if allowed(*pair)]
        if len(pairs) == 1:
            return 0.0
        total = sum((dot[i][j] / temperature).exp() for i, j in pairs).log()
        log_p = {(i, j): dot[i][j] / temperature - total for i, j in pairs}
        positives = [pair for pair in pairs if positive(*pair)]
        mass = len(positives) if same_id == "sum" else 1.0
        wanted = sum(log_p[pair] for pair in positives) * mass / len(positives)
        return -(1 - label_smoothing) * wanted - label_smoothing * mass / len(pairs) * sum(
            log_p.values()
        )

    rows = [nce([(i, j) for j in range(c)]) for i in range(b)]
    if symmetric:
        rows = [(row + nce([(i, j) for i in range(b)])) / 2 for j, row in enumerate(rows)]
    weight = torch.ones(b) if row_weight is None else row_weight
    losses = torch.stack(
        [
            weight[i] * (row + positive_weight * (1 - dot[i][target[i]]))
            for i, row in enumerate(rows)
        ]
    )
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(weight.sum(), 1e-300)}[
        reduction
    ]
