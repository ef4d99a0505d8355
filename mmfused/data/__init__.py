"""Product images and texts: datasets, tokenizers, augmentation, batches and pairs."""

from __future__ import annotations

from mmfused.extras import from_extra

with from_extra("models"):
    from .batches import Batches, Collate
    from .folder import ProductFolder, first_side
    from .formats import check_format, find_format
    from .generated import GeneratedProducts
    from .pair_batches import PairSetBatches
    from .pair_formats import open_pairs
    from .pair_sets import PairSet
    from .pairs import PairBatches
    from .pictures import load_picture
    from .swap import SwappedTexts, swap_texts
    from .tables import open_table
    from .text import load_tokenizer, train_tokenizer

__all__ = [
    "Batches",
    "Collate",
    "GeneratedProducts",
    "PairBatches",
    "PairSet",
    "PairSetBatches",
    "ProductFolder",
    "SwappedTexts",
    "check_format",
    "find_format",
    "first_side",
    "load_picture",
    "load_tokenizer",
    "open_pairs",
    "open_table",
    "swap_texts",
    "train_tokenizer",
]
