"""On CUDA and in compiled graphs, ids and labels out of range give NaN instead of an error.

These tests run on a CPU with the check of values disabled.
"""

import pytest
import torch
from retrieval_models import NAMES, batch, small_model

import mmfused
from mmfused.models import FLUID, FLUIDConfig, inputs


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(inputs, "check_value", lambda *_: None)


@pytest.mark.parametrize("outside", [-1, 10**6])
@pytest.mark.parametrize("name", NAMES)
def test_an_id_outside_the_vocabulary_makes_only_its_item_nan(name, outside):
    model = small_model(name).eval()
    items = {key: value for key, value in batch(name)["query"].items() if key != "labels"}
    bad = items | {"input_ids": items["input_ids"].clone()}
    bad["input_ids"][3, 1] = outside
    with mmfused.backend("composed"):
        want, got = (model.embed(views=("both",), **given)["both"] for given in (items, bad))
    others = torch.arange(len(want)) != 3
    assert got[3].isnan().all()
    torch.testing.assert_close(got[others], want[others])


@pytest.mark.parametrize("outside", [-1, 5])
def test_a_label_outside_the_classes_makes_the_loss_nan(outside):
    torch.manual_seed(0)
    model = FLUID(FLUIDConfig.preset("tiny", num_classes=5, image=None, text=None))
    labels = torch.tensor([0, 4, 2, 1])
    tokens = {"image_tokens": torch.randn(4, 5, 128), "text_tokens": torch.randn(4, 3, 128)}
    want = model(**tokens, labels=labels)
    labels[1] = outside
    got = model(**tokens, labels=labels)
    assert want.loss.isfinite() and got.loss.isnan() and got.losses["ce"].isnan()
    assert got.logits.isfinite().all()
