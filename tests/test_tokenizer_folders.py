"""Loading a folder gives the tokenizer saved in it, runs no code and opens no other files."""

import json
import os
import pickle

import pytest

transformers = pytest.importorskip("transformers")

from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from watching import Outside, Payload  # noqa: E402

from mmfused.data import load_tokenizer, text, train_tokenizer  # noqa: E402
from mmfused.models import qwen  # noqa: E402

LETTERS = [chr(code) for code in range(33, 127)]
BYTES = sorted(ByteLevel.alphabet())
WORDS = ["red", "wool", "coat", "hello"]
MERGES = [("h", "e"), ("l", "l"), ("l", "o")]
TEXTS = [
    "",
    "Hello world",
    "red Wool coat!",
    "a <mask> b [MASK] c",
    "  spaces   twice ",
    "Ünïcode 東京 éa",
    "hello <|im_start|> there <|endoftext|> x",
    "[CLS] x </s> y",
    "a\nb\tc",
]


def numbered(*tokens):
    return {token: place for place, token in enumerate(tokens)}


def pieces(*special, last=()):
    letters = [(letter, -3.0) for letter in LETTERS]
    return [
        *((token, 0.0) for token in special),
        *letters,
        ("▁", -2.0),
        ("▁red", -1.0),
        *((token, 0.0) for token in last),
    ]


def bert(**options):
    inner = ["##" + letter for letter in LETTERS]
    vocabulary = numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *inner, *WORDS)
    return transformers.BertTokenizerFast(vocab=vocabulary, **options)


def roberta(**options):
    vocabulary = numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES, "he", "ll", "lo")
    return transformers.RobertaTokenizerFast(vocab=vocabulary, merges=MERGES, **options)


def clip():
    ends = [letter + "</w>" for letter in BYTES]
    vocabulary = numbered(*BYTES, *ends, "he", "lo</w>", "<|startoftext|>", "<|endoftext|>")
    return transformers.CLIPTokenizerFast(vocab=vocabulary, merges=[("h", "e"), ("l", "o</w>")])


def qwen2(**options):
    vocabulary = numbered(*BYTES, "he", "ll", "lo", "<|endoftext|>")
    return transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=MERGES, **options)


def xlm_roberta():
    vocabulary = pieces("<s>", "<pad>", "</s>", "<unk>", last=["<mask>"])
    return transformers.XLMRobertaTokenizerFast(vocab=vocabulary)


def deberta():
    vocabulary = numbered("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *BYTES, "he", "ll", "lo")
    return transformers.DebertaTokenizerFast(vocab=vocabulary, merges=MERGES)


def mpnet():
    inner = ["##" + letter for letter in LETTERS]
    vocabulary = numbered(
        "<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>", *LETTERS, *inner, *WORDS
    )
    return transformers.MPNetTokenizerFast(vocab=vocabulary)


KINDS = {
    "wordpiece": lambda: train_tokenizer(["red wool coat", "hello world"], 200),
    "bpe": lambda: train_tokenizer(["red wool coat", "hello world"], 400, "bpe"),
    "bert": bert,
    "bert cased": lambda: bert(do_lower_case=False, tokenize_chinese_chars=False),
    "bert left": lambda: bert(model_max_length=7, truncation_side="left", padding_side="left"),
    "roberta": roberta,
    "roberta with a space": lambda: roberta(add_prefix_space=True),
    "xlm-roberta": xlm_roberta,
    "clip": clip,
    "qwen2": qwen2,
    "qwen2 with more tokens": lambda: qwen2(
        extra_special_tokens=["<|im_start|>"], chat_template="{{ x }}", model_max_length=99
    ),
    "qwen2 for a host": lambda: qwen.add_vision_tokens(qwen.enclose_texts(qwen2())),
    "deberta": deberta,
    "mpnet": mpnet,
    "albert": lambda: transformers.AlbertTokenizerFast(
        vocab=pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
    ),
}
TOKENS = "pad_token cls_token sep_token bos_token eos_token unk_token mask_token".split()


def facts(tokenizer) -> dict:
    found = {name: getattr(tokenizer, f"{name}_id") for name in TOKENS}
    for name in (
        "model_max_length",
        "padding_side",
        "truncation_side",
        "model_input_names",
        "all_special_ids",
    ):
        found[name] = getattr(tokenizer, name)
    found["vocabulary"] = tokenizer.get_vocab()
    for written in TEXTS:
        found[written] = dict(tokenizer(written)), dict(tokenizer(written, "red hello"))
        for skip in (True, False):
            # Stripped, because CLIP's class removes a space at the end.
            found[written, skip] = tokenizer.decode(
                tokenizer(written)["input_ids"], skip_special_tokens=skip
            ).strip()
    found["batch"] = dict(tokenizer(TEXTS, padding=True, truncation=True, max_length=6))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_unchanged(kind, tmp_path):
    tokenizer = KINDS[kind]()
    tokenizer.save_pretrained(tmp_path / "once")
    expected, loaded = facts(tokenizer), load_tokenizer(tmp_path / "once")
    assert (
        facts(loaded)
        == expected
        == facts(transformers.AutoTokenizer.from_pretrained(tmp_path / "once"))
    )
    loaded.save_pretrained(tmp_path / "again")
    assert facts(load_tokenizer(tmp_path / "again")) == expected


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("bert", "bert"),
        ("roberta", "roberta"),
        ("xlm-roberta", "xlm-roberta"),
        ("deberta", "deberta"),
    ],
)
def test_a_folder_without_a_class_gets_the_tokens_of_its_model_type(kind, model_type, tmp_path):
    """Early releases of transformers wrote no class and no tokens to tokenizer_config.json."""
    KINDS[kind]().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert facts(load_tokenizer(tmp_path)) == facts(
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    )
    special = {
        "mask_token": {"content": "<new>", "lstrip": True, "__type": "AddedToken"},
        "additional_special_tokens": ["<more>"],
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = load_tokenizer(tmp_path)
    assert (
        loaded.mask_token == "<new>"
        and len(loaded("x<new><more>", add_special_tokens=False)["input_ids"]) <= 4
    )


def test_a_vocabulary_without_tokenizer_json_is_loaded(tmp_path):
    tokenizer = bert()
    vocabulary = tokenizer.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(tmp_path)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_links_in_the_hubs_cache_are_followed(tmp_path):
    """Snapshots in the hub's cache are folders of links to files elsewhere."""
    bert().save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        os.symlink(path, tmp_path / "snapshot" / path.name)
    assert facts(load_tokenizer(tmp_path / "snapshot")) == facts(bert())


def change(folder, name, **changes):
    values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**values, **changes}))


@pytest.fixture
def outside(tmp_path):
    return Outside(tmp_path / "outside")


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_references_to_code_classes_and_files_are_ignored(folder, outside):
    expected = facts(load_tokenizer(folder))
    (folder / "module.py").write_text(outside.module.read_text())
    named = {
        f"{name}_file": str(outside.file)
        for name in ("vocab", "merges", "tokenizer", "added_tokens", "chat_template")
    }
    change(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["module.Slow", "module.Fast"]},
        **named,
    )
    change(folder, "tokenizer_config.json", tokenizer_class="Mine", init_inputs=[str(outside.file)])
    change(
        folder,
        "tokenizer_config.json",
        chat_template="{{ cycler.__init__.__globals__.os.system('x') }}",
        backend="custom",
    )
    change(folder, "tokenizer_config.json", name_or_path=str(outside.folder))
    change(folder, "config.json", auto_map={"AutoTokenizer": "module.Fast"}, model_type="mine")
    change(folder, "config.json", configuration_files=["config.1.json"])
    (folder / "tokenizer.pkl").write_bytes(outside.pickle.read_bytes())
    with outside.untouched():
        loaded = load_tokenizer(folder)
        found = facts(loaded)
    assert {key: found[key] for key in TOKENS} == {key: expected[key] for key in TOKENS}
    assert loaded(TEXTS)["input_ids"] == [expected[text][0]["input_ids"] for text in TEXTS]
    assert loaded.chat_template is None


SETTINGS = [
    ({"pad_token": 3}, "pad_token: got int, expected a string or an object with a content"),
    ({"pad_token": {"content": ["x"]}}, "pad_token: got dict"),
    ({"padding_side": "up"}, "Padding side"),
    ({"padding_side": 1}, "padding_side: got int, expected str"),
    ({"model_max_length": "long"}, "model_max_length: got str, expected int or float"),
    ({"model_max_length": True}, "model_max_length: got bool, expected int or float"),
    ({"model_max_length": -5}, "model_max_length: got -5, expected a number above 0"),
    (
        {"clean_up_tokenization_spaces": "no"},
        "clean_up_tokenization_spaces: got str, expected bool",
    ),
    ({"model_input_names": "input_ids"}, "model_input_names: got str, expected list"),
    ({"model_input_names": [{}]}, "model_input_names: got "),
    ({"extra_special_tokens": 3}, "extra_special_tokens: got int, expected a list or an object"),
    ({"extra_special_tokens": [3]}, "extra_special_tokens: got int"),
    ({"added_tokens_decoder": {"x": "y"}}, "invalid literal"),
    ({"added_tokens_decoder": [1]}, "added_tokens_decoder: got list, expected an object"),
    (
        {"model_specific_special_tokens": 3},
        "model_specific_special_tokens: got int, expected an object",
    ),
]


@pytest.mark.parametrize(("changes", "match"), SETTINGS, ids=[match for _, match in SETTINGS])
def test_hostile_settings_are_refused(changes, match, folder, outside):
    change(folder, "tokenizer_config.json", **changes)
    outside.refuses(lambda: load_tokenizer(folder), f"folder has no readable tokenizer .*{match}")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a', b"\xff\xfe", b"[]", b"", b'"x"'])
def test_files_without_a_json_object_are_refused(name, content, folder, outside):
    (folder / name).write_bytes(content)
    outside.refuses(lambda: load_tokenizer(folder), "folder has no readable tokenizer")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]},
        {"type": "WordPiece", "vocab": {"a": -1}, "unk_token": "a", "max_input_chars_per_word": 9},
        {"type": "Unigram", "vocab": [], "unk_id": 7},
        {"type": "Pickle", "path": "x"},
        None,
    ],
    ids=["merges", "negative", "unigram", "unknown", "none"],
)
def test_an_invalid_model_in_tokenizer_json_is_refused(model, folder, outside):
    change(folder, "tokenizer.json", model=model)
    outside.refuses(lambda: load_tokenizer(folder), "folder has no readable tokenizer")


def test_a_tokenizer_json_that_is_too_large_is_refused(folder, outside, monkeypatch):
    monkeypatch.setattr(text, "MAX_BYTES", 1000)
    outside.refuses(
        lambda: load_tokenizer(folder),
        "tokenizer.json is larger than 1000 bytes, the largest size that is read",
    )


def test_a_pickled_tokenizer_json_is_refused(folder, outside):
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Payload(outside.marker)))
    outside.refuses(
        lambda: load_tokenizer(folder),
        "tokenizer.json is truncated or corrupt|folder has no readable",
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["module.Slow", None]}}),
        ("tokenizer_config.json", {"vocab_file": "../outside/canary.safetensors"}),
        ("tokenizer_config.json", {"spm_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.../../x.json"]}),
        ("config.json", {"auto_map": {"AutoTokenizer": "module.Fast"}}),
        ("config.json", {"configuration_files": ["config.../../x.json"]}),
        ("special_tokens_map.json", {"auto_map": ["module.Slow", None]}),
    ],
)
def test_code_or_files_named_beside_a_plain_vocabulary_are_refused(name, changes, folder, outside):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(bert().get_vocab()))
    (folder / "module.py").write_text(outside.module.read_text())
    change(folder, name, **changes)
    outside.refuses(
        lambda: load_tokenizer(folder),
        f"{name}: got the field .*, which names code or files",
    )


def test_a_hub_name_is_loaded_without_remote_code(monkeypatch):
    requested = {}

    def load(name, **options):
        requested.update(options, name=name)
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(ValueError, match="not a folder and not available from the hub"):
        load_tokenizer("some/name")
    assert requested == {"name": "some/name", "trust_remote_code": False}
