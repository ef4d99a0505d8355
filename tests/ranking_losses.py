"""Loss modules of open_clip and sentence-transformers, for the tests of ``mmfused.fuse``."""

import pytest
from torch import nn

from mmfused.fuse import losses

B, D = 61, 24


class Encoder(nn.Sequential):
    """A stand-in for SentenceTransformer. Adds "sentence_embedding" (B, D) to the features."""

    def __init__(self):
        super().__init__(nn.Linear(7, D))

    def forward(self, features):
        return {**features, "sentence_embedding": self[0](features["x"])}

    def get_embedding_dimension(self):
        return D


def clip_loss(**options):
    return pytest.importorskip("open_clip.loss").ClipLoss(**options)


def text_losses():
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


def ranking_loss(name="MultipleNegativesRankingLoss", **options):
    return getattr(text_losses(), name)(Encoder(), **options)


def cached_loss(**options):
    return ranking_loss("CachedMultipleNegativesRankingLoss", mini_batch_size=7, **options)


def dot_score(a, b):
    return pytest.importorskip("sentence_transformers.util").dot_score(a, b)


def embed(model, *inputs):
    return model([{"x": x} for x in inputs], None)


def edited(loss, **attributes):
    for name, value in attributes.items():
        setattr(loss, name, value)
    return loss


@pytest.fixture
def loss_calls(monkeypatch):
    module, calls = losses, []
    real = module.scaled_info_nce
    monkeypatch.setattr(
        module, "scaled_info_nce", lambda *a, **k: (calls.append(k), real(*a, **k))[1]
    )
    return calls
