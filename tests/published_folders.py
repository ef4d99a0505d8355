"""Folders with the keys of published checkpoints (published_keys.json)."""

import json
import re
from math import prod
from pathlib import Path

import pytest
import safetensors.torch

TIMM = {"architecture": "vit_base_patch16_clip_quickgelu_224", "num_features": 768}
BGE = "visualized-bge/Visualized_base_en_v1.5.pth"
CHINESE = "chinese-clip/clip_cn_vit-b-16.pt"
HUGE = "chinese-clip/clip_cn_vit-h-14.pt"
M3 = "visualized-bge/Visualized_m3.pth"
CLIP = "transformers/openai/clip-vit-base-patch16"
OPEN_CLIP = "open_clip/ViT-B-16"
MBERT = "transformers/bert-base-multilingual-cased"
PUBLISHED = json.loads((Path(__file__).parent / "published_keys.json").read_text())


def expand(pattern):
    """Return the names that a pattern such as layer.0-11.weight stands for."""
    ranged = [part for part in pattern.split(".") if re.fullmatch(r"\d+[-,][-,\d]*", part)]
    if not ranged:
        return [pattern]
    names = []
    for span in ranged[0].split(","):
        first, _, last = span.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += expand(pattern.replace(ranged[0], str(number), 1))
    return names


def shapes_of(name):
    """Return the shape of each weight of a published checkpoint."""
    keys = PUBLISHED[name]["keys"]
    return {key: shape for pattern, shape in keys.items() for key in expand(pattern)}


def pattern_of(keys):
    """Return names without their numbers."""
    return {re.sub(r"(?<=\.)[-,\d]+(?=\.)", "#", key) for key in keys}


def write_shapes(path, shapes):
    """Write a safetensors file of zeros that takes no room on the disk."""
    header, place = {}, 0
    for key, shape in shapes.items():
        end = place + 4 * prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def write_config(folder, config):
    name = "open_clip_config.json" if "model_cfg" in config else "config.json"
    (folder / name).write_text(json.dumps(config))


def write_state(folder, state, config=None, name="model.safetensors"):
    """Save weights and a config; return the folder as a string."""
    folder.mkdir(exist_ok=True)
    tensors = {key: tensor.detach().float().contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / name)
    if config is not None:
        write_config(folder, config)
    return str(folder)


def write(folder, name, changes=None):
    """Write a published checkpoint with changed shapes; a weight of shape None is left out."""
    config = TIMM if name.startswith("timm/") else PUBLISHED[name].get("config")
    if config is not None:
        write_config(folder, config)
    held = {**shapes_of(name), **(changes or {})}
    file = "open_clip_model" if name.startswith("open_clip/") else "model"
    path = folder / f"{file}.safetensors"
    write_shapes(path, {key: shape for key, shape in held.items() if shape is not None})
    return path


def refusal(folder):
    """Return the one sentence that refuses a folder."""
    from mmfused.models.published import check_pretrained

    with pytest.raises(ValueError) as caught:
        check_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and "expected" in message
    return message


def change(config, path, value):
    """Return a copy of a config with another value at a dotted path."""
    copy = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    inner = copy
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return copy
