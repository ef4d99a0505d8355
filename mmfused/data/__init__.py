"""Product image-text data: a generated set, any folder with a metadata.csv, tokenizers, augmentation, batches and pairs."""

from __future__ import annotations

from .batches import Batches, Collate
from .folder import ProductFolder
from .generated import GeneratedProducts
from .pairs import PairBatches
from .swap import SwappedTexts, swap_texts
from .text import load_tokenizer, train_tokenizer

__all__ = [
    "Batches",
    "Collate",
    "GeneratedProducts",
    "PairBatches",
    "ProductFolder",
    "SwappedTexts",
    "load_tokenizer",
    "swap_texts",
    "train_tokenizer",
]
