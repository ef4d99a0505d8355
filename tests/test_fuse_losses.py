"""fuse(model) on the losses of open_clip and sentence-transformers: the real classes give the same loss and gradients."""

import pytest
import torch
from torch import nn

import mmfused.swaps.losses
from mmfused import fuse, unfuse
from mmfused.testing import over_budget

B, D = 61, 24


class Encoder(nn.Module):
    """Takes the place of a SentenceTransformer: features of one text column to {"sentence_embedding": (B, D)}."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, D)

    def forward(self, features):
        return {**features, "sentence_embedding": self.linear(features["x"])}


def clip_loss(**options):
    return pytest.importorskip("open_clip.loss").ClipLoss(**options)


def ranking_loss(**options):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    return losses.MultipleNegativesRankingLoss(Encoder(), **options)


class Clip(nn.Module):
    """The loss inside a model, with the logit scale as a parameter."""

    def __init__(self):
        super().__init__()
        self.scale, self.loss = nn.Parameter(torch.tensor(2.3)), clip_loss()

    def forward(self, image, text):
        unit = nn.functional.normalize
        return self.loss(unit(image, dim=-1), unit(text, dim=-1), self.scale.exp(), output_dict=True)["contrastive_loss"]


def dot_score(a, b):
    return pytest.importorskip("sentence_transformers.util").dot_score(a, b)


def ranked(columns, **options):
    def call(model, *inputs):
        return model([{"x": x} for x in inputs], None)

    def make():
        if "similarity_fct" in options:
            options["similarity_fct"] = pytest.importorskip("sentence_transformers.util").dot_score
        return ranking_loss(**options)

    return make, [(B, 7)] * columns, call


CASES = {
    "clip": (Clip, [(B, D)] * 2, lambda model, *x: model(*x)),
    "clip, root": (clip_loss, [(B, D)] * 2, lambda model, a, b: model(a, b, 3.0)),
    "pairs": ranked(2),
    "triplets": ranked(3, scale=5.0),
    "dot": ranked(4, scale=0.5, similarity_fct=None),
    "both directions": ranked(3, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
}


@pytest.fixture
def swept(monkeypatch):
    module, calls = mmfused.swaps.losses, []
    real = module.scaled_info_nce
    monkeypatch.setattr(module, "scaled_info_nce", lambda *a, **k: (calls.append(k), real(*a, **k))[1])
    return calls


def results(model, inputs, call, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    loss = call(model, *inputs)
    leaves = [*inputs, *model.parameters()]
    return {"loss": loss.detach()} | dict(enumerate(torch.autograd.grad(loss * 1.7, leaves)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_a_swapped_loss_gives_the_same_numbers(case, dtype, swept):
    make, shapes, call = CASES[case]
    torch.manual_seed(0)
    model, inputs = make().double(), [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    exact, before = results(model, inputs, call, torch.float64), model.state_dict()
    model.to(dtype)
    plain = results(model, inputs, call, dtype)
    report = fuse(model)
    assert list(report.swapped) == ["loss" if case == "clip" else ""] and not swept
    fused = results(model, inputs, call, dtype)
    assert len(swept) == 1, report
    if dtype == torch.float64:
        for name, value in exact.items():
            assert (fused[name] - value).norm() <= 1e-10 * max(value.norm(), 1), name
    else:
        assert not over_budget(fused, exact, plain)
    assert before.keys() == model.state_dict().keys()
    assert unfuse(model) == list(report.swapped)
    after = results(model, inputs, call, dtype)
    assert torch.equal(after["loss"], plain["loss"]) and len(swept) == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: clip_loss(world_size=2), "world_size is 2"),
        (lambda: ranking_loss(hardness_mode="all_negatives", hardness_strength=2.0), "hardness_mode is 'all_negatives'"),
        (lambda: ranking_loss(directions=("query_to_doc", "query_to_query")), "directions are"),
        (lambda: ranking_loss(similarity_fct=dot_score), "test_fuse_losses.dot_score: the sweep knows"),
    ],
)
def test_what_is_not_equal_is_left_with_the_reason(make, reason):
    model = make()
    report = fuse(model)
    assert not report.swapped and reason in report.left[""] and type(model).__module__ != "mmfused.swaps.base"


def test_calls_that_do_not_fit_run_the_original(swept):
    torch.manual_seed(0)
    a, b = torch.randn(2, B, D)
    loss = clip_loss()
    bias = torch.tensor(0.3)
    want = loss(a, b, 2.0, bias)
    fuse(loss)
    assert torch.equal(loss(a, b, 2.0, bias), want) and not swept


def test_what_a_ranking_loss_trains_is_fused_too():
    """The model inside is no part of the loss: its own modules are swapped as well."""
    loss = ranking_loss()
    loss.model.queries = nn.Parameter(torch.randn(3, D))
    loss.model.attention = nn.MultiheadAttention(D, 2, batch_first=True)
    assert set(fuse(loss).swapped) == {"", "model.attention"}


@pytest.mark.parametrize("scale", [float("nan"), -3.0, 0.0, 20], ids=str)
@pytest.mark.parametrize("tensor", [False, True])
def test_any_scale_gives_what_the_original_gives(scale, tensor, swept):
    a, b = torch.randn(2, B, D)
    x, y = torch.randn(2, B, 7)
    given = torch.tensor(float(scale)) if tensor else scale
    clip, ranking = clip_loss(), ranking_loss()
    ranking.scale = given  # it takes any number after its construction
    want = clip(a, b, given), ranking([{"x": x}, {"x": y}], None)
    fuse(clip), fuse(ranking)
    got = clip(a, b, given), ranking([{"x": x}, {"x": y}], None)
    assert len(swept) == 2
    torch.testing.assert_close(got, want, equal_nan=True)


def test_an_empty_batch_gives_what_the_original_gives(swept):
    a, x, clip, ranking = torch.randn(0, D), torch.randn(0, 7), clip_loss(), ranking_loss()

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return type(error), str(error)

    calls = lambda: clip(a, a, 2.0), lambda: ranking([{"x": x}, {"x": x}], None)  # noqa: E731
    want = [outcome(call) for call in calls]
    fuse(clip), fuse(ranking)
    got = [outcome(call) for call in calls]
    assert not swept and isinstance(want[0], torch.Tensor)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True) if isinstance(b, torch.Tensor) else pytest.fail(f"{a}, {b}")


def test_a_scale_of_several_numbers_runs_the_original(swept):
    a, b, scale, loss = torch.randn(B, D), torch.randn(B, D), torch.rand(D), clip_loss()
    want = loss(a, b, scale)
    fuse(loss)
    assert torch.equal(loss(a, b, scale), want) and not swept
