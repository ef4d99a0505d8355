"""Input validation and encoding, shared by the models.

Pixels and token ids are encoded; precomputed tokens are used as they are. All inputs are checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfused.library import check_value
from mmfused.models.text_padding import longest_text_of, pad_ids


def one_source(names: str, first: Tensor | None, second: Tensor | None) -> Tensor:
    """Return the one input that is not None; raise ValueError if both are None, or neither."""
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
            f"image and text: got batch sizes {image} and {text}, expected equal batch sizes"
        )


def check_rows(name: str, rows: int, queries: int) -> None:
    """Require a row for each query."""
    if rows != queries:
        raise ValueError(f"{name}: got {rows} rows, expected {queries}, one for each query")


def check_range(name: str, values: Tensor, limit: int) -> None:
    """On the CPU, require values in [0, limit); see `check_value` for CUDA."""
    check_value(
        values,
        lambda x: ((x >= 0) & (x < limit)).all(),
        f"{name}: got a value out of range, expected values in [0, {limit - 1}]",
    )


def clamp_indices(indices: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the indices clamped to [0, limit), and a tensor to add to the values looked up.

    The tensor is NaN for each index out of range, else 0. On CUDA, :func:`check_range` does not
    raise, and a lookup of an index out of range would end the CUDA context.
    """
    inside = indices.clamp(0, limit - 1)
    return inside, torch.where(inside == indices, 0.0, float("nan"))


def map_tokens(linear: nn.Module, tokens: Tensor, ignore: Tensor | None) -> Tensor:
    """Project tokens to the model's width.

    A Linear layer gets 0 for ignored tokens, because NaN would reach the gradient of the weight.
    """
    if isinstance(linear, nn.Linear) and ignore is not None:
        tokens = tokens.masked_fill(ignore[..., None], 0)
    return linear(tokens)


def encode_image(encoder: Any, pixels: Tensor, present: Tensor | None) -> Tensor:
    """Return all tokens (B, N, image_dim) that the encoder computes from pixels (B, C, H, W).

    ``encoder`` is timm's VisionTransformer or Eva. If it is None, raise ValueError.
    """
    if encoder is None:
        raise ValueError(
            "pixel_values: got pixels with the config's image None, expected image_tokens"
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
    """Return the encoder's last hidden states (B, T, text_dim) of ids (B, T).

    ``encoder`` is a text model of transformers. If it is None, raise ValueError. On CUDA, an id out
    of range makes all tokens of the text NaN.
    """
    if encoder is None:
        raise ValueError("input_ids: got ids with the config's text None, expected text_tokens")
    limit, vocabulary = longest_text_of(encoder), encoder.config.vocab_size
    if ids.ndim != 2 or ids.shape[1] > limit:
        got = tuple(ids.shape)
        raise ValueError(f"input_ids: got shape {got}, expected (batch, at most {limit} tokens)")
    check_range("input_ids", ids, vocabulary)
    ids, poison = clamp_indices(ids, vocabulary)
    tokens = encoder(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    return tokens + poison.to(tokens.dtype).sum(1)[:, None, None]


def read_image(
    encoder: nn.Module | None,
    width: int,
    pixels: Tensor | None,
    tokens: Tensor | None,
    present: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return image tokens (B, N, width), encoded from pixels or given, and has_image (B,)."""
    source = one_source("pixel_values and image_tokens", pixels, tokens)
    check_flags("image_present", present, source.shape[:1])
    if tokens is None:
        tokens = encode_image(encoder, source, present)
    check_tokens("image_tokens", tokens, width)
    if present is None:
        present = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    return tokens, present


def read_text(
    encoder: Any,
    width: int,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    tokens: Tensor | None,
    padding: Tensor | None,
    present: Tensor | None,
    length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return text tokens (B, T, width), padding (B, T) and has_text (B,).

    The tokens are encoded from ids, or given. ``present`` is has_text if it is not None. Otherwise
    has_text is True for more than two real ids ([CLS] and [SEP] are two). If tokens are given, one
    real token is enough. Ids, but not tokens, are cut or padded to ``length`` if it is not None;
    then T is ``length``.
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
    if attention_mask is not None:
        padding = attention_mask == 0
    if padding is None:
        padding = torch.zeros(shape, dtype=torch.bool, device=source.device)
    if present is None:
        markers = 0 if ids is None else 2
        present = (~padding).sum(1) > markers
    if tokens is None:
        if length is not None and encoder is not None:
            source, padding = pad_ids(source, padding, length, encoder.config.pad_token_id)
            attention_mask = (~padding).long()
        tokens = encode_text(encoder, source, attention_mask)
    check_tokens("text_tokens", tokens, width)
    return tokens, padding, present
