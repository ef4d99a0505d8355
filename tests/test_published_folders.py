"""Folders with the keys and shapes of published checkpoints, of their full sizes, hold what they
should; a damaged folder is refused in one sentence. The files have no values on the disk."""

import json
import os

import pytest
import torch
from published_folders import PUBLISHED, expand, shapes_of, write_config, write_shapes

pytest.importorskip("timm")
pytest.importorskip("transformers")

from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.models.published import check_pretrained, parts_of, pretrained_projection
from mmfused.models.weights import compress

HELD = {
    "timm/": ("image_encoder",),
    "open_clip/": ("image_encoder",),
    "eva-clip/": ("image_encoder",),
    "transformers/openai/": ("image_encoder",),
    "transformers/OFA-Sys/": ("image_encoder", "text_encoder"),
    "transformers/bert": ("text_encoder",),
    "transformers/BAAI/": ("text_encoder",),
    "chinese-clip/": ("image_encoder", "text_encoder"),
    "visualized-bge/": ("image_encoder", "text_encoder", "visual_proj"),
}
TIMM = {"architecture": "vit_base_patch16_clip_quickgelu_224", "num_features": 768}
BGE = "visualized-bge/Visualized_base_en_v1.5.pth"
CHINESE = "chinese-clip/clip_cn_vit-b-16.pt"


def write(folder, name, changes=None, **shapes):
    """Write a published checkpoint, with changed shapes; None leaves a weight out."""
    folder.mkdir(exist_ok=True)
    entry = PUBLISHED[name]
    if name.startswith("timm/"):
        write_config(folder, TIMM)
    elif "config" in entry:
        write_config(folder, entry["config"])
    file = "open_clip_model" if name.startswith("open_clip/") else "model"
    held = {**shapes_of(name), **(changes or {})}
    write_shapes(
        folder / f"{file}.safetensors", {key: shape for key, shape in held.items() if shape}
    )
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_whole(tmp_path, name):
    folder = write(tmp_path, name)
    expected = next(parts for begin, parts in HELD.items() if name.startswith(begin))
    assert parts_of(folder) == expected
    before = torch.get_rng_state()
    assert check_pretrained(folder) == expected
    assert torch.equal(torch.get_rng_state(), before)
    for part, load in (("image_encoder", pretrained_vit), ("text_encoder", pretrained_text)):
        if part not in expected:
            argument = part.replace("_", " ")
            with pytest.raises(ValueError, match=f"^{argument}: .* holds .*, expected a folder with"):
                load(str(folder))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_an_encoder_is_required(tmp_path, name):
    """A published key is required or ignored, and the required ones are all but a few heads."""
    shapes = shapes_of(name)
    optional = ("position_ids", "logit_scale", "text_projection", "pooler", "rope.freqs", "head.")
    optional += ("visual.proj", "visual_projection", "cls.", "text.", "text_model.")
    if not name.startswith("chinese-clip") and "visualized" not in name:
        optional += ("token_embedding", "positional_embedding", "transformer.", "ln_final")
    seen = set()
    for pattern in PUBLISHED[name]["keys"]:
        key = expand(pattern)[-1]
        kind = key.rpartition(".")[0]
        free = any(part in key for part in optional) and not key.startswith(("visual.t", "visual.p"))
        free = free and "OFA-Sys" not in name or "visual.proj" in key or "visual.norm" in key
        if free or kind in seen:
            continue
        seen.add(kind)
        if any(part in key for part in ("logit_scale", "position_ids", "projection")):
            continue
        write(tmp_path, name, {key: None})
        with pytest.raises(ValueError) as caught:
            check_pretrained(tmp_path)
        assert key.rpartition(".")[2] in str(caught.value) or "expected" in str(caught.value), key
    assert len(seen) > 10 and shapes
