"""Lengths of texts and their padding, which follow from the config of a text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mmfused.models.encoders import check_text, text_fields
from mmfused.models.fields import Options

# Model types whose texts begin at the position after the id of PAD, which is PAD's own position.
AFTER_PAD = ("camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")


def check_text_encoder(options: Options) -> None:
    """Check options of `build_text`, which must have an id of PAD if positions depend on it."""
    check_text(options)
    if options.get("model_type") in AFTER_PAD:
        check_pad(options)


def longest_text(model_type: str, positions: int, pad: Any) -> int:
    """Return the number of tokens that an encoder with this number of positions reads.

    ``pad`` is the id of PAD in its config, which MPNet does not read: its own is 1.
    """
    if model_type not in AFTER_PAD:
        return positions
    return positions - 1 - (1 if model_type == "mpnet" else pad)


def longest_text_of(encoder: Any) -> int:
    """Return the number of tokens that a text encoder reads."""
    c = encoder.config
    return longest_text(c.model_type, c.max_position_embeddings, c.pad_token_id)


def check_padded_length(options: Options, length: int) -> None:
    """Require an encoder of these options (`build_text`) that reads texts padded to a length.

    Raises:
        ValueError: the encoder has no id of PAD in its vocabulary, or too few positions.
    """
    model_type, pad = options.get("model_type", "bert"), check_pad(options)
    limit = longest_text(model_type, setting(options, "max_position_embeddings"), pad)
    if length > limit:
        expected = f"at most {limit}, the number of tokens that the text encoder reads"
        raise ValueError(f"text_length: got {length}, expected {expected}")


def check_pad(options: Options) -> int:
    """Return the id of PAD of an encoder of these options, which must be in its vocabulary."""
    pad, size = setting(options, "pad_token_id"), setting(options, "vocab_size")
    if pad is None or not 0 <= pad < size:
        expected = f"an id of PAD from 0 to {size - 1}"
        raise ValueError(f"text.pad_token_id: got {pad}, expected {expected}")
    return pad


def setting(options: Options, name: str) -> Any:
    """Return a field of the encoder's config: that of the options, or transformers' default."""
    config, _ = text_fields(options.get("model_type", "bert"))
    return options.get(name, getattr(config, name))


def pad_ids(
    ids: Tensor,
    padding: Tensor,
    length: int,
    pad: int,
) -> tuple[Tensor, Tensor]:
    """Return ids (B, length) and their padding, from ids (B, T) and padding (B, T) bool.

    Longer texts are cut. All padding holds the id ``pad``, so that a text does not depend on the
    texts beside it, nor on the id that the tokenizer pads with.
    """
    more = length - ids.shape[1]
    ids = F.pad(ids.masked_fill(padding, pad), (0, more), value=pad)
    return ids, F.pad(padding, (0, more), value=True)
