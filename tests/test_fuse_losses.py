"""Tests of fuse(model) on the losses of open_clip and sentence-transformers."""

import copy
import pickle
import types
import warnings

import pytest
import ranking_losses
import torch
from ranking_losses import (
    B,
    D,
    cached_loss,
    clip_loss,
    dot_score,
    edited,
    embed,
    ranking_loss,
    text_losses,
)
from torch import nn

from mmfused import fuse, unfuse
from mmfused.fuse import base
from mmfused.fuse.base import KINDS, LEFT
from mmfused.testing import over_budget

loss_calls = ranking_losses.loss_calls
pytestmark = pytest.mark.filterwarnings("ignore:The .*RankingLoss is deprecated")


class Clip(nn.Module):
    """A model that contains its loss, with the logit scale as a parameter."""

    def __init__(self):
        super().__init__()
        self.scale, self.loss = nn.Parameter(torch.tensor(2.3)), clip_loss()

    def forward(self, image, text):
        unit = nn.functional.normalize
        return self.loss(
            unit(image, dim=-1), unit(text, dim=-1), self.scale.exp(), output_dict=True
        )["contrastive_loss"]


def ranked(columns, name="", matryoshka=(), **options):
    def make():
        given = dict(options)
        if name.startswith("Cached"):
            given["mini_batch_size"] = 7
        if "similarity_fct" in given:
            given["similarity_fct"] = pytest.importorskip("sentence_transformers.util").dot_score
        loss = ranking_loss(f"{name}RankingLoss", **given)
        return text_losses().MatryoshkaLoss(loss.model, loss, matryoshka) if matryoshka else loss

    return make, [(B, 7)] * columns, embed, "loss" if matryoshka else "", len(matryoshka) or 1


BOTH = dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
TWICE = BOTH | dict(directions=("doc_to_query", "query_to_doc", "doc_to_query"))
PLAIN, CACHED = "MultipleNegatives", "CachedMultipleNegatives"
# name -> (make a model, input shapes, call the model, the swapped name, number of loss calls)
CASES = {
    "clip": (Clip, [(B, D)] * 2, lambda model, *x: model(*x), "loss", 1),
    "clip, root": (clip_loss, [(B, D)] * 2, lambda model, a, b: model(a, b, 3.0), "", 1),
    "pairs": ranked(2, PLAIN),
    "triplets": ranked(3, PLAIN, scale=5.0),
    "dot": ranked(4, PLAIN, scale=0.5, similarity_fct=None),
    "both directions": ranked(3, PLAIN, **BOTH),
    "a direction named twice": ranked(2, PLAIN, **TWICE),
    "symmetric": ranked(2, f"{PLAIN}Symmetric"),
    "symmetric triplets": ranked(3, f"{PLAIN}Symmetric"),
    "matryoshka": ranked(2, PLAIN, (D, 10)),
    "cached pairs": ranked(2, CACHED),
    "cached triplets": ranked(3, CACHED, scale=5.0),
    "cached dot": ranked(4, CACHED, scale=0.5, similarity_fct=None),
    "cached, both directions": ranked(3, CACHED, **BOTH),
    "cached symmetric": ranked(2, f"{CACHED}Symmetric"),
    "cached symmetric triplets": ranked(3, f"{CACHED}Symmetric"),
    "cached matryoshka": ranked(3, CACHED, (D, 10), **BOTH),
}


def results(model, inputs, call, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    leaves = [*inputs, *model.parameters()]
    for leaf in leaves:
        leaf.grad = None
    loss = call(model, *inputs)
    (loss * 1.7).backward()  # gradient caching needs backward(), not autograd.grad
    return {"loss": loss.detach()} | {i: leaf.grad for i, leaf in enumerate(leaves)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_swapped_loss_matches_the_original(case, dtype, loss_calls):
    make, shapes, call, name, calls = CASES[case]
    torch.manual_seed(0)
    model, inputs = make().double(), [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    exact, before = results(model, inputs, call, torch.float64), model.state_dict()
    model.to(dtype)
    plain = results(model, inputs, call, dtype)
    report = fuse(model)
    assert list(report.swapped) == [name] and not report.left and not loss_calls
    fused = results(model, inputs, call, dtype)
    assert len(loss_calls) == calls, report
    if dtype == torch.float64:
        for key, value in exact.items():
            assert (fused[key] - value).norm() <= 1e-10 * max(value.norm(), 1), key
    else:
        assert not over_budget(fused, exact, plain)
    assert before.keys() == model.state_dict().keys()
    assert unfuse(model) == list(report.swapped)
    after = results(model, inputs, call, dtype)
    assert all(torch.equal(after[key], plain[key]) for key in plain) and len(loss_calls) == calls


LEFT_ALONE = {
    "world_size is 2": lambda: clip_loss(world_size=2),
    "The get_logits of this module was replaced": lambda: edited(clip_loss(), get_logits=len),
    "hardness_mode is 'all_negatives'": lambda: ranking_loss(
        hardness_mode="all_negatives", hardness_strength=2.0
    ),
    "directions are ('query_to_doc', 'query_to_query')": lambda: ranking_loss(
        directions=("query_to_doc", "query_to_query")
    ),
    "doc_to_query'), joint": lambda: ranking_loss(directions=BOTH["directions"]),
    "ranking_losses.dot_score: the sweep supports": lambda: ranking_loss(similarity_fct=dot_score),
    "The compute_loss_from_embeddings of this module was": lambda: edited(
        ranking_loss(), compute_loss_from_embeddings=len
    ),
    "The calculate_loss of this module was replaced": lambda: edited(
        cached_loss(), calculate_loss=len
    ),
    "The calculate_loss of this module was":  # the wrapped method belongs to another loss
    lambda: edited(cached_loss(), calculate_loss=wrapping(cached_loss().calculate_loss)),
    "calculate_loss of this module was replaced on": lambda: with_instance_method(
        cached_loss(), lambda self, reps, labels=None: None
    ),
    "of this module was replaced on the instance.": lambda: with_instance_method(
        cached_loss(), None
    ),
    "mini_batch_size is 0": lambda: edited(cached_loss(), mini_batch_size=0),
    "hardness_mode is 'hard_negatives'": lambda: cached_loss(
        hardness_mode="hard_negatives", hardness_strength=2.0
    ),
    "doc_to_doc'), joint": lambda: cached_loss(directions=("query_to_doc", "doc_to_doc")),
}


def wrapping(function):
    decorator = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses.matryoshka"
    ).CachedLossDecorator
    return decorator(function, [D], [1])


def with_instance_method(loss, function):
    """Set ``calculate_loss`` on the instance.

    The value is ``function``, wrapped as MatryoshkaLoss does. If ``function`` is None, the value is
    the loss's own method.
    """
    own = loss.calculate_loss
    return edited(
        loss, calculate_loss=wrapping(types.MethodType(function, loss)) if function else own
    )


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_unsupported_losses_are_left_with_a_reason(reason):
    model = LEFT_ALONE[reason]()
    report = fuse(model)
    assert not report.swapped and list(report.left) == [""] and reason in report.left[""]
    assert all(type(module).__module__ != "mmfused.fuse.base" for module in model.modules())


def test_call_with_a_logit_bias_runs_the_original(loss_calls):
    torch.manual_seed(0)
    a, b = torch.randn(2, B, D)
    loss = clip_loss()
    bias = torch.tensor(0.3)
    want = loss(a, b, 2.0, bias)
    fuse(loss)
    assert torch.equal(loss(a, b, 2.0, bias), want) and not loss_calls


def test_model_of_a_ranking_loss_is_also_fused():
    loss = ranking_loss()
    loss.model.queries = nn.Parameter(torch.randn(3, D))
    loss.model.attention = nn.MultiheadAttention(D, 2, batch_first=True)
    assert set(fuse(loss).swapped) == {"", "model.attention"}
    cached = cached_loss()
    cached.model.attention = nn.MultiheadAttention(D, 2, batch_first=True)
    report = fuse(cached)
    assert set(report.swapped) == {"", "model.attention"} and not report.left


@pytest.mark.parametrize("scale", [float("nan"), -3.0, 0.0, 20], ids=str)
@pytest.mark.parametrize("tensor", [False, True])
def test_unusual_scales_match_the_original(scale, tensor, loss_calls):
    a, b = torch.randn(2, B, D)
    x, y = torch.randn(2, B, 7)
    given = torch.tensor(float(scale)) if tensor else scale
    clip, ranking = clip_loss(), ranking_loss()
    ranking.scale = given  # after construction, any number is accepted
    want = clip(a, b, given), ranking([{"x": x}, {"x": y}], None)
    fuse(clip), fuse(ranking)
    got = clip(a, b, given), ranking([{"x": x}, {"x": y}], None)
    assert len(loss_calls) == 2
    torch.testing.assert_close(got, want, equal_nan=True)


def test_empty_batch_runs_the_original(loss_calls):
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
    assert not loss_calls and isinstance(want[0], torch.Tensor)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True) if isinstance(
            b, torch.Tensor
        ) else pytest.fail(f"{a}, {b}")


def test_scale_with_several_elements_runs_the_original(loss_calls):
    a, b, scale, loss = torch.randn(B, D), torch.randn(B, D), torch.rand(D), clip_loss()
    want = loss(a, b, scale)
    fuse(loss)
    assert torch.equal(loss(a, b, scale), want) and not loss_calls


# ---- the cached loss -----------------------------------------------------------------------------


def chunks(grad=True):
    torch.manual_seed(3)
    return [
        [torch.randn(n, D, dtype=torch.float64).requires_grad_(grad) for n in (20, 20, 21)]
        for _ in range(3)
    ]


@pytest.mark.parametrize("with_backward", [False, True])
def test_cached_loss_supports_with_backward(with_backward, loss_calls):
    """With ``with_backward``, the call computes all gradients, and its result has no graph."""
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    found = []
    for swap in (False, True):
        loss, reps, scale.grad = edited(cached_loss(), scale=scale), chunks(), None
        if swap:
            fuse(loss)
        value = loss.calculate_loss(reps, None, with_backward=with_backward)
        assert value.requires_grad != with_backward
        if not with_backward:
            value.backward()
        found.append([value.detach(), scale.grad, *(x.grad for column in reps for x in column)])
    assert len(loss_calls) == 1
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_cached_loss_matches_the_original_without_gradients(loss_calls):
    loss, inputs = cached_loss(), torch.randn(2, B, 7)
    with torch.no_grad():
        want = embed(loss, *inputs)
        fuse(loss)
        torch.testing.assert_close(embed(loss, *inputs), want)
    assert len(loss_calls) == 1


def test_cached_loss_with_unequal_or_missing_columns_runs_the_original(loss_calls):
    fused = cached_loss()
    fuse(fused)
    unequal, single = [chunks(False)[0], chunks(False)[1][:2]], chunks(False)[:1]
    for reps in (unequal, single, [[], []]):
        outcomes = []
        for loss in (cached_loss(), fused):
            try:
                outcomes.append(loss.calculate_loss(reps))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        torch.testing.assert_close(*outcomes) if torch.is_tensor(outcomes[0]) else None
        assert outcomes[0] is not None and type(outcomes[0]) is type(outcomes[1]) and not loss_calls
        assert torch.is_tensor(outcomes[0]) or outcomes[0] == outcomes[1]


@pytest.mark.parametrize("first", ["wrapped", "fused"])
def test_matryoshka_works_before_and_after_fuse(first, loss_calls):
    """On construction, MatryoshkaLoss wraps the loss's current ``calculate_loss``."""
    make, shapes, call, *_ = CASES["cached matryoshka"]
    torch.manual_seed(0)
    model, inputs = make().double(), [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    want = results(model, inputs, call, torch.float64)
    inner = copy.deepcopy(model.loss)
    if first == "fused":
        del inner.__dict__["calculate_loss"]
        fuse(inner)
        inner.model = model.model
        model = text_losses().MatryoshkaLoss(model.model, inner, (D, 10))
    report = fuse(model)
    assert list(report.swapped) == ["loss"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        loss_calls.clear()
        assert copied.loss.calculate_loss.fn.__self__ is copied.loss
        got = results(copied, inputs, call, torch.float64)
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-10, atol=1e-12)
        assert (
            len(loss_calls) == 2
            and unfuse(copied) == ["loss"]
            and list(fuse(copied, dry_run=True).swapped) == ["loss"]
        )
        got = results(copied, inputs, call, torch.float64)
        assert len(loss_calls) == 2 and all(torch.equal(got[key], want[key]) for key in want)


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory):
    """Create a real SentenceTransformer, small and random."""
    transformers, sentence_transformers = (
        pytest.importorskip("transformers"),
        pytest.importorskip("sentence_transformers"),
    )
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = dict(
        vocab_size=len(words),
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    transformers.BertModel(transformers.BertConfig(**sizes, **dropout)).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    parts = [modules.Transformer(str(folder)), modules.Pooling(D)]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu").double().train()


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("around", ["", "MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss"])
@pytest.mark.filterwarnings("ignore")  # layer losses warn about cached losses
def test_losses_around_a_sentence_transformer_match_the_original(
    around, cached, sentence_transformer, loss_calls
):
    model, dims = sentence_transformer, [[D, 10]] if "Matryoshka" in around else []
    name = f"{CACHED if cached else PLAIN}RankingLoss"
    loss = getattr(text_losses(), name)(model, **(dict(mini_batch_size=5) if cached else {}))
    loss = getattr(text_losses(), around)(model, loss, *dims) if around else loss

    def outcome():
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(5, 11, (12, 6), generator=generator) for _ in range(3)]
        texts = [
            {
                "input_ids": x,
                "attention_mask": torch.ones_like(x),
                "token_type_ids": torch.zeros_like(x),
            }
            for x in ids
        ]
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            # Make the choice of layers and widths deterministic.
            patch.setattr("random.sample", lambda population, k: list(population)[:k])
            try:
                value = loss(texts, None)
                value.backward()
            except KeyError as error:  # layer losses cannot wrap a cached loss
                return str(error)
        return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want = outcome()
    report = fuse(loss)
    assert len(report.swapped) == 1 and not report.left
    got = outcome()
    if isinstance(want, str):
        assert got == want and cached and around in ("AdaptiveLayerLoss", "Matryoshka2dLoss")
        return
    assert len(want) == len(got) > 10 and loss_calls
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-10 * max(b.norm(), 1)


# ---- other releases, and known classes that are left ---------------------------------------------


def test_losses_of_another_structure_are_left(monkeypatch):
    cls = text_losses().CachedMultipleNegativesRankingLoss
    with monkeypatch.context() as patch:  # as in sentence-transformers 5
        patch.setattr(cls, "calculate_loss", lambda self, reps, with_backward=False: None)
        assert (
            "has a different calculate_loss: its structure is different"
            in fuse(cached_loss()).left[""]
        )
    with monkeypatch.context() as patch:
        patch.setattr(
            cls,
            "calculate_loss",
            lambda self, reps, labels=None, *, with_backward=False, margin=0.0: None,
        )
        assert "takes margin, which fuse does not know" in fuse(cached_loss()).left[""]
    with monkeypatch.context() as patch:
        patch.delattr(cls, "hardness_mode")
        report = fuse(cached_loss())
        assert (
            "has no hardness_mode: its structure is different" in report.left[""]
            and len(report.left) == 1
        )
    with monkeypatch.context() as patch:
        plain = text_losses().MultipleNegativesRankingLoss
        patch.setattr(plain, "compute_loss_from_embeddings", lambda self, queries, docs: None)
        assert "takes docs, queries, which fuse does not know" in fuse(ranking_loss()).left[""]


def test_swapping_a_deprecated_class_gives_no_warning(monkeypatch):
    monkeypatch.setattr(base, "_classes", {})
    with pytest.warns(DeprecationWarning):
        loss = ranking_loss("MultipleNegativesSymmetricRankingLoss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(loss).swapped


def test_reason_names_an_older_release():
    name = "CachedMultipleNegativesSymmetricRankingLoss"
    older = type(name, (nn.Module,), {"__module__": f"sentence_transformers.losses.{name}"})
    assert "before 6" in fuse(older()).left[""]


def find(path):
    module, _, name = path.rpartition(".")
    return getattr(pytest.importorskip(module), name)


@pytest.mark.parametrize(
    "path", [p for p in [*LEFT, *KINDS] if p.startswith(("open_clip", "sentence_transformers."))]
)
def test_known_classes_exist_under_their_paths(path):
    if path.startswith("sentence_transformers.losses."):
        assert path in LEFT
        return
    cls = find(path)
    assert f"{cls.__module__}.{cls.__qualname__}" == path
    if path in LEFT:
        loss = cls.__new__(cls)
        nn.Module.__init__(loss)
        assert fuse(nn.Sequential(loss)).left == {"0": LEFT[path]} and LEFT[path].endswith(".")
