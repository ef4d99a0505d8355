"""Tokenizers: trained on the texts at hand, or loaded from a folder or the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ._common import check_int

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4000, kind: str = "wordpiece"):
    """Trains a lower-casing tokenizer on ``texts`` and returns a ``PreTrainedTokenizerFast``.

    ``kind`` "wordpiece" (BERT's) or "bpe" (byte level, GPT-2's). A text becomes ``[CLS] ... [SEP]``; ``[PAD]`` has
    id 0. The vocabulary can be smaller than ``vocab_size`` where the texts hold no more. The same texts give the same
    tokenizer. ``save_pretrained(folder)`` writes it, ``load_tokenizer(folder)`` reads it back.
    """
    from transformers import PreTrainedTokenizerFast

    if kind not in ("wordpiece", "bpe"):
        raise ValueError(f"kind takes 'wordpiece' or 'bpe', got {kind!r}")
    check_int("vocab_size", vocab_size, len(SPECIAL) + 1)
    if isinstance(texts, str):
        raise TypeError("texts takes a list of strings, got one string")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts takes at least one text that is not empty, got none")
    tokenizer = _wordpiece(texts, vocab_size) if kind == "wordpiece" else _bpe(texts, vocab_size)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _wordpiece(texts: list[str], vocab_size: int) -> Tokenizer:
    # The trainer numbers the inner letters ("##a") in the order of a randomly seeded hash table, and ties between
    # merges go by number. Numbered beforehand, as special tokens of a tokenizer that is then thrown away, they make
    # the vocabulary the same in every run.
    draft = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalize, split = draft.normalizer.normalize_str, draft.pre_tokenizer.pre_tokenize_str
    inner = sorted({letter for text in texts for word, _ in split(normalize(text)) for letter in word[1:]})
    numbered = [*SPECIAL.values(), *("##" + letter for letter in inner)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=numbered, show_progress=False)
    draft.train_from_iterator(texts, trainer)
    return _bert_tokenizer(models.WordPiece(vocab=draft.get_vocab(), unk_token="[UNK]"))


def _bert_tokenizer(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(folder_or_hub_name: str | os.PathLike):
    """Loads a tokenizer from a local folder, or by its name on the Hugging Face hub.

    Raises ValueError with one sentence where the folder holds no readable tokenizer, or the name is neither a folder
    nor something the hub (or its local cache, when offline) gives.
    """
    from transformers import AutoTokenizer

    name = os.fspath(folder_or_hub_name)
    is_folder = Path(name).is_dir()
    if not is_folder and not _could_be_hub_name(name):
        raise ValueError(f"folder_or_hub_name takes a tokenizer folder or a hub name, got {name!r}, which is neither")
    try:
        if is_folder:
            _check_tokenizer_json(Path(name))
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = "a folder without a readable tokenizer" if is_folder else "no folder and not to be had from the hub"
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"folder_or_hub_name takes a tokenizer folder or a hub name, got {name!r}: {what} ({reason})") from error


def _could_be_hub_name(name: str) -> bool:
    return bool(name) and not name.startswith((".", "/", "~")) and "\\" not in name and name.count("/") <= 1


def _check_tokenizer_json(folder: Path) -> None:
    """The tokenizers library raises a bare Exception for a file cut short; this finds it first, as ValueError."""
    path = folder / "tokenizer.json"
    if path.is_file():
        json.loads(path.read_text(encoding="utf-8"))
