"""Tests that fuse leaves modules with unusual attributes and does not raise."""

import functools

import pytest
import ranking_losses
import torch
from ranking_losses import B, D, cached_loss, clip_loss, dot_score, edited, embed, ranking_loss
from torch import nn

from mmfused import fuse, unfuse

loss_calls = ranking_losses.loss_calls
pytestmark = pytest.mark.filterwarnings("ignore:The .*RankingLoss is deprecated")


class Scaled:
    def __call__(self, a, b):
        return 0.5 * a @ b.T


class Hostile(Scaled):
    def __getattribute__(self, name):
        if name != "__class__":  # nn.Module.__setattr__ reads __class__
            raise RuntimeError("no attributes here")
        return super().__getattribute__(name)


def scaled_cos_sim():
    cos_sim = pytest.importorskip("sentence_transformers.util").cos_sim
    return functools.wraps(cos_sim)(lambda a, b: 0.5 * cos_sim(a, b))


SIMILARITIES = {
    "a functools.partial": lambda: functools.partial(dot_score),
    "Scaled": Scaled,
    "a torch.nn.modules.distance.CosineSimilarity": nn.CosineSimilarity,
    "<lambda>": lambda: lambda a, b: 0.5 * dot_score(a, b),
    "Hostile": Hostile,
    "another function with the name sentence_transformers.util.similarity.cos_sim": scaled_cos_sim,
    "a builtins.method": lambda: Scaled().__call__,
}


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_losses_with_other_similarities_are_left(name, cached, loss_calls):
    torch.manual_seed(0)
    inputs, similarity = torch.randn(2, B, 7), SIMILARITIES[name]()
    loss = (cached_loss if cached else ranking_loss)(similarity_fct=similarity)
    report = fuse(loss)
    assert (
        not report.swapped
        and f"{name}: the sweep supports cos_sim and dot_score." in report.left[""]
    )
    later = (cached_loss if cached else ranking_loss)()
    later.load_state_dict(loss.state_dict(), strict=False)
    assert fuse(later).swapped
    later.similarity_fct = similarity

    def outcome(loss):
        try:
            return embed(loss, *inputs).detach()
        except Exception as error:
            return type(error), str(error)

    want, got = outcome(loss), outcome(later)
    assert not loss_calls and (torch.equal(got, want) if torch.is_tensor(want) else got == want)
    (text,) = fuse(later).swapped.values()
    assert (
        text.startswith("already swapped, but runs the original: similarity_fct is ")
        and not fuse(later).expected[""]
    )


class Raising(nn.Module):
    """A class whose properties raise."""

    @property
    def world_size(self):
        raise RuntimeError("not before the first step")

    local_loss = gather_with_grad = get_logits = world_size


Raising.__module__, Raising.__qualname__ = "open_clip.loss", "ClipLoss"

ODD_MODULES = {
    "RuntimeError: not before the first step": Raising,
    "'>' not supported": lambda: edited(clip_loss(), world_size=None),
    "has no world_size": lambda: without(clip_loss(), "world_size"),
    "directions is a NoneType": lambda: edited(ranking_loss(), directions=None),
    "directions is a generator": lambda: edited(
        ranking_loss(), directions=(x for x in ("query_to_doc",))
    ),
    "It cannot be inspected: TypeError: unhashable": lambda: edited(
        ranking_loss(), directions=(["query_to_doc"],)
    ),
    "It cannot be inspected: RuntimeError: Boolean": lambda: edited(
        ranking_loss(), hardness_mode="all_negatives", hardness_strength=torch.ones(2)
    ),
    "mini_batch_size is 'all'": lambda: edited(cached_loss(), mini_batch_size="all"),
    "has no scale": lambda: without(cached_loss(), "loss"),
    "It cannot be inspected: TypeError: '<='": lambda: edited(
        nn.MultiheadAttention(D, 2), dropout="half"
    ),
    "It cannot be inspected: AttributeError": lambda: edited(
        nn.MultiheadAttention(D, 2), out_proj=None
    ),
}


def without(module, name):
    delattr(module, name)
    return module


@pytest.mark.parametrize("words", ODD_MODULES)
def test_odd_modules_are_left_and_other_modules_swapped(words):
    model = nn.Sequential(ODD_MODULES[words](), clip_loss())
    types = [type(module) for module in model.modules()]
    report = fuse(model)
    assert list(report.swapped) == ["1"] and words in report.left["0"], report
    assert [type(module) for module in model.modules()][:-1] == types[:-1]
    assert unfuse(model) == ["1"]


def test_module_whose_class_cannot_be_changed_is_left(monkeypatch):
    model = nn.Sequential(clip_loss(), nn.MultiheadAttention(D, 2))

    def refuse(self, name, value):
        raise AttributeError(f"{name} is fixed")

    monkeypatch.setattr(type(model[0]), "__setattr__", refuse)
    report = fuse(model)
    assert (
        list(report.swapped) == ["1"] == list(report.expected)
        and "__class__ is fixed" in report.left["0"]
    )


def test_swapped_loss_with_later_odd_attributes_runs_the_original(loss_calls):
    a, b = torch.randn(2, B, D)
    for attributes in (dict(world_size=None), dict(world_size="two")):
        plain, fused = edited(clip_loss(), **attributes), clip_loss()
        fuse(fused)
        edited(fused, **attributes)
        for loss in (plain, fused):
            with pytest.raises(TypeError, match="'>' not supported"):
                loss(a, b, 2.0)
    assert not loss_calls
    ranking, embeddings = ranking_loss(), [a, b]
    # The original does not read hardness_strength in an unknown mode.
    odd = dict(hardness_mode="unknown", hardness_strength=torch.ones(2))
    want = edited(ranking, **odd).compute_loss_from_embeddings(embeddings, None)
    assert "It cannot be inspected: RuntimeError: Boolean" in fuse(ranking).left[""]
    assert fuse(edited(ranking, hardness_mode=None)).swapped
    assert (
        torch.equal(edited(ranking, **odd).compute_loss_from_embeddings(embeddings, None), want)
        and not loss_calls
    )
    assert (
        "already swapped, but runs the original: It cannot be inspected"
        in fuse(ranking).swapped[""]
    )
