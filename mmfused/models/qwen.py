"""Pictures and sequences for a Qwen2-VL of transformers, the host of UNITE and MOON2.0.

The sequence of an item in a view is <|vision_start|>, the picture's tokens, <|vision_end|>, the
text, a prompt, an end token. In the chat template, the template's start comes first. Padding is on
the left, so that the last slot holds the last token of every item. Each item has slots for all of
these parts, and slots of absent parts become padding. The shapes of the sequences therefore depend
only on the shapes of the batch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmfused.models.inputs import check_flags, check_range, clamp_indices, one_source
from mmfused.models.qwen_host import (
    PARTS,
    PIXEL_MEAN,
    PIXEL_STD,
    Part,
    build_qwen2_vl,
    freeze_parts,
    pretrained_qwen2_vl,
)
from mmfused.models.qwen_tokens import KINDS, add_vision_tokens, enclose_texts, token_ids
from mmfused.models.retrieval import VIEWS, View

__all__ = [
    "KINDS",
    "PARTS",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "Items",
    "Part",
    "Sequence",
    "add_vision_tokens",
    "assemble",
    "build_qwen2_vl",
    "check_ids",
    "enclose_texts",
    "freeze_parts",
    "hidden_states",
    "patches",
    "picture_tokens",
    "pretrained_qwen2_vl",
    "read_pictures",
    "token_ids",
    "visible",
]

Grid = tuple[int, int, int]  # tokens of a picture: time, rows, columns
Prompt = Literal["plain", "chat"]
Positions = Literal["mrope", "1d"]


class Sequence(NamedTuple):
    """Input of the host's language model: B items, L slots."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 1 = real token, 0 = padding on the left
    position_ids: Tensor  # (3, B, L) int64: time, row, column (M-RoPE)
    picture_slot: Tensor  # (B, L) int64: index of the picture token in this slot, -1 = none
    has_image: Tensor  # (B,) bool: whether the sequence has a picture
    has_text: Tensor  # (B,) bool: whether the sequence has a text


class Items(NamedTuple):
    """B items after the vision tower; see `assemble` and `read_pictures`."""

    pictures: Tensor  # (B, n, D)
    grid: Grid
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T)
    image_present: Tensor | None  # (B,) bool
    video: bool


# ---- pictures ------------------------------------------------------------------------------------


def patches(
    pixel_values: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
) -> tuple[Tensor, Tensor]:
    """Cut pictures into patches, in Qwen2VLImageProcessor's layout.

    Args:
        pixel_values: pictures (B, 3, H, W) or videos (B, frames, 3, H, W). A picture is repeated
            for t frames.
        patch_size: p, the side of a patch in pixels.
        temporal_patch_size: t, the number of frames in a patch.
        merge_size: the number of patches on a token's side.

    Returns:
        Patches (B * n, 3 * t * p * p), in which the n patches of a picture and the patches of a
        token are adjacent; and grid_thw (B, 3) int64, the numbers of patches in time, rows and
        columns.

    Raises:
        ValueError: the pixels or frames do not divide into whole tokens.
    """
    t, p, m = temporal_patch_size, patch_size, merge_size
    if pixel_values.ndim == 4:
        pixel_values = pixel_values[:, None].expand(-1, t, -1, -1, -1)
    batch, frames, channels, height, width = pixel_values.shape
    if height % (p * m) or width % (p * m) or frames % t:
        got = f"{frames} frames of {height} x {width}"
        expected = f"sides in multiples of {p * m} and frames in multiples of {t}"
        raise ValueError(f"pixel_values: got {got}, expected {expected}")
    grid = (frames // t, height // p, width // p)
    x = pixel_values.reshape(batch, grid[0], t, channels, grid[1] // m, m, p, grid[2] // m, m, p)
    rows = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, channels * t * p * p)
    return rows, torch.tensor([grid], device=rows.device).expand(batch, -1)


def picture_tokens(
    host: Any,
    pixel_values: Tensor,
    present: Tensor | None,
) -> tuple[Tensor, Grid]:
    """Return the tokens of all pictures (B, n, D), and their grid in tokens (time, rows, columns).

    ``present`` (B,) bool is False for items without a picture; None: all items have one. The vision
    tower runs on zeros in place of absent pictures.
    """
    c = host.config.vision_config
    if pixel_values.ndim == 5:
        check_takes_videos(host)
    if pixel_values.ndim not in (4, 5) or pixel_values.shape[-3] != c.in_channels:
        got, expected = tuple(pixel_values.shape), "(batch, 3, H, W) or (batch, frames, 3, H, W)"
        raise ValueError(f"pixel_values: got shape {got}, expected {expected}")
    check_flags("image_present", present, pixel_values.shape[:1])
    if present is not None:
        shape = (-1, *(1,) * (pixel_values.ndim - 1))
        pixel_values = pixel_values.masked_fill(~present.view(shape), 0)
    rows, grid = patches(pixel_values, c.patch_size, c.temporal_patch_size, c.spatial_merge_size)
    features = host.visual(rows.to(host.visual.dtype), grid_thw=grid).pooler_output
    side = c.patch_size * c.spatial_merge_size
    times = 1 if pixel_values.ndim == 4 else pixel_values.shape[1] // c.temporal_patch_size
    height, width = pixel_values.shape[-2:]
    return features.view(len(grid), -1, features.shape[-1]), (times, height // side, width // side)


def check_takes_videos(host: Any) -> None:
    """Require a Qwen2-VL; Qwen2.5-VL's positions of videos depend on their frame rate."""
    if host.config.model_type != "qwen2_vl":
        got = f"videos with model_type {host.config.model_type!r}"
        raise ValueError(f"pixel_values: got {got}, expected model_type 'qwen2_vl'")


def read_pictures(
    host: Any,
    size: int,
    pixel_values: Tensor | None,
    image_tokens: Tensor | None,
    present: Tensor | None,
) -> tuple[Tensor, Grid]:
    """Return `picture_tokens` of the pixels, or the given ``image_tokens`` with their grid.

    ``image_tokens`` (B, n, D) belong to square pictures with sides of ``size`` pixels. The vision
    tower should be frozen, because it does not run if ``image_tokens`` are given.
    """
    source = one_source("pixel_values and image_tokens", pixel_values, image_tokens)
    if image_tokens is None:
        return picture_tokens(host, source, present)
    c = host.config.vision_config
    side = size // (c.patch_size * c.spatial_merge_size)
    expected = (side * side, host.config.text_config.hidden_size)
    if image_tokens.ndim != 3 or tuple(image_tokens.shape[1:]) != expected:
        got = tuple(image_tokens.shape)
        raise ValueError(
            f"image_tokens: got shape {got}, expected (batch, {expected[0]}, {expected[1]})"
        )
    check_flags("image_present", present, image_tokens.shape[:1])
    if present is not None:
        image_tokens = image_tokens.masked_fill(~present[:, None, None], 0)
    return image_tokens, (1, side, side)


# ---- sequences -----------------------------------------------------------------------------------


def assemble(
    tokens: dict[str, Any],
    grid: Grid,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_present: Tensor | None,
    view: View | Tensor = "both",
    *,
    video: bool = False,
    prompt: Prompt | None = "plain",
    positions: Positions = "mrope",
) -> Sequence:
    """Assemble the sequences of a batch.

    The prompt depends on what the sequence contains. A sequence without a picture gets the prompt
    for texts, even if the sequence has no text.

    Args:
        tokens: see `token_ids`.
        grid: a picture's tokens (time, rows, columns), as `picture_tokens` returns it.
        input_ids: (B, T) int64. Ids in tokens["drop"] count as padding. An item whose ids are all
            padding has no text.
        attention_mask: (B, T), 1 = real token, 0 = padding; None = all real.
        image_present: (B,) bool, False = the item has no picture; None = all have one.
        view: one of VIEWS, or each item's index in VIEWS, (B,) int64.
        video: whether the pictures are videos, which changes the prompt.
        prompt: "plain" or "chat", see `token_ids`. If None, sequences have no prompt, and only a
            sequence with neither picture nor text has the end token.
        positions: "mrope" (time, row and column of a picture's tokens) or "1d" (the index of each
            token in its sequence).
    """
    has_image, real_text = visible(tokens, input_ids, attention_mask, image_present, view)
    has_text, device = real_text.any(1), input_ids.device
    count, batch = grid[0] * grid[1] * grid[2], len(input_ids)
    kind = torch.where(has_image, (3 if video else 1) + has_text.long(), 0)  # index in KINDS
    start, prompts = start_and_prompts(tokens, prompt)
    prompt_ids, prompt_real = prompt_table(prompts, device)
    markers = [tokens["vision_start"], *[tokens["image"]] * count, tokens["vision_end"]]
    first_ids = torch.tensor([*start, *markers], device=device)
    end = torch.full((batch, 1), tokens["end"], device=device)
    always = end.new_ones(batch, 1, dtype=torch.bool)
    needs_end = ~(has_image | has_text)[:, None] if prompt is None else always
    start_real = always.expand(-1, len(start))
    picture_real = has_image[:, None].expand(-1, count + 2)
    ids = torch.cat([first_ids.expand(batch, -1), input_ids, prompt_ids[kind], end], 1)
    real = torch.cat([start_real, picture_real, real_text, prompt_real[kind], needs_end], 1)

    if positions == "1d":
        indices = (real.long().cumsum(1) - 1) * real
        places = indices.expand(3, -1, -1)
    else:
        first = grid_positions(grid, len(start), device)  # (3, len(start) + count + 2)
        first_word = torch.where(has_image, first[:, -1:] + 1, len(start))[..., None]  # (3, B, 1)
        words = real[:, len(first_ids) :].long().cumsum(1) - 1 + first_word
        places = torch.cat([first[:, None].expand(-1, batch, -1), words], 2) * real
    slot = torch.arange(ids.shape[1], device=device) - len(start) - 1
    # Column len(start) + 1 + k holds picture token k.
    slot = torch.where(real & (slot >= 0) & (slot < count), slot, -1)

    order = real.long().argsort(dim=1, stable=True)  # padding first, then real tokens in order
    real, slot = real.gather(1, order), slot.gather(1, order)
    ids = ids.gather(1, order).masked_fill(~real, tokens["pad"])
    places = places.gather(2, order.expand(3, -1, -1))
    return Sequence(ids, real.long(), places, slot, has_image, has_text)


def check_ids(input_ids: Tensor | None) -> Tensor:
    """Require ids; an item without a text needs a row of padding."""
    if input_ids is None:
        expected = "ids of each item's text, or padding for an item without a text"
        raise ValueError(f"input_ids: got None, expected {expected}")
    return input_ids


def visible(
    tokens: dict[str, Any],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_present: Tensor | None,
    view: View | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return masks of what a view shows: pictures (B,) bool and text tokens (B, T) bool."""
    mask_shape = input_ids.shape if attention_mask is None else attention_mask.shape
    if input_ids.ndim != 2 or mask_shape != input_ids.shape:
        mask = None if attention_mask is None else tuple(mask_shape)
        raise ValueError(
            f"input_ids and attention_mask: got shapes {tuple(input_ids.shape)} and {mask}, "
            "expected the same shape (batch, tokens)"
        )
    check_flags("image_present", image_present, input_ids.shape[:1])
    all_real = torch.ones_like(input_ids, dtype=torch.bool)
    real = all_real if attention_mask is None else attention_mask != 0
    for dropped in tokens["drop"]:
        real = real & (input_ids != dropped)
    image = real.new_ones(len(real)) if image_present is None else image_present
    if isinstance(view, str):
        view = torch.full_like(input_ids[:, 0], VIEWS.index(view))
    return image & (view != VIEWS.index("text")), real & (view != VIEWS.index("image"))[:, None]


def start_and_prompts(
    tokens: dict[str, Any],
    prompt: Prompt | None,
) -> tuple[list[int], list[list[int]]]:
    """Return the ids that sequences start with, and the ids of the prompt of each of KINDS."""
    if prompt is None:
        return [], [[] for _ in KINDS]
    chosen = tokens["chat"] if prompt == "chat" else tokens
    return chosen.get("start", []), [chosen["prompts"][kind] for kind in KINDS]


def prompt_table(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids (kinds, P) of the prompts, padded with 0, and a mask of real ids."""
    longest = max(map(len, prompts))
    ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    real = [[slot < len(prompt) for slot in range(longest)] for prompt in prompts]
    ids_table = torch.tensor(ids, dtype=torch.int64, device=device)
    return ids_table, torch.tensor(real, dtype=torch.bool, device=device)


def grid_positions(
    grid: Grid,
    start: int,
    device: torch.device,
) -> Tensor:
    """Return M-RoPE positions (3, start + n + 2) of what precedes the text.

    These are ``start`` tokens, <|vision_start|>, n picture tokens and <|vision_end|>.
    <|vision_end|> follows the largest position on the three axes, as in the Qwen2-VL paper.
    transformers 5 ignores the time axis here; its result differs only for a video whose grid is
    longer in time than in both rows and columns.
    """
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    inner = start + 1 + torch.stack(axes).flatten(1)
    before = torch.arange(start + 1, device=device).expand(3, -1)
    after = torch.tensor([start + 1 + max(grid)], device=device).expand(3, 1)
    return torch.cat([before, inner, after], 1)


def hidden_states(
    host: Any,
    sequence: Sequence,
    pictures: Tensor,
    **options: Any,
) -> Tensor:
    """Return the language model's last hidden states (B, L, D).

    The tokens of ``pictures`` (B, n, D) fill the picture slots. ``options`` are passed to the
    layers.
    """
    words = embed_ids(host, sequence.input_ids)
    slot = sequence.picture_slot[..., None]
    placed = pictures.to(words.dtype).gather(1, slot.clamp(min=0).expand(-1, -1, words.shape[-1]))
    return host.language_model(
        inputs_embeds=torch.where(slot >= 0, placed, words),
        attention_mask=sequence.attention_mask,
        position_ids=sequence.position_ids,
        use_cache=False,
        **options,
    ).last_hidden_state


def embed_ids(host: Any, input_ids: Tensor) -> Tensor:
    """Return the language model's embeddings (B, L, D) of ids (B, L).

    On CUDA, the embedding of an id out of range is NaN.
    """
    embedding = host.language_model.embed_tokens
    check_range("input_ids", input_ids, embedding.num_embeddings)
    ids, poison = clamp_indices(input_ids, embedding.num_embeddings)
    words = embedding(ids)
    return words + poison[..., None].to(words.dtype)
