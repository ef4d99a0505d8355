"""Train tokenizers, and load tokenizers from a folder or the Hugging Face hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

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

# Largest accepted size of a tokenizer's files. For 256,000 tokens, tokenizer.json has about 30 MB.
MAX_BYTES = 256 << 20
TOKENS = ("bos_token", "eos_token", *SPECIAL)
# The settings in tokenizer_config.json that are used besides special tokens, and their types.
SETTINGS: dict[str, tuple[type, ...]] = {
    "model_max_length": (int, float),
    "padding_side": (str,),
    "truncation_side": (str,),
    "clean_up_tokenization_spaces": (bool,),
    "split_special_tokens": (bool,),
    "model_input_names": (list, tuple),
}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 4000,
    kind: Literal["wordpiece", "bpe"] = "wordpiece",
) -> Any:
    """Train a lower-casing tokenizer on ``texts`` and return a ``PreTrainedTokenizerFast``.

    A text is encoded as ``[CLS] ... [SEP]``, and ``[PAD]`` has id 0. The same texts always give the
    same tokenizer. Save it with ``save_pretrained(folder)``, and load it with
    ``load_tokenizer(folder)``.

    Args:
        texts: the texts; empty texts are ignored.
        vocab_size: largest size of the vocabulary, unless single letters need more. Few texts give
            a smaller vocabulary.
        kind: "wordpiece" as in BERT, or "bpe" (byte-level) as in GPT-2.

    Raises:
        TypeError: ``texts`` is a string.
        ValueError: an argument is out of range, or all texts are empty.

    Examples:
        >>> from mmfused.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["Red mug", "Blue mug", "Red plate"], vocab_size=100)
        >>> tokenizer.tokenize("A RED mug")
        ['a', 'red', 'mug']
        >>> batch = tokenizer(["red mug", ""], padding=True)
        >>> batch["attention_mask"]  # an empty text is [CLS] [SEP]
        [[1, 1, 1, 1], [1, 1, 0, 0]]
    """
    from transformers import PreTrainedTokenizerFast

    if kind not in ("wordpiece", "bpe"):
        raise ValueError(f"kind: got {kind!r}, expected 'wordpiece' or 'bpe'")
    check_int("vocab_size", vocab_size, len(SPECIAL) + 1)
    if isinstance(texts, str):
        raise TypeError("texts: got a string, expected a list of strings")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts: got no non-empty text, expected at least one")
    tokenizer = _wordpiece(texts, vocab_size) if kind == "wordpiece" else _bpe(texts, vocab_size)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _wordpiece(texts: list[str], vocab_size: int) -> Tokenizer:
    # The trainer numbers inner letters ("##a") in random order, and the numbers break ties between
    # merges. To always get the same vocabulary, a temporary tokenizer has the inner letters as
    # special tokens, which are numbered in the given order.
    temporary = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalize, split = temporary.normalizer.normalize_str, temporary.pre_tokenizer.pre_tokenize_str
    inner = sorted(
        {letter for text in texts for word, _ in split(normalize(text)) for letter in word[1:]}
    )
    special_tokens = [*SPECIAL.values(), *("##" + letter for letter in inner)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False
    )
    temporary.train_from_iterator(texts, trainer)
    return _bert_tokenizer(models.WordPiece(vocab=temporary.get_vocab(), unk_token="[UNK]"))


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


def load_tokenizer(
    folder_or_hub_name: str | os.PathLike[str],
    argument: str = "folder_or_hub_name",
) -> Any:
    """Load a tokenizer from a local folder, or by its name on the Hugging Face hub.

    If a folder has a tokenizer.json, the tokenizer consists of that file, and of the `SETTINGS` and
    special tokens in tokenizer_config.json. Code to which the files refer is never loaded.

    Args:
        folder_or_hub_name: a folder, or a name on the hub.
        argument: name of the argument in error messages.

    Returns:
        A tokenizer of transformers.

    Raises:
        ValueError: the folder has no readable tokenizer, or the name is neither a folder nor
            available from the hub or its local cache.

    Examples:
        >>> import tempfile
        >>> from mmfused.data import load_tokenizer, train_tokenizer
        >>> tokenizer = train_tokenizer(["Red mug", "Blue plate"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = tokenizer.save_pretrained(folder)
        ...     loaded = load_tokenizer(folder)
        >>> loaded("red plate")["input_ids"] == tokenizer("red plate")["input_ids"]
        True
    """
    from transformers import AutoTokenizer

    name = os.fspath(folder_or_hub_name)
    folder = Path(name)
    if not folder.is_dir() and not _could_be_hub_name(name):
        raise ValueError(f"{argument}: got {name!r}, expected a tokenizer folder or a hub name")
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = _read_folder(folder)
        else:
            if folder.is_dir():
                _check_vocabulary_folder(folder)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The tokenizers library raises Exception, or BaseException if its Rust code panics.
    except BaseException as error:
        reason = "the folder has no readable tokenizer"
        if not folder.is_dir():
            reason = "it is not a folder and not available from the hub"
        raise ValueError(
            f"{argument}: got {name!r}, expected a tokenizer folder or a hub name: "
            f"{reason} ({one_line(error)})"
        ) from error
    # From a config.json alone, transformers makes a tokenizer that knows no word.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{argument}: got {name!r}, expected a tokenizer folder or a hub name: "
            "it has a tokenizer without words"
        )
    return tokenizer


def _read_folder(folder: Path) -> Any:
    """Return the tokenizer of a folder with tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json", MAX_BYTES))
    written = _read_settings(folder, "tokenizer_config.json")
    # If tokenizer_config.json lists no added tokens, an earlier version of transformers wrote the
    # folder, with the special tokens in special_tokens_map.json.
    older: dict[str, Any] = {}
    if "added_tokens_decoder" not in written:
        older = _read_settings(folder, "special_tokens_map.json")
    given = {**_default_settings(folder, written), **written, **older}
    settings = {key: given[key] for key in SETTINGS if key in given}
    _check_types(settings)
    # The properties of a token in tokenizer.json override its properties in the settings.
    file_tokens = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for key in TOKENS:
        if given.get(key) is not None:
            settings[key] = _token(key, given[key], file_tokens)
    settings |= _extra_tokens(given, file_tokens)
    added = _object(given, "added_tokens_decoder")
    settings["added_tokens_decoder"] = {
        int(key): _token("added_tokens_decoder", token, file_tokens) for key, token in added.items()
    }
    _decode_word_ends(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def _check_types(settings: dict[str, Any]) -> None:
    for key, kinds in SETTINGS.items():
        if key in settings and (
            not isinstance(settings[key], kinds)
            or isinstance(settings[key], bool) != (bool in kinds)
        ):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key}: got {type(settings[key]).__name__}, expected {expected}")
    if not settings.get("model_max_length", 1) > 0:
        raise ValueError(
            f"model_max_length: got {settings['model_max_length']}, expected a number above 0"
        )
    if not all(isinstance(name, str) for name in settings.get("model_input_names", [])):
        raise ValueError(
            f"model_input_names: got {one_line(settings['model_input_names'])}, expected strings"
        )


def _extra_tokens(given: dict[str, Any], file_tokens: dict[str, AddedToken]) -> dict[str, Any]:
    """Return the settings of the special tokens that are not in ``TOKENS``."""
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    named = {
        key: token
        for key, token in given.items()
        if key.endswith("_token") and key not in TOKENS and isinstance(token, str)
    }
    named |= _object(given, "model_specific_special_tokens") | (
        extra if isinstance(extra, dict) else {}
    )
    settings: dict[str, Any] = {
        "model_specific_special_tokens": {
            key: _token(key, token, file_tokens) for key, token in named.items()
        }
    }
    if not isinstance(extra, (dict, list)):
        raise ValueError(
            f"extra_special_tokens: got {type(extra).__name__}, expected a list or an object"
        )
    if isinstance(extra, list):
        settings["extra_special_tokens"] = [
            _token("extra_special_tokens", token, file_tokens) for token in extra
        ]
    return settings


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder / name, MAX_BYTES) if (folder / name).is_file() else {}


def _object(given: dict[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: got {type(value).__name__}, expected an object")
    return value


def _default_settings(folder: Path, written: dict[str, Any]) -> dict[str, Any]:
    """Return the default settings of the transformers class that the folder names."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    config = _read_settings(folder, "config.json")
    name = written.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None and isinstance(config.get("model_type"), str):
        name = TOKENIZER_MAPPING_NAMES.get(config["model_type"])
        name = name[-1] if isinstance(name, tuple) else name
    if not isinstance(name, str) or not name.removesuffix("Fast").endswith("Tokenizer"):
        return {}
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedTokenizerBase):
        return {}
    parameters = inspect.signature(kind.__init__).parameters
    tokens = {key: parameters[key].default for key in TOKENS if key in parameters}
    names = ("model_input_names", "padding_side", "truncation_side")
    defaults = {key: getattr(kind, key) for key in names}
    for key, token in tokens.items():
        if isinstance(token, (str, AddedToken)):
            defaults[key] = str(token)
    return defaults


def _token(key: str, token: object, file_tokens: dict[str, AddedToken]) -> AddedToken | str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(
            f"{key}: got {type(token).__name__}, expected a string or an object with a content"
        )
    if content in file_tokens or not isinstance(token, dict):
        return file_tokens.get(content, content)
    flags = {
        flag: bool(token[flag])
        for flag in ("lstrip", "rstrip", "single_word", "normalized")
        if flag in token
    }
    return AddedToken(content, special=bool(token.get("special", True)), **flags)


def _decode_word_ends(tokenizer: Tokenizer) -> None:
    """Make the tokenizer decode CLIP's word ends as spaces; tokenizer.json lacks this rule."""
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
    """Raise ValueError if the settings of a folder refer to code or to other files."""
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
                    f"{name}: got the field {key!r}, which names code or files, "
                    "expected a tokenizer without code"
                )
