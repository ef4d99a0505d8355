"""Small versions of the four retrieval models, and batches of products."""

import pytest
import torch

from mmfused.data import train_tokenizer
from mmfused.models import MODELS, qwen

NAMES = ("uniecs", "unica", "moon2", "unite")
TEXTS = [
    "a red mug of clay",
    "green bowl",
    "wooden spoon, long and thin",
    "blue tea pot",
    "fork",
    "a white plate",
    "knife",
    "jar",
]
BERT = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
}
VIT = {"img_size": 32, "patch_size": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0}
ENCODERS = {"image_dim": 12, "text_dim": 12, "image": VIT, "text": BERT}
LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
HOST = {
    "text_config": LANGUAGE,
    "vision_config": {"depth": 1, "embed_dim": 8, "num_heads": 1, "mlp_ratio": 1},
}
SMALL = {
    "uniecs": {**ENCODERS, "dim": 8, "num_heads": 2, "cross_layers": 1},
    "unica": {**ENCODERS, "num_heads": 2, "ffn": 16, "dropout": 0.0},
    "moon2": {"host": HOST, "num_experts": 3, "image_size": 32},
    # One view per role. With several views, each rank would draw other random views.
    "unite": {
        "host": HOST,
        "image_size": 32,
        "query_views": ("image",),
        "candidate_views": ("both",),
    },
}


def tokenizer_of(name):
    return MODELS[name].config.prepare_tokenizer(train_tokenizer(TEXTS))


def small_model(name, **changes):
    kind = MODELS[name]
    token_fields = kind.config.of_tokenizer(tokenizer_of(name))
    torch.manual_seed(0)
    return kind.model(
        kind.config.preset("tiny", **token_fields, **{**SMALL[name], **changes})
    ).double()


def batch(name, count=6, side=32):
    """Return the items of each role: query, candidate, and negative if the model uses negatives.

    In every role, item 1 has no text, item 2 has no picture, and all labels differ.
    """
    tokenizer, generator = tokenizer_of(name), torch.Generator().manual_seed(1)
    parts = {}
    roles = (
        ("query", "candidate", "negative")
        if MODELS[name].model.takes_negatives
        else ("query", "candidate")
    )
    for place, role in enumerate(roles):
        texts = [TEXTS[(row + 3 * place) % len(TEXTS)] for row in range(count)]
        texts[1] = ""
        ids = tokenizer(
            texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        )
        present = torch.arange(count) != 2
        pixels = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
        parts[role] = {
            "pixel_values": pixels * present[:, None, None, None],
            "image_present": present,
            "input_ids": ids["input_ids"],
            "attention_mask": ids["attention_mask"],
            "labels": torch.arange(count) + (100 if role == "negative" else 0),
        }
    return parts


def device_for(dtype) -> torch.device:
    """Return the GPU if there is one and ``dtype`` is float32, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and dtype == torch.float32 else "cpu")


def rows_of(parts, first, last):
    return {
        role: {name: value[first:last] for name, value in items.items()}
        for role, items in parts.items()
    }


def without_images(parts):
    changed = {role: {**items} for role, items in parts.items()}
    for items in changed.values():
        items["pixel_values"] = torch.zeros_like(items["pixel_values"])
        items["image_present"] = torch.zeros_like(items["image_present"])
    return changed


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_given_tokens(model, parts):
    """Check that ``image_tokens`` give the same loss as ``pixel_values``.

    Also check the errors for tokens of a wrong shape and for missing arguments.
    """
    given = {role: dict(items) for role, items in parts.items()}
    for items in given.values():
        tokens, _ = qwen.picture_tokens(
            model.host, items.pop("pixel_values"), items["image_present"]
        )
        items["image_tokens"] = tokens.detach()
        items["image_tokens"][~items["image_present"]] = float("nan")
    losses = []
    for batches in (parts, given):
        torch.manual_seed(1)
        losses.append(model(**batches).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    items = {name: value for name, value in given["query"].items() if name != "labels"}
    with pytest.raises(ValueError, match=r"image_tokens: got shape .*, expected \(batch, "):
        model.embed(**{**items, "image_tokens": items["image_tokens"][:, 1:]})
    with pytest.raises(ValueError, match="pixel_values and image_tokens: got"):
        model.embed(**{**items, "image_tokens": None})
    with pytest.raises(ValueError, match="input_ids: got None"):
        model.embed(image_tokens=items["image_tokens"], image_present=items["image_present"])
