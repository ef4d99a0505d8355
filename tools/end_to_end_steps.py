"""The training steps that tools/end_to_end.py counts and times: five models at the papers' sizes.

A step has two phases. The work of ``encode`` is linear in the batch: it computes the embeddings of
a retrieval model, or the tokens of FLUID. ``compare`` computes the rest: the loss, whose work grows
with the square of the batch, and FLUID's layers, whose experts spend most of the time on reading
their weights if the batch is small.

There is no dropout, all pictures and texts are present, and all texts have the full length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.models import FLUIDConfig, MOON2Config, UniCAConfig, UniECSConfig, UNITEConfig
from mmfused.models.encoders import freeze
from mmfused.models.inputs import encode_image, encode_text
from mmfused.models.lora import add_lora
from mmfused.models.qwen import KINDS

# published: encoders trained or frozen as in the paper. frozen: no encoder is trained. tokens: the
# image tokens, and in FLUID and UniECS the text tokens too, are computed before training.
Variant = Literal["published", "frozen", "tokens"]
Encoded = dict[str, dict[str, Tensor]]

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PROMPT = 8  # tokens of UNITE's prompt
TOKENS = {"vision_start": 1, "vision_end": 2, "image": 3, "end": 4, "pad": 5, "drop": []}
HOSTED = ("moon2", "unite")


@dataclass(frozen=True)
class Setup:
    """A model and its batch.

    Attributes:
        title: the model's name in prose.
        model: the model's class.
        unit: what the batch consists of.
        batch: the batch of the paper on all GPUs.
        gpus: number of GPUs among which the batch is split.
        roles: parts of the batch.
        text: tokens of a text.
        counted: two batch sizes at which the encode phase is counted.
        timed: batch size at which the encode phase is timed.
        freezable: whether the paper trains encoders which a user may freeze.
        sharded: whether parameters and optimizer state must be split among the GPUs.
    """

    title: str
    model: str
    unit: str
    batch: int
    gpus: int
    roles: tuple[str, ...]
    text: int
    counted: tuple[int, int] = (1, 2)
    timed: int = 1
    freezable: bool = False
    sharded: bool = False


PAIR, TRIPLET = ("query", "candidate"), ("query", "candidate", "negative")
SETUPS = {
    "fluid": Setup("FLUID", "FLUID", "samples", 128, 1, ("sample",), 512, freezable=True),
    "uniecs": Setup("UniECS", "UniECS", "pairs", 256, 2, PAIR, 64, timed=2, freezable=True),
    "unica": Setup("UniCA", "UniCA", "triplets", 640, 8, TRIPLET, 64),
    "moon2": Setup("MOON2.0", "MOON2", "triplets", 256, 64, TRIPLET, 64, sharded=True),
    "unite": Setup("UNITE", "UNITE", "triplets", 4096, 64, TRIPLET, 64),
}


class Step:
    """One model of ``SETUPS``, with batches of random data.

    Args:
        name: key of ``SETUPS``.
        models: namespace of the model classes: ``mmfused.models`` or ``torch_modules.models()``.
        variant: how the encoders are used.
        preset: the sizes.
        depth: number of layers in the host's language model and vision tower, and a small
            vocabulary; None: the preset's. For ``HOSTED`` models only.
    """

    def __init__(
        self,
        name: str,
        models: Any,
        variant: Variant = "published",
        preset: str = "paper",
        depth: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.setup, self.variant = name, SETUPS[name], variant
        self.config = config(name, preset, variant == "tokens", depth)
        self.model: Any = getattr(models, self.setup.model)(self.config)
        if name == "unite":
            add_lora(self.model, dropout=0.0)
        if variant == "frozen":
            for encoder in (self.model.image_encoder, self.model.text_encoder):
                freeze(encoder)
        self.preset = preset
        self.length = min(self.setup.text, 16) if preset == "tiny" else self.setup.text

    def batch(self, size: int) -> dict[str, dict[str, Tensor]]:
        """Return the parts of a batch of random data."""
        return {role: self.items(size) for role in self.setup.roles}

    def items(self, size: int) -> dict[str, Tensor]:
        c, tokens, out = self.config, self.variant == "tokens", {}
        out["labels"] = torch.arange(size)
        if not tokens:
            side = self.model.picture_size
            out["pixel_values"] = torch.randn(size, 3, side, side)
        elif self.name in HOSTED:
            out["image_tokens"] = torch.randn(size, self.picture_tokens, width(c))
        else:
            out["image_tokens"] = torch.randn(size, self.picture_tokens, c.image_dim)
        if tokens and self.name in ("fluid", "uniecs"):
            out["text_tokens"] = torch.randn(size, self.length, c.text_dim)
            out["text_padding_mask"] = torch.zeros(size, self.length, dtype=torch.bool)
        else:
            out["input_ids"] = torch.randint(6, 1000, (size, self.length))
            out["attention_mask"] = torch.ones(size, self.length, dtype=torch.int64)
        return out

    @property
    def picture_tokens(self) -> int:
        """Number of tokens of a picture."""
        if self.name in HOSTED:
            vision = self.model.host.config.vision_config
            return (self.model.picture_size // (vision.patch_size * vision.spatial_merge_size)) ** 2
        image = type(self.config).PRESETS[self.preset]["image"]
        patches = (image["img_size"] // image["patch_size"]) ** 2
        return patches if self.name == "unica" else patches + 1

    @property
    def live(self) -> float:
        """Share of the rows of MOON2.0's sequences that are no padding; 1 for other models.

        Its experts read no padding. The sequence of a view has slots for a picture with its two
        markers, for a text, and for an end token.
        """
        if self.name != "moon2":
            return 1.0
        image, text = self.picture_tokens + 2, self.length
        return (image + text + image + text) / (3 * (image + text + 1))

    def encode(self, batch: dict[str, dict[str, Tensor]]) -> Encoded:
        if self.name == "fluid":
            return {"sample": self.fluid_tokens(**batch["sample"])}
        return {role: self.model.encode_part(role, items) for role, items in batch.items()}

    def fluid_tokens(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **given: Tensor,
    ) -> dict[str, Tensor]:
        """Return FLUID's arguments with the encoders' tokens in place of pixels and ids."""
        if pixel_values is None or input_ids is None or attention_mask is None:
            return given
        image = encode_image(self.model.image_encoder, pixel_values, None)
        text = encode_text(self.model.text_encoder, input_ids, attention_mask)
        tokens = {"image_tokens": image, "text_tokens": text}
        return {**given, **tokens, "text_padding_mask": attention_mask == 0}

    def compare(self, encoded: Encoded) -> Tensor:
        if self.name == "fluid":
            part = encoded["sample"]
            labels = part["labels"] % self.config.num_classes
            return self.model(**{**part, "labels": labels}).loss
        return self.model.compare(**encoded).loss

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @contextmanager
    def layers(self, language: int, vision: int) -> Iterator[None]:
        """Use only the first layers of a host."""
        if self.name not in HOSTED:
            yield
            return
        text, tower = self.model.host.language_model, self.model.host.visual
        before = text.layers, tower.blocks, text.config.num_hidden_layers
        try:
            text.layers, tower.blocks = text.layers[:language], tower.blocks[:vision]
            text.config.num_hidden_layers = language
            yield
        finally:
            text.layers, tower.blocks, text.config.num_hidden_layers = before


def config(name: str, preset: str, tokens: bool, depth: tuple[int, int] | None) -> Any:
    """Return a model's configuration without dropout; with ``tokens``, without its encoders."""
    image, text = (None, None) if tokens else ({}, NO_DROPOUT)
    if name == "fluid":
        # 191 classes in the paper; torch's grouped_mm needs a multiple of 4.
        sizes = {"num_classes": 192, "dropout": 0.0, "head_dropout": 0.0}
        return FLUIDConfig.preset(preset, image=image, text=text, **sizes)
    if name == "uniecs":
        return UniECSConfig.preset(preset, image=image, text=text, dropout=0.0)
    if name == "unica":
        return UniCAConfig.preset(preset, image=image, text=NO_DROPOUT, dropout=0.0)
    kind = MOON2Config if name == "moon2" else UNITEConfig
    prompt = [6] * PROMPT if name == "unite" else []
    options: dict[str, Any] = {"tokens": {**TOKENS, "prompts": dict.fromkeys(KINDS, prompt)}}
    if depth is not None:
        host = kind.PRESETS[preset]["host"]
        language = {"num_hidden_layers": depth[0], "vocab_size": 2048}
        vision: dict[str, Any] = {"depth": depth[1]}
        if "fullatt_block_indexes" in host["vision_config"]:
            vision["fullatt_block_indexes"] = []
        options["host"] = {
            **host,
            "text_config": {**host["text_config"], **language},
            "vision_config": {**host["vision_config"], **vision},
        }
    return kind.preset(preset, **options)


def width(c: Any) -> int:
    return c.host["text_config"]["hidden_size"]


def enlarged(encoded: Encoded, size: int) -> Encoded:
    """Return leaves with the shapes of ``encoded`` but ``size`` rows, for the compare phase.

    Embeddings are random unit vectors. A third of UNITE's items is of each modality code.
    """
    out: Encoded = {}
    for index, (role, part) in enumerate(encoded.items()):
        out[role] = {}
        for name, x in part.items():
            rows = x.detach()
            if name == "labels":  # a hard negative is another product
                rows = torch.arange(size) + (size if index == 2 else 0)
            elif name == "code":
                rows = 1 + torch.arange(size) % 3
            elif x.dim() == 2 and x.is_floating_point():
                rows = F.normalize(torch.randn(size, x.shape[1], dtype=x.dtype), dim=-1)
            elif name.endswith("_tokens"):
                rows = torch.randn(size, *x.shape[1:])
            elif x.dim():
                rows = rows[torch.arange(size) % len(x)]
            out[role][name] = rows.clone().requires_grad_(x.requires_grad)
    return out


@contextmanager
def without_data_dependence(
    step: Step,
    windows: tuple[list[int], list[int]] | None,
) -> Iterator[None]:
    """Give Qwen2.5-VL's vision tower its windows, whose computation needs values."""
    if windows is None:
        yield
        return
    index, ends = torch.tensor(windows[0]), torch.tensor(windows[1], dtype=torch.int32)
    visual = step.model.host.visual
    forward = functools.partial(visual.forward, window_index=index, cu_window_seqlens=ends)
    with mock.patch.object(visual, "forward", forward):
        yield


def windows_of(step: Step, pictures: int) -> tuple[list[int], list[int]] | None:
    """Return the windows of ``pictures`` pictures in Qwen2.5-VL's vision tower, else None."""
    vision = step.model.host.config.vision_config if step.name in HOSTED else None
    if not hasattr(vision, "window_size"):
        return None
    from transformers.vision_utils import get_vision_window_index

    side = step.model.picture_size // vision.patch_size
    index, ends = get_vision_window_index(
        torch.tensor([[1, side, side]] * pictures),
        vision.spatial_merge_size,
        vision.window_size,
        vision.patch_size,
    )
    return index.tolist(), ends.tolist()
