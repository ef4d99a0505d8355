"""Product images and texts: datasets, tokenizers, augmentation, batches and pairs."""

from __future__ import annotations

from mmfused.extras import from_extra

with from_extra("models"):
    from .batches import Batches, Collate
    from .folder import ProductFolder, first_side
    from .generated import GeneratedProducts
    from .pairs import PairBatches
    from .pictures import load_picture
    from .swap import SwappedTexts, swap_texts
    from .text import load_tokenizer, train_tokenizer

__all__ = [
    "Batches",
    "Collate",
    "GeneratedProducts",
    "PairBatches",
    "ProductFolder",
    "SwappedTexts",
    "first_side",
    "load_picture",
    "load_tokenizer",
    "swap_texts",
    "train_tokenizer",
]
