"""Input validation and encoding, shared by the models.

Raw pixels and token ids are encoded, ready tokens are taken as given; both are checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfused.library import check_value


def one_source(names: str, first: Tensor | None, second: Tensor | None) -> Tensor:
    """Return the one input that is given; ValueError for neither or both."""
    if first is not None and second is None:
        return first
    if second is not None and first is None:
        return second
    got = "neither" if first is None else "both"
    raise ValueError(f"{names}: got {got}, expected exactly one")


def check_tokens(name: str, tokens: Tensor, width: int) -> None:
    """Require tokens (B, N, width)."""
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        got = tuple(tokens.shape)
        raise ValueError(f"{name}: got shape {got}, expected (batch, tokens, {width})")


def check_flags(name: str, flags: Tensor | None, shape: tuple[int, ...]) -> None:
    """Require a bool tensor of this shape, or None."""
    if flags is not None and (flags.dtype != torch.bool or flags.shape != shape):
        got = f"{flags.dtype} {tuple(flags.shape)}"
        raise ValueError(f"{name}: got {got}, expected bool {tuple(shape)}")


def check_labels(labels: Tensor, rows: int) -> None:
    """Require int64 labels (rows,)."""
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        got = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels: got {got}, expected int64 ({rows},)")


def check_attention_mask(mask: Tensor | None, ids_shape: tuple[int, ...]) -> None:
    """Require a mask of the shape of the ids, or None."""
    if mask is not None and mask.shape != ids_shape:
        got, expected = tuple(mask.shape), tuple(ids_shape)
        raise ValueError(
            f"attention_mask: got shape {got}, expected {expected}, the shape of input_ids"
        )


def check_batch(image: int, text: int) -> None:
    """Require equal batch sizes."""
    if image != text:
        raise ValueError(
            f"image and text: got batch sizes {image} and {text}, expected one batch size"
        )


def check_rows(name: str, rows: int, queries: int) -> None:
    """Require a row for each query."""
    if rows != queries:
        raise ValueError(f"{name}: got {rows} rows, expected {queries}, one for each query")


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Require values in [0, limit); checked on the CPU alone, where reading them costs nothing."""
    check_value(
        lambda: ((values >= 0) & (values < limit)).all(),
        f"{name}: got a value out of range, expected values in [0, {limit - 1}]",
    )


def contain(indices: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Clamp indices to [0, limit), and return what to add to the values looked up with them.

    That is 0, or NaN where an index was outside. On CUDA, where :func:`check_range` raises nothing,
    torch's lookup of an index outside would end the context.
    """
    inside = indices.clamp(0, limit - 1)
    return inside, torch.where(inside == indices, 0.0, float("nan"))


def map_tokens(linear: nn.Module, tokens: Tensor, ignore: Tensor | None) -> Tensor:
    """Project tokens to the model's width.

    Ignored ones are zeroed first: NaN in them would reach the weight's gradient.
    """
    if isinstance(linear, nn.Linear) and ignore is not None:
        tokens = tokens.masked_fill(ignore[..., None], 0)
    return linear(tokens)


def encode_image(encoder: Any, pixels: Tensor, present: Tensor | None) -> Tensor:
    """Pixels (B, C, H, W) -> all of the encoder's tokens (B, 1 + patches, image_dim).

    encoder: timm's VisionTransformer, or None for a model without one, which is an error.
    """
    if encoder is None:
        raise ValueError(
            "pixel_values: got pixels, but the config's image is None, expected image_tokens"
        )
    expected = (encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    if tuple(pixels.shape[1:]) != expected:
        got = tuple(pixels.shape)
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"pixel_values: got shape {got}, expected (batch, {sizes})")
    if present is not None:
        pixels = pixels.masked_fill(~present[:, None, None, None], 0)
    return encoder.forward_features(pixels)


def encode_text(encoder: Any, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Ids (B, T) -> last hidden states (B, T, text_dim) of transformers' encoder (None: error).

    An id out of range makes all tokens of its text NaN: they have attended to each other.
    """
    if encoder is None:
        raise ValueError("input_ids: got ids, but the config's text is None, expected text_tokens")
    limit = encoder.config.max_position_embeddings
    if ids.ndim != 2 or ids.shape[1] > limit:
        got = tuple(ids.shape)
        raise ValueError(f"input_ids: got shape {got}, expected (batch, at most {limit} tokens)")
    check_range("input_ids", ids, encoder.config.vocab_size)
    ids, poison = contain(ids, encoder.config.vocab_size)
    tokens = encoder(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    return tokens + poison.to(tokens.dtype).sum(1)[:, None, None]


def read_image(
    encoder: nn.Module | None,
    width: int,
    pixels: Tensor | None,
    tokens: Tensor | None,
    present: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return image tokens (B, N, width), encoded from pixels or as given, and has_image (B,)."""
    source = one_source("pixel_values and image_tokens", pixels, tokens)
    check_flags("image_present", present, source.shape[:1])
    if tokens is None:
        tokens = encode_image(encoder, source, present)
    check_tokens("image_tokens", tokens, width)
    if present is None:
        present = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    return tokens, present


def read_text(
    encoder: nn.Module | None,
    width: int,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    tokens: Tensor | None,
    padding: Tensor | None,
    present: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return text tokens (B, T, width), padding (B, T) and has_text (B,).

    The tokens are encoded from ids, or given. Without `present`, a text is missing where no more
    than two ids are real ([CLS] and [SEP]), or where no given token is.
    """
    source = one_source("input_ids and text_tokens", ids, tokens)
    shape = source.shape[:2]
    if ids is None and attention_mask is not None:
        raise ValueError("attention_mask: got a mask without input_ids, expected text_padding_mask")
    if tokens is None and padding is not None:
        raise ValueError("text_padding_mask: got a mask with input_ids, expected attention_mask")
    check_attention_mask(attention_mask, shape)
    check_flags("text_padding_mask", padding, shape)
    check_flags("text_present", present, shape[:1])
    if tokens is None:
        tokens = encode_text(encoder, source, attention_mask)
        padding = None if attention_mask is None else attention_mask == 0
    check_tokens("text_tokens", tokens, width)
    if padding is None:
        padding = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    if present is None:
        markers = 0 if ids is None else 2
        present = (~padding).sum(1) > markers
    return tokens, padding, present
