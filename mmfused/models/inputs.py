"""What every model does with its inputs: check them, encode pixels and ids, bring tokens to the
model's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfused.library import check_value


def one_source(names: str, first: Tensor | None, second: Tensor | None) -> Tensor:
    if (first is None) == (second is None):
        raise ValueError(
            f"give exactly one of {names}, got {'neither' if first is None else 'both'}"
        )
    return second if first is None else first


def check_tokens(name: str, tokens: Tensor, width: int) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise ValueError(f"{name} must have shape (B, tokens, {width}), got {tuple(tokens.shape)}")


def check_flags(name: str, flags: Tensor | None, shape: tuple[int, ...]) -> None:
    if flags is not None and (flags.dtype != torch.bool or flags.shape != shape):
        raise ValueError(
            f"{name} must be bool {tuple(shape)}, got {flags.dtype} {tuple(flags.shape)}"
        )


def check_range(name: str, values: Tensor, limit: int) -> None:
    check_value(
        lambda: ((values >= 0) & (values < limit)).all(), f"{name} must lie in [0, {limit - 1}]"
    )


def contain(indices: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Indices in [0, limit), and what to add to what they look up: 0, or NaN where one was outside.

    On CUDA, where :func:`check_range` raises nothing, torch's lookup of such a one would end the
    context."""
    inside = indices.clamp(0, limit - 1)
    return inside, torch.where(inside == indices, 0.0, float("nan"))


def map_tokens(linear: nn.Module, tokens: Tensor, ignore: Tensor | None) -> Tensor:
    """Tokens at the model's width. Ignored ones are zeroed first: NaN in them would reach the
    weight's gradient.
    """
    if isinstance(linear, nn.Linear) and ignore is not None:
        tokens = tokens.masked_fill(ignore[..., None], 0)
    return linear(tokens)


def encode_image(encoder: nn.Module | None, pixels: Tensor, present: Tensor | None) -> Tensor:
    if encoder is None:
        raise ValueError(
            "pixel_values need an image encoder, but the config's image is None; give image_tokens"
        )
    expected = (encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    if tuple(pixels.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values must have shape (B, C, H, W) with {expected}, got {tuple(pixels.shape)}"
        )
    if present is not None:
        pixels = pixels.masked_fill(~present[:, None, None, None], 0)
    return encoder.forward_features(pixels)  # (B, 1 + patches, image_dim)


def encode_text(encoder: nn.Module | None, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if encoder is None:
        raise ValueError(
            "input_ids need a text encoder, but the config's text is None; give text_tokens"
        )
    limit = encoder.config.max_position_embeddings
    if ids.ndim != 2 or ids.shape[1] > limit:
        raise ValueError(
            f"input_ids must have shape (B, T) with T at most {limit}, got {tuple(ids.shape)}"
        )
    check_range("input_ids", ids, encoder.config.vocab_size)
    ids, poison = contain(ids, encoder.config.vocab_size)
    tokens = encoder(
        input_ids=ids, attention_mask=attention_mask
    ).last_hidden_state  # (B, T, text_dim)
    return tokens + poison.to(tokens.dtype).sum(1)[:, None, None]  # its tokens have read each other


def read_image(encoder, width: int, pixels, tokens, present) -> tuple[Tensor, Tensor]:
    """Image tokens (B, N, width) from pixels or as given, and who has an image (B,) bool."""
    source = one_source("pixel_values and image_tokens", pixels, tokens)
    check_flags("image_present", present, source.shape[:1])
    if tokens is None:
        tokens = encode_image(encoder, pixels, present)
    check_tokens("image_tokens", tokens, width)
    if present is None:
        present = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    return tokens, present


def read_text(
    encoder,
    width: int,
    ids,
    attention_mask,
    tokens,
    padding,
    present,
) -> tuple[Tensor, Tensor, Tensor]:
    """Text tokens (B, T, width) from ids or as given, padded ones (B, T) bool, and who has a text
    (B,) bool.

    Unless `present` says so a text is missing where no more than two ids are real ([CLS] and
    [SEP]), or none of the given tokens."""
    shape = one_source("input_ids and text_tokens", ids, tokens).shape[:2]
    if (ids is None and attention_mask is not None) or (tokens is None and padding is not None):
        raise ValueError(
            "attention_mask goes with input_ids, text_padding_mask with text_tokens; got them crossed"
        )
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be {tuple(shape)} as input_ids, got {tuple(attention_mask.shape)}"
        )
    check_flags("text_padding_mask", padding, shape)
    check_flags("text_present", present, shape[:1])
    if tokens is None:
        tokens = encode_text(encoder, ids, attention_mask)
        padding = None if attention_mask is None else attention_mask == 0
    check_tokens("text_tokens", tokens, width)
    if padding is None:
        padding = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    if present is None:
        present = (~padding).sum(1) > (0 if ids is None else 2)
    return tokens, padding, present
