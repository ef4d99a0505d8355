"""Tokenizers: trained on the texts at hand, or loaded from a folder or the hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mmfused.json_files import one_line, read_object, read_text

from ._common import check_int

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

MOST_BYTES = 256 << 20  # of tokenizer.json; those of vocabularies of 256,000 tokens have 30 MB
TOKENS = ("bos_token", "eos_token", *SPECIAL)
SETTINGS = {  # what else of tokenizer_config.json is heeded, and of which type
    "model_max_length": (int, float),
    "padding_side": (str,),
    "truncation_side": (str,),
    "clean_up_tokenization_spaces": (bool,),
    "split_special_tokens": (bool,),
    "model_input_names": (list, tuple),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4000, kind: str = "wordpiece"):
    """Trains a lower-casing tokenizer on ``texts`` and returns a ``PreTrainedTokenizerFast``.

    ``kind`` "wordpiece" (BERT's) or "bpe" (byte level, GPT-2's). A text becomes ``[CLS] ...
    [SEP]``; ``[PAD]`` has id 0. The vocabulary can be smaller than ``vocab_size`` where the texts
    hold no more. The same texts give the same tokenizer. ``save_pretrained(folder)`` writes it,
    ``load_tokenizer(folder)`` reads it back."""
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
    # The trainer numbers the inner letters ("##a") in the order of a randomly seeded hash table,
    # and ties between merges go by number. Numbered beforehand, as special tokens of a tokenizer
    # that is then thrown away, they make the vocabulary the same in every run.
    draft = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalize, split = draft.normalizer.normalize_str, draft.pre_tokenizer.pre_tokenize_str
    inner = sorted(
        {letter for text in texts for word, _ in split(normalize(text)) for letter in word[1:]}
    )
    numbered = [*SPECIAL.values(), *("##" + letter for letter in inner)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=numbered, show_progress=False
    )
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


def load_tokenizer(folder_or_hub_name: str | os.PathLike, argument: str = "folder_or_hub_name"):
    """Loads a tokenizer from a local folder, or by its name on the Hugging Face hub.

    Of a folder with tokenizer.json that and the `SETTINGS` of tokenizer_config.json make the
    tokenizer, whatever class or code it names. Code is never loaded. ``argument`` is its name in
    errors. Raises ValueError with one sentence where the folder holds no readable tokenizer, or the
    name is neither a folder nor something the hub (or its local cache, when offline) gives."""
    from transformers import AutoTokenizer

    name = os.fspath(folder_or_hub_name)
    folder = Path(name)
    if not folder.is_dir() and not _could_be_hub_name(name):
        raise ValueError(
            f"{argument} takes a tokenizer folder or a hub name, got {name!r}, which is neither"
        )
    try:
        if (folder / "tokenizer.json").is_file():
            return _read_folder(folder)
        if folder.is_dir():
            _check_vocabulary_folder(folder)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the tokenizers library raises a bare Exception, and its panics are not even one
        what = (
            "a folder without a readable tokenizer"
            if folder.is_dir()
            else "no folder and not to be had from the hub"
        )
        takes = f"{argument} takes a tokenizer folder or a hub name"
        raise ValueError(f"{takes}, got {name!r}: {what} ({one_line(error)})") from error


def _read_folder(folder: Path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json", MOST_BYTES))
    written = _read_settings(folder, "tokenizer_config.json")
    # As transformers does: what earlier versions of it wrote beside the config counts where the
    # config lists no added tokens.
    older = (
        {}
        if "added_tokens_decoder" in written
        else _read_settings(folder, "special_tokens_map.json")
    )
    given = {**_usual_settings(folder, written), **written, **older}
    settings = {key: given[key] for key in SETTINGS if key in given}
    for key, kinds in SETTINGS.items():
        if key in settings and (
            not isinstance(settings[key], kinds)
            or isinstance(settings[key], bool) != (bool in kinds)
        ):
            takes = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key}: got {type(settings[key]).__name__}, expected {takes}")
    if not settings.get("model_max_length", 1) > 0:
        raise ValueError(
            f"model_max_length: got {settings['model_max_length']}, expected a number above 0"
        )
    if not all(isinstance(name, str) for name in settings.get("model_input_names", [])):
        raise ValueError(
            f"model_input_names: got {one_line(settings['model_input_names'])}, expected strings"
        )
    # What tokenizer.json says of a token goes before how the settings describe it.
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for key in TOKENS:
        if given.get(key) is not None:
            settings[key] = _token(key, given[key], known)
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    named = {
        key: token
        for key, token in given.items()
        if key.endswith("_token") and key not in TOKENS and isinstance(token, str)
    }
    named |= _object(given, "model_specific_special_tokens") | (
        extra if isinstance(extra, dict) else {}
    )
    settings["model_specific_special_tokens"] = {
        key: _token(key, token, known) for key, token in named.items()
    }
    if not isinstance(extra, (dict, list)):
        raise ValueError(
            f"extra_special_tokens: got {type(extra).__name__}, expected a list or an object"
        )
    if isinstance(extra, list):
        settings["extra_special_tokens"] = [
            _token("extra_special_tokens", token, known) for token in extra
        ]
    added = _object(given, "added_tokens_decoder")
    settings["added_tokens_decoder"] = {
        int(key): _token("added_tokens_decoder", token, known) for key, token in added.items()
    }
    _decode_word_ends(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def _read_settings(folder: Path, name: str) -> dict:
    return read_object(folder / name, MOST_BYTES) if (folder / name).is_file() else {}


def _object(given: dict, key: str) -> dict:
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: got {type(value).__name__}, expected an object")
    return value


def _usual_settings(folder: Path, written: dict) -> dict:
    """What the class of transformers that the folder names takes where nothing is written: its
    tokens and what it returns.
    """
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    described = _read_settings(folder, "config.json")
    name = written.get("tokenizer_class") or described.get("tokenizer_class")
    if name is None and isinstance(described.get("model_type"), str):
        name = TOKENIZER_MAPPING_NAMES.get(described["model_type"])
        name = name[-1] if isinstance(name, tuple) else name
    if not isinstance(name, str) or not name.removesuffix("Fast").endswith("Tokenizer"):
        return {}
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedTokenizerBase):
        return {}
    parameters = inspect.signature(kind.__init__).parameters
    tokens = {key: parameters[key].default for key in TOKENS if key in parameters}
    usual = {
        key: getattr(kind, key) for key in ("model_input_names", "padding_side", "truncation_side")
    }
    return {
        **usual,
        **{
            key: str(token) for key, token in tokens.items() if isinstance(token, (str, AddedToken))
        },
    }


def _token(key: str, token: object, known: dict[str, AddedToken]) -> AddedToken | str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(
            f"{key}: got {type(token).__name__}, expected a string or an object with its content"
        )
    if content in known or not isinstance(token, dict):
        return known.get(content, content)
    flags = {
        flag: bool(token[flag])
        for flag in ("lstrip", "rstrip", "single_word", "normalized")
        if flag in token
    }
    return AddedToken(content, special=bool(token.get("special", True)), **flags)


def _decode_word_ends(tokenizer: Tokenizer) -> None:
    """CLIP's marks of a word's end are spaces, which its class in transformers sees to, and not its
    tokenizer.json.
    """
    suffix = getattr(tokenizer.model, "end_of_word_suffix", None)
    if suffix and isinstance(tokenizer.decoder, decoders.ByteLevel):
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(suffix, " ")])


def _could_be_hub_name(name: str) -> bool:
    return (
        bool(name)
        and not name.startswith((".", "/", "~"))
        and "\\" not in name
        and name.count("/") <= 1
    )


def _check_vocabulary_folder(folder: Path) -> None:
    """ValueError where a folder that a class of transformers reads names code, or files for that
    class to open.
    """
    for name in (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "config.json",
    ):
        for key in _read_settings(folder, name):
            if key in (
                "auto_map",
                "init_inputs",
                "configuration_files",
                "fast_tokenizer_files",
            ) or key.endswith("_file"):
                raise ValueError(
                    f"{name}: got a field {key!r}, expected none: it names code or files"
                )
