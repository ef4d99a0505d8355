"""Tests of the contrastive losses against the formulas of the papers, in float64."""

import math

import pytest
import torch
from info_nce_cases import DEVICE, assert_close
from torch.nn.functional import normalize

from mmfused import MaskedInfoNCE, losses, masked_info_nce
from mmfused.losses import (
    hard_negative_margin,
    positive_similarity,
    product_consistency,
    product_hinge,
    sigmoid_contrastive,
)
from mmfused.testing import over_budget, value_and_gradients

B, D = 13, 6


@pytest.fixture(params=["one block", "blocks"])
def blocks(request, monkeypatch):
    if request.param == "blocks":
        monkeypatch.setattr(losses, "BLOCK_PAIRS", 4 * B)


def unit(*shape):
    return normalize(
        torch.randn(*shape, dtype=torch.float64, device=DEVICE), dim=-1
    ).requires_grad_()


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, device=DEVICE, requires_grad=True)


def mean(terms):
    terms = list(terms)
    return sum(terms) / len(terms)


def hinge(x):
    return x.clamp(min=0)


def cosine(a, b):
    return a @ b / (a.square().sum() * b.square().sum()).sqrt()


def cross_entropy(logits, target):
    """Return the cross-entropy of one row by its definition."""
    return -(logits[target].exp() / logits.exp().sum()).log()


def info_nce(q, c, tau):
    """Compute -1/B sum_i log( exp(q_i . c_i / tau) / sum_j exp(q_i . c_j / tau) )."""
    return mean(cross_entropy(row / tau, i) for i, row in enumerate(q @ c.T))


# ---- UniECS (arXiv 2508.13843) -------------------------------------------------------------------
# Embeddings: f of the whole product, v of its image, t of its text; 1: query, 2: candidate.


def hardest_negatives(v1, v2, tau=0.05, a4=0.2):
    """Return the mean of max(0, a4 + logit_ij - logit_ii) over i and the hardest negatives j.

    The hardest negatives of i are the floor(B/2) columns j != i with the largest logits.
    """
    logits, n = v1 @ v2.T / tau, len(v1) // 2
    largest = [
        sorted((row[j] for j in range(len(row)) if j != i), key=torch.Tensor.item)[-n:]
        for i, row in enumerate(logits)
    ]
    return mean(hinge(a4 + logit - logits[i, i]) for i, row in enumerate(largest) for logit in row)


def ppm(f1, v1, t1, f2, s, a1=0.3):
    matrices, pairs = (
        [s * x @ f2.T for x in (f1, v1, t1)],
        [(i, j) for i in range(B) for j in range(B)],
    )
    return sum(hinge(a1 * (i != j) + S[i, j] - S[i, i]) for S in matrices for i, j in pairs) / (
        3 * B**2
    )


def pdc(f1, v1, t1, f2, s, a2=0.2):
    mm, vm, tm = (s * x @ f2.T for x in (f1, v1, t1))
    terms = (
        hinge(a2 + mm[i, j] - vm[i, i]) + hinge(a2 + mm[i, j] - tm[i, i])
        for i in range(B)
        for j in range(B)
    )
    return sum(terms) / (2 * B**2)


def plc(f1, v1, t1, f2, s, a3=0.05):
    mm, vm, tm = (s * x @ f2.T for x in (f1, v1, t1))
    k = min(10, B)
    pairs = [(i, j) for i in range(B) for j in mm[i].topk(k).indices.tolist()]
    differences = ((vm, mm), (tm, mm), (vm, tm))
    return sum(hinge((a[i, j] - b[i, j]) ** 2 - a3) for i, j in pairs for a, b in differences) / (
        3 * B * k
    )


def our_pdc(f1, v1, t1, f2, s):
    own = ((x * f2).sum(-1) * s for x in (v1, t1))
    return mean(product_hinge(f1, f2, scale=s, margin=0.2, positive=p, diagonal=True) for p in own)


UNIECS = {
    "alignment": (
        lambda v1, f1, t1: 1 + (positive_similarity(v1, f1) + positive_similarity(t1, f1)) / 2,
        lambda v1, f1, t1: ((2 - mean(map(cosine, v1, f1))) + (2 - mean(map(cosine, t1, f1)))) / 2,
    ),
    "V2T": (
        lambda v1, t2: masked_info_nce(v1, t2, temperature=0.07, symmetric=True),
        lambda v1, t2: (info_nce(v1, t2, 0.07) + info_nce(t2, v1, 0.07)) / 2,
    ),
    "V2F": (
        lambda f1, v2: masked_info_nce(f1, v2, temperature=0.07),
        lambda f1, v2: info_nce(f1, v2, 0.07),
    ),
    "T2F": (
        lambda t1, f2: masked_info_nce(t1, f2, temperature=0.07),
        lambda t1, f2: info_nce(t1, f2, 0.07),
    ),
    "PPM": (
        lambda f1, v1, t1, f2, s: mean(
            product_hinge(x, f2, scale=s, margin=0.3) for x in (f1, v1, t1)
        ),
        ppm,
    ),
    "PDC": (our_pdc, pdc),
    "PLC": (
        lambda f1, v1, t1, f2, s: product_consistency((f1, f2), (v1, f2), (t1, f2), scale=s),
        plc,
    ),
    "V2V": (
        lambda v1, v2: (
            masked_info_nce(v1, v2, temperature=0.05)
            + hard_negative_margin(v1, v2, temperature=0.05)
        ),
        lambda v1, v2: info_nce(v1, v2, 0.05) + hardest_negatives(v1, v2),
    ),
    "T2T": (
        lambda t1, t2: masked_info_nce(t1, t2, temperature=0.03),
        lambda t1, t2: info_nce(t1, t2, 0.03),
    ),
}


@pytest.mark.parametrize("term", UNIECS)
def test_uniecs_losses_match_the_formulas(term, blocks):
    ours, paper = UNIECS[term]
    names = ours.__code__.co_varnames[: ours.__code__.co_argcount]
    inputs = {name: scalar(1.7) if name == "s" else unit(B, D) for name in names}
    got = value_and_gradients(ours, inputs)
    assert_close(got, value_and_gradients(paper, inputs), 1e-9)
    assert got["out"] > 0.01 and all(value.any() for value in got.values())


# ---- UNITE (2505.19650), UniCA (2606.28350), MOON2.0 (2511.12449), FLUID (2508.07264) ------------


def unite(q, c, tau, modality=None, negatives=None, item=None):
    """Compute MAMCL, the modality-masked contrastive loss, as UNITE's published code does.

    Masked logits are -1e9. Explicit negatives are appended and never masked. The log-probabilities
    of a query's positives are summed.
    """
    logits = q @ c.T / tau
    if modality is not None:
        same = (modality[:, None] == modality[None, :]).double()
        logits = logits * same + -1e9 * (1 - same)
    if negatives is not None:
        logits = torch.cat([logits, q @ negatives.T / tau], 1)
    log_p = [row - row.max() - (row - row.max()).exp().sum().log() for row in logits]
    label = torch.eye(len(q)) if item is None else (item[:, None] == item[None, :])
    return -mean(sum(log_p[i][j] for j in range(len(q)) if label[i, j]) for i in range(len(q)))


def test_unite_losses_match_the_published_code():
    # Modalities 4, 5 and 7 occur once: in stage 2, their rows have no negatives and a loss of 0.
    modality = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 1, 1, 1, 2, 7], device=DEVICE)
    inputs = dict(q=unit(B, D), c=unit(B, D), tau=scalar(0.1))
    with_negatives = inputs | dict(negatives=unit(B, D))
    item = torch.arange(B, device=DEVICE) % 5
    key = torch.cat([modality, -torch.ones_like(modality)])  # -1: never masked
    ours = {
        "stage 1": (
            inputs,
            lambda q, c, tau: masked_info_nce(q, c, temperature=tau, symmetric=True),
        ),
        "stage 2": (
            inputs,
            lambda q, c, tau: masked_info_nce(q, c, temperature=tau, candidate_key=modality),
        ),
        "negatives": (
            with_negatives,
            lambda q, c, tau, negatives: masked_info_nce(
                q, torch.cat([c, negatives]), temperature=tau, candidate_key=key
            ),
        ),
        "items": (
            inputs,
            lambda q, c, tau: masked_info_nce(
                q, c, temperature=tau, candidate_key=item % 3, candidate_id=item, same_id="sum"
            ),
        ),
    }
    published = {
        "stage 1": lambda q, c, tau: (unite(q, c, tau) + unite(c, q, tau)) / 2,
        "stage 2": lambda q, c, tau: unite(q, c, tau, modality),
        "negatives": lambda q, c, tau, negatives: unite(q, c, tau, modality, negatives),
        "items": lambda q, c, tau: unite(q, c, tau, item % 3, item=item),
    }
    for name, (given, call) in ours.items():
        got = value_and_gradients(call, given)
        assert_close(got, value_and_gradients(published[name], given), 1e-9)
        if name == "stage 2":
            assert not got["dq"][[3, 4, 12]].any() and not got["dc"][[3, 4, 12]].any()


def test_unica_loss_matches_the_formula():
    """Rows 3i to 3i + 2 of c are the candidates of query i, the positive first.

    The loss is a sum: InfoNCE over the candidates of all queries, and the weighted cosine distance
    to the positive.
    """
    per_query, weight = 3, 0.7
    inputs, target = (
        dict(q=unit(B, D), c=unit(B * per_query, D)),
        torch.arange(B, device=DEVICE) * per_query,
    )

    def paper(q, c):
        contrast = mean(cross_entropy(q[i] @ c.T / 0.02 - 50, i * per_query) for i in range(B))
        return contrast + weight * mean(1 - q[i] @ c[i * per_query] for i in range(B))

    got = value_and_gradients(
        lambda q, c: masked_info_nce(q, c, temperature=0.02, target=target, positive_weight=weight),
        inputs,
    )
    assert_close(got, value_and_gradients(paper, inputs), 1e-9)


@pytest.mark.parametrize("own_negative_only", [False, True])
def test_moon_inter_product_loss_matches_the_formula(own_negative_only):
    """Contrast the views t, i and mm of each query with the query's positive p and negatives.

    The negatives are every n and the p of all other queries or, with ``own_negative_only``, the n
    of the query. omega weights the views. phi weights the queries; a phi of at least 0.6 counts
    as 1.
    """
    inputs = dict(
        t=unit(B, D),
        i=unit(B, D),
        mm=unit(B, D),
        p=unit(B, D),
        n=unit(B, D),
        omega=unit(3),
        tau=scalar(0.1),
    )
    phi = torch.rand(B, dtype=torch.float64, device=DEVICE)
    weight, rows = torch.where(phi >= 0.6, 1.0, phi), torch.arange(B, device=DEVICE)
    keys = dict(candidate_key=rows.repeat(2)) if own_negative_only else {}

    def ours(t, i, mm, p, n, omega, tau):
        options = dict(target=rows.repeat(3), row_weight=weight.repeat(3), reduction="none", **keys)
        each = masked_info_nce(torch.cat([t, i, mm]), torch.cat([p, n]), temperature=tau, **options)
        return omega @ each.view(3, B).sum(1) / weight.sum()

    def paper(t, i, mm, p, n, omega, tau):
        def one(view, row):
            own = (view[row] @ p[row] / tau).exp()
            others = [] if own_negative_only else [x for x in range(B) if x != row]
            negatives = [n[row]] + [x[other] for other in others for x in (p, n)]
            return -(own / (own + sum((view[row] @ x / tau).exp() for x in negatives))).log()

        terms = (
            o * weight[row] * one(view, row)
            for o, view in zip(omega, (t, i, mm), strict=True)
            for row in range(B)
        )
        return sum(terms) / weight.sum()

    assert_close(value_and_gradients(ours, inputs), value_and_gradients(paper, inputs), 1e-9)


@pytest.mark.parametrize("roll", [False, True])
def test_moon_intra_product_loss_matches_the_formula(roll):
    """Contrast images with captions.

    The negatives are the captions of all other products or, with ``roll``, the caption of the
    previous product.
    """
    inputs = dict(image=unit(B, D), text=unit(B, D), tau=scalar(0.07))

    def ours(image, text, tau):
        if not roll:
            return masked_info_nce(image, text, temperature=tau)
        key = torch.arange(B, device=DEVICE).repeat(2)
        return masked_info_nce(
            image, torch.cat([text, text.roll(1, 0)]), temperature=tau, candidate_key=key
        )

    def paper(image, text, tau):
        def one(row):
            own = (image[row] @ text[row] / tau).exp()
            return -(
                own
                / (
                    own
                    + sum((image[row] @ text[x] / tau).exp() for x in range(B) if x in others[row])
                )
            ).log()

        others = [
            [(row - 1) % B] if roll else [x for x in range(B) if x != row] for row in range(B)
        ]
        return mean(one(row) for row in range(B))

    assert_close(value_and_gradients(ours, inputs), value_and_gradients(paper, inputs), 1e-9)


def test_fluid_loss_matches_the_formula():
    """Contrast the normalised mean query tokens of image and text in both directions."""
    inputs = {
        name: torch.randn(B, 5, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for name in ("image", "text")
    }

    def paper(image, text):
        i, t = (
            [x.mean(0) / x.mean(0).square().sum().sqrt() for x in tokens]
            for tokens in (image, text)
        )
        i, t = torch.stack(i), torch.stack(t)
        return (info_nce(i, t, 0.07) + info_nce(t, i, 0.07)) / 2

    module = MaskedInfoNCE(0.07, symmetric=True)
    got = value_and_gradients(lambda image, text: module(image.mean(1), text.mean(1)), inputs)
    assert_close(got, value_and_gradients(paper, inputs), 1e-9)


# ---- mmfused.losses: further cases ---------------------------------------------------------------


def sigmoid_loss(q, c, temperature, bias):
    """Compute SigLIP's loss: -1/B sum_ij log sigmoid(z_ij (q_i . c_j / temperature + bias)).

    z_ij is 1 if i = j, and -1 otherwise.
    """
    z = 2 * torch.eye(len(q), len(c), dtype=q.dtype, device=q.device) - 1
    return torch.log1p((-z * (q @ c.T / temperature + bias)).exp()).sum() / len(q)


@pytest.mark.parametrize("bias", [-10.0, 6.0])
@pytest.mark.parametrize("rows, columns", [(B, B), (1, 4), (5, 17)])
def test_sigmoid_contrastive_matches_the_formula(rows, columns, bias, blocks):
    inputs = dict(q=unit(rows, D), c=unit(columns, D), temperature=scalar(0.03), bias=scalar(bias))
    got = value_and_gradients(lambda q, c, **scalars: sigmoid_contrastive(q, c, **scalars), inputs)
    assert_close(got, value_and_gradients(sigmoid_loss, inputs), 1e-9)


def test_sigmoid_contrastive_is_accurate_near_zero():
    x = torch.eye(2, dtype=torch.float64, device=DEVICE)
    loss = sigmoid_contrastive(x, x, temperature=1 / 60, bias=-30.0)  # logits of 30 and -30
    assert abs(loss.item() / (2 * math.log1p(math.exp(-30))) - 1) < 1e-12


@pytest.mark.parametrize(
    "rows, columns, fraction, count", [(5, 17, 0.3, 5), (5, 5, 1.0, 4), (1, 4, 0.5, 2)]
)
def test_hard_negative_margin_matches_the_formula(rows, columns, fraction, count, blocks):
    def paper(q, c, temperature):
        logits = q @ c.T / temperature
        others = [
            sorted((x for j, x in enumerate(row) if j != i), key=torch.Tensor.item)[-count:]
            for i, row in enumerate(logits)
        ]
        return mean(hinge(0.4 + x - logits[i, i]) for i, row in enumerate(others) for x in row)

    inputs = dict(q=unit(rows, D), c=unit(columns, D), temperature=scalar(0.5))
    got = value_and_gradients(
        lambda q, c, temperature: hard_negative_margin(
            q, c, temperature=temperature, margin=0.4, fraction=fraction
        ),
        inputs,
    )
    assert_close(got, value_and_gradients(paper, inputs), 1e-9)


LOSSES = {
    "positive_similarity": lambda q, c: positive_similarity(q, c),
    "hard_negative_margin": lambda q, c: hard_negative_margin(q, c),
    "product_hinge": lambda q, c: product_hinge(q, c),
    "product_consistency": lambda q, c: product_consistency(
        (q, c), (q.flip(0), c), (q, c.flip(0)), top=3
    ),
    "sigmoid_contrastive": lambda q, c: sigmoid_contrastive(q, c),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_one_row_are_finite(name):
    got = value_and_gradients(LOSSES[name], dict(q=unit(1, D), c=unit(1, D)))
    assert all(value.isfinite().all() for value in got.values())
    assert (got["out"] == 0) == (
        name in ("hard_negative_margin", "product_hinge", "product_consistency")
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compute_in_float32_for_bfloat16_and_under_autocast(name, blocks):
    low = {k: unit(B, D).detach().bfloat16().requires_grad_() for k in ("q", "c")}
    plain = {k: v.detach().float().requires_grad_() for k, v in low.items()}
    exact = value_and_gradients(
        LOSSES[name], {k: v.detach().double().requires_grad_() for k, v in low.items()}
    )
    want = value_and_gradients(LOSSES[name], plain)
    got = value_and_gradients(LOSSES[name], low)
    assert got["out"].dtype == torch.float32 and got["dq"].dtype == torch.bfloat16
    assert not over_budget(got, exact, want)
    assert LOSSES[name](low["q"], plain["c"].double()).dtype == torch.float64
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = LOSSES[name](**plain)
        mixed = LOSSES[name](q=low["q"], c=plain["c"])
    assert torch.equal(loss, want["out"]) and torch.equal(mixed, want["out"])
    for gradient, leaf in zip(
        torch.autograd.grad(loss, [plain["q"], plain["c"]]), ("dq", "dc"), strict=True
    ):
        assert torch.equal(gradient, want[leaf])


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan])
@pytest.mark.parametrize("loss", [hard_negative_margin, sigmoid_contrastive])
def test_invalid_temperature_gives_nan_if_values_are_not_checked(loss, temperature, monkeypatch):
    monkeypatch.setattr("mmfused.ops._common.check_value", lambda *_: None)
    assert loss(torch.randn(5, 3), torch.randn(5, 3), temperature=torch.tensor(temperature)).isnan()


WITH_LEARNED_NUMBER = {
    "hard_negative_margin": lambda q, c, number: hard_negative_margin(
        q, c, margin=number, fraction=0.5
    ),
    "product_hinge": lambda q, c, number: product_hinge(q, c, margin=number),
    "product_consistency": lambda q, c, number: product_consistency(
        (q, c), (q, q), (c, c), tolerance=number
    ),
}


@pytest.mark.parametrize("name", WITH_LEARNED_NUMBER)
def test_margin_and_tolerance_receive_gradients(name):
    torch.manual_seed(0)
    q, c = (torch.randn(6, 3, dtype=torch.float64) for _ in range(2))
    number = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda number: WITH_LEARNED_NUMBER[name](q, c, number), number)
    assert torch.autograd.grad(WITH_LEARNED_NUMBER[name](q, c, number), number)[0] != 0


x, y = torch.randn(4, 3), torch.randn(4, 3)
BAD_LOSSES = {
    "positive_similarity: positive: got 5 rows, expected 4, as query has": lambda: (
        positive_similarity(x, torch.randn(5, 3))
    ),
    "query: got a list, expected a torch.Tensor": lambda: positive_similarity([1.0], x),
    "query: got shape (4,) and dtype torch.float32, expected floats (rows, dim)": lambda: (
        positive_similarity(x[:, 0], x)
    ),
    "candidate: got shape (4, 3) and dtype torch.int64, expected floats": lambda: (
        sigmoid_contrastive(x, x.long())
    ),
    "candidate: got shape (0, 3)": lambda: sigmoid_contrastive(x, x[:0]),
    "candidate: got shape (3, 3), expected at least 4 rows of 3, as query has": lambda: (
        sigmoid_contrastive(x, y[:3])
    ),
    "candidate: got shape (4, 2), expected at least 4 rows of 3": lambda: hard_negative_margin(
        x, y[:, :2]
    ),
    "candidate: got a tensor on meta, expected cpu, where query is": lambda: product_hinge(
        x, y.to("meta")
    ),
    "hard_negative_margin: temperature: got 0, expected a number above 0": lambda: (
        hard_negative_margin(x, y, temperature=0)
    ),
    "sigmoid_contrastive: temperature: got None, expected a number above 0": lambda: (
        sigmoid_contrastive(x, y, temperature=None)
    ),
    "fraction: got 1.5, expected a number from 0 to 1": lambda: hard_negative_margin(
        x, y, fraction=1.5
    ),
    "fraction: got nan, expected a number from 0 to 1": lambda: hard_negative_margin(
        x, y, fraction=math.nan
    ),
    "hard_negative_margin: margin: got None, expected a number, or a tensor of": lambda: (
        hard_negative_margin(x, y, margin=None)
    ),
    "product_hinge: margin: got shape (2,) and dtype torch.float32, expected one": lambda: (
        product_hinge(x, y, margin=torch.ones(2))
    ),
    "product_hinge: scale: got shape () and dtype torch.int64, expected one": lambda: product_hinge(
        x, y, scale=torch.tensor(1)
    ),
    "product_consistency: tolerance: got '0.1', expected a number": lambda: product_consistency(
        (x, y), (x, y), (x, y), tolerance="0.1"
    ),
    "product_hinge: candidate: got 5 rows, expected 4, as query has": lambda: product_hinge(
        x, torch.randn(5, 3)
    ),
    "positive: got shape (3,) and dtype torch.float32, expected floats (4,)": lambda: product_hinge(
        x, y, positive=x[:3, 0]
    ),
    "positive: got shape (4,) and dtype torch.int64, expected floats (4,)": lambda: product_hinge(
        x, y, positive=torch.arange(4)
    ),
    "text[1]: got shape (4,) and dtype torch.float32, expected floats": lambda: product_consistency(
        (x, y), (x, y), (x, y[:, 0])
    ),
    "top: got 0, expected at least 1": lambda: product_consistency((x, y), (x, y), (x, y), top=0),
    "text: got shapes (3, 3) and (3, 3), expected (4, 3) twice, as product": lambda: (
        product_consistency((x, y), (x, y), (x[1:], y[1:]))
    ),
}


@pytest.mark.parametrize("message", BAD_LOSSES)
def test_losses_reject_bad_input(message):
    with pytest.raises((TypeError, ValueError)) as error:
        BAD_LOSSES[message]()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).split(":")[0] in LOSSES
