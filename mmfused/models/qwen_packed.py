"""Complete sequences with any number of pictures and videos, as transformers' processor packs them.

The pictures of all sequences are rows of one tensor of patches, in the order of the sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfused.models.inputs import check_attention_mask
from mmfused.models.qwen import Positions, check_takes_videos, embed_ids

# The arguments that hold patches, with the arguments that hold their grids.
GRID_OF = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def packed_states(
    host: Any,
    tokens: dict[str, Any],
    positions: Positions,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    **pictures: Tensor | None,
) -> Tensor:
    """Return the language model's last hidden states (B, L, D) of complete sequences.

    Args:
        host: the Qwen2-VL.
        tokens: see `qwen.token_ids`.
        positions: "mrope" (those of transformers) or "1d".
        input_ids: (B, L) int64, padded on either side. A picture of n tokens has n times the id
            tokens["image"], and a video n times tokens["video"].
        attention_mask: (B, L), 1 = real token; None = all real.
        pictures: the arguments in `GRID_OF`: patches (n, 3 * t * p * p) and their grids
            (pictures, 3) int64, as Qwen2VLImageProcessor and Qwen2VLVideoProcessor return them.
    """
    _check(host, input_ids, attention_mask, pictures)
    if pictures.get("pixel_values_videos") is not None:
        check_takes_videos(host)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    slots = slots_of(tokens, input_ids)
    words = embed_ids(host, input_ids)
    for name, slot in slots.items():
        pixels, grid = pictures.get(name), pictures.get(GRID_OF[name])
        if pixels is None or grid is None:
            if input_ids.device.type == "cpu":  # elsewhere, the check would wait for the ids
                _check_count(name, int(slot.sum()), 0)
            continue
        features = host.visual(pixels.to(host.visual.dtype), grid_thw=grid).pooler_output
        _check_count(name, int(slot.sum()), len(features))
        words = words.masked_scatter(slot[..., None], features.to(words.dtype))
    return host.language_model(
        inputs_embeds=words,
        attention_mask=mask,
        position_ids=_position_ids(host, positions, input_ids, mask, slots, pictures),
        use_cache=False,
    ).last_hidden_state


def slots_of(tokens: dict[str, Any], input_ids: Tensor) -> dict[str, Tensor]:
    """Return masks (B, L) of the tokens of pictures and of videos, by the names in `GRID_OF`."""
    image = input_ids == tokens["image"]
    video = tokens.get("video")
    return {
        "pixel_values": image,
        "pixel_values_videos": torch.zeros_like(image) if video is None else input_ids == video,
    }


def split_packed(
    tokens: dict[str, Any],
    merge_size: int,
    items: dict[str, Any],
    size: int,
) -> list[dict[str, Any]]:
    """Split sequences into parts of ``size`` rows, each with the pictures of its rows.

    Args:
        tokens: see `qwen.token_ids`.
        merge_size: the number of patches on a token's side.
        items: arguments of `packed_states`, and other tensors with a row for each sequence.
        size: number of sequences of a part.
    """
    ids = items["input_ids"]
    starts = range(0, max(len(ids), 1), size)
    packed = {*GRID_OF, *GRID_OF.values()}
    parts = [
        {
            name: value if value is None or name in packed else value[start : start + size]
            for name, value in items.items()
        }
        for start in starts
    ]
    for name, slot in slots_of(tokens, ids).items():
        pixels, grid = items.get(name), items.get(GRID_OF[name])
        if pixels is None or grid is None:
            continue
        patches = grid.prod(1)
        # A picture belongs to the row that has its first token.
        first = (patches // merge_size**2).cumsum(0) - patches // merge_size**2
        row = torch.searchsorted(slot.sum(1).cumsum(0), first, right=True)
        for part, start in zip(parts, starts, strict=True):
            chosen = (row >= start) & (row < start + size)
            has_pictures = bool(chosen.any())
            part[GRID_OF[name]] = grid[chosen] if has_pictures else None
            part[name] = pixels[chosen.repeat_interleave(patches)] if has_pictures else None
    return parts


def blank_sequence(
    tokens: dict[str, Any],
    merge_size: int,
    zeros: dict[str, Any],
) -> dict[str, Any]:
    """Turn an item of zeros into a sequence in which each picture and video is one token."""
    ids: list[int] = []
    blank = dict(zeros)
    for name, token in (("pixel_values", "image"), ("pixel_values_videos", "video")):
        pixels, grid = zeros.get(name), zeros.get(GRID_OF[name])
        if pixels is not None and grid is not None:
            ids.append(tokens[token])
            blank[GRID_OF[name]] = grid.new_tensor([[1, merge_size, merge_size]])
            blank[name] = pixels.expand(merge_size**2, -1)
    blank["input_ids"] = zeros["input_ids"].new_tensor([[*ids, tokens["end"]]])
    blank["attention_mask"] = torch.ones_like(blank["input_ids"])
    return blank


def _position_ids(
    host: Any,
    positions: Positions,
    input_ids: Tensor,
    mask: Tensor,
    slots: dict[str, Tensor],
    pictures: dict[str, Tensor | None],
) -> Tensor:
    if positions == "mrope" and any(pictures.get(name) is not None for name in GRID_OF):
        types = slots["pixel_values"].int() + 2 * slots["pixel_values_videos"].int()
        grids = {name: pictures.get(name) for name in GRID_OF.values()}
        return host.get_rope_index(input_ids, types, attention_mask=mask, **grids)[0]
    return ((mask.cumsum(1) - 1) * mask).expand(3, -1, -1)


def _check_patches(
    host: Any,
    name: str,
    pixels: Tensor,
    grid: Tensor,
) -> None:
    """Require a grid for each picture, and the patches of these grids."""
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in (torch.int32, torch.int64):
        got = f"{grid.dtype} {tuple(grid.shape)}"
        raise ValueError(f"{GRID_OF[name]}: got {got}, expected int64 (pictures, 3)")
    c = host.config.vision_config
    expected = (int(grid.prod(1).sum()), c.in_channels * c.temporal_patch_size * c.patch_size**2)
    if tuple(pixels.shape) != expected:
        got = tuple(pixels.shape)
        raise ValueError(f"{name}: got shape {got}, expected {expected}, as in {GRID_OF[name]}")


def _check(
    host: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pictures: dict[str, Tensor | None],
) -> None:
    """Require matching shapes, and a grid for all patches."""
    if input_ids.ndim != 2:
        got = tuple(input_ids.shape)
        raise ValueError(f"input_ids: got shape {got}, expected (batch, tokens)")
    check_attention_mask(attention_mask, tuple(input_ids.shape))
    for name, grid_name in GRID_OF.items():
        pixels, grid = pictures.get(name), pictures.get(grid_name)
        if (pixels is None) != (grid is None):
            given, lacking = (name, grid_name) if grid is None else (grid_name, name)
            raise ValueError(f"{lacking}: got None with {given}, expected both or neither")
        if grid is not None and pixels is not None:
            _check_patches(host, name, pixels, grid)


def _check_count(
    name: str,
    expected: int,
    got: int,
) -> None:
    """Require that the pictures have as many tokens as the sequences have for pictures."""
    if got != expected:
        raise ValueError(
            f"{name}: got pictures of {got} tokens, expected {expected}, "
            "the number of their tokens in input_ids"
        )
