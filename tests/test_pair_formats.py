"""Sets of pairs in the formats in which they are published, intact and broken."""

import json
import re

import pytest
from pair_folders import mmeb_row, picture, text_set, texts_of, write

from mmfused.data import json_rows
from mmfused.data.pair_formats import PAIR_FORMATS, detect_pair_format, open_pairs


def read(pairs):
    """Return the task, query, positives and negatives of each query, as texts and file names."""

    def item(row):
        return (pairs.items.texts[row], *pairs.items.files_of(row))

    return [
        (pairs.task_names[task], item(query), *(sorted(map(item, x)) for x in (positives, others)))
        for task, query, positives, others in zip(
            pairs.tasks, pairs.queries.tolist(), pairs.positives, pairs.negatives, strict=True
        )
    ]


def test_mmeb_rows_with_strings_and_lists(tmp_path):
    for number in range(4):
        picture(tmp_path / f"images/{number}.png", number)
    a, b, c, d = (f"images/{number}.png" for number in range(4))
    rows = [
        mmeb_row("<|image_1|>\nq", "p", "n", (a, "", b)),
        mmeb_row("two", ["x", "y"], ["", "z"], ([a, b], [c, ""], ["", d])),
        mmeb_row("found", "", "", ("", [a, b], [c, d])),
        mmeb_row("caption", "of two", None, (None, [a, b], None)),
        {"qry": "short", "pos_text": "row"},
    ]
    pairs = open_pairs(write(tmp_path / "vqa.json", rows))
    assert not pairs.skipped
    assert read(pairs) == [
        ("vqa", ("q", a), [("p",)], [("n", b)]),
        ("vqa", ("two", a, b), [("x", c), ("y",)], [("z", d)]),
        ("vqa", ("found",), [("", a), ("", b)], [("", c), ("", d)]),
        ("vqa", ("caption",), [("of two", a, b)], []),
        ("vqa", ("short",), [("row",)], []),
    ]
    lines = open_pairs(write(tmp_path / "vqa.jsonl", rows))
    assert read(lines) == read(pairs) and lines.digest == pairs.digest


def test_parquet_is_read_like_json(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    picture(tmp_path / "images/VQA/0.png")
    rows = [mmeb_row(f"q{i}", f"p{i}", "", ("images/VQA/0.png", "", "")) for i in range(5)]
    (tmp_path / "VQA").mkdir()
    for part in (0, 1):
        table = pyarrow.Table.from_pylist(rows[3 * part : 3 * part + 3])
        parquet.write_table(table, tmp_path / f"VQA/original-0000{part}-of-00002.parquet")
        name = f"VQA/diverse_instruction-0000{part}-of-00002.parquet"
        parquet.write_table(table.slice(0, 1), tmp_path / name)
    pairs = open_pairs(tmp_path)
    assert detect_pair_format(tmp_path) == "mmeb" and pairs.task_names == ["VQA"]
    assert texts_of(pairs, pairs.queries) == [f"q{i}" for i in range(5)] and not pairs.skipped
    path = tmp_path / "VQA/original-00000-of-00002.parquet"
    assert len(open_pairs(path, root=tmp_path)) == 3
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"\.parquet is not a readable Parquet file: "):
        open_pairs(path, "mmeb")
    pairs = open_pairs(tmp_path)
    assert len(pairs) == 2 and len(pairs.skipped) == 1
    start = f"VQA/original-00000-of-00002.parquet: {path} is not a readable Parquet file: "
    assert pairs.skipped[0].startswith(start)


def test_unreadable_files_of_a_folder_are_named(tmp_path):
    folder = text_set(tmp_path / "set", {"b": [("q", "1")]})
    write(folder / "a.json", [{"qry": "broken"}, mmeb_row("r", "2")])
    (folder / "c.json").write_text("[]", encoding="utf-16")
    (folder / "d.json").touch()
    (folder / "other.json").write_text('{"a": 1}')
    write(tmp_path / "outside.json", [mmeb_row("s", "3")])
    (folder / "e.json").symlink_to(tmp_path / "outside.json")
    pairs = open_pairs(folder)
    assert texts_of(pairs, pairs.queries) == ["r", "q"]
    assert pairs.skipped == [
        f"c.json: {folder / 'c.json'}: got UTF-16, expected UTF-8: save it as UTF-8",
        f"d.json: {folder / 'd.json'}: got no JSON list and no JSON object in its first line",
        "e.json: it leads outside the folder",
        "other.json: its rows are of another format, without qry, pos_text",
        "a.json entry 1: it has no pos_text",
    ]


def test_folders_of_tasks_and_splits(tmp_path):
    picture(tmp_path / "images/0.png")
    picture(tmp_path / "inner/images/1.png")
    text_set(tmp_path, {"a": [("q", "1")], "test-b": [("q", "2")]})
    rows = [mmeb_row("q", "", "", ("", f"images/{number}.png", "")) for number in (0, 1)]
    write(tmp_path / "inner/rows.jsonl", rows)
    pairs = open_pairs(tmp_path)
    assert read(pairs) == [
        ("a", ("q",), [("1",)], []),
        ("inner", ("q",), [("", "images/0.png"), ("", "inner/images/1.png")], []),
    ]
    assert read(open_pairs(tmp_path, split="test")) == [("test-b", ("q",), [("2",)], [])]
    (tmp_path / "test-b.json").unlink()
    assert len(open_pairs(tmp_path, split="test")) == 2


def test_shards_are_one_task_and_pictures_of_the_folder_come_first(tmp_path):
    for folder in (tmp_path, tmp_path / "inner"):
        picture(folder / "0.png")
    for part in (0, 1):
        row = mmeb_row(f"q{part}", "", "", ("", "0.png", ""))
        write(tmp_path / f"vqa-0000{part}-of-00002.jsonl", [row])
    write(tmp_path / "inner/rows.json", [mmeb_row("r", "", "", ("", "0.png", ""))])
    assert read(open_pairs(tmp_path)) == [
        ("vqa", ("q0",), [("", "0.png")], []),
        ("vqa", ("q1",), [("", "0.png")], []),
        ("inner", ("r",), [("", "0.png")], []),
    ]


def test_unite_rows(tmp_path):
    for number in range(2):
        picture(tmp_path / f"images/{number}.png", number)
    a, b = "images/0.png", "images/1.png"
    rows = [
        {
            "query": {"text": "<|IMAGE|>\nred", "image": {"type": "image", "image": a}},
            "candidate": {"image": [b]},
            "negative": {"text": "n"},
            "target_modal": "image, text",
            "instruction": "Find",
        },
        {
            "query": {"text": "x"},
            "candidate": [{"text": "p"}, {"text": "v", "video": "v.mp4"}, {"image": "lost.png"}],
            "negative": [{"text": "n"}, {"image": b}],
        },
        {"query": {"text": "v", "video": ["v.mp4"]}, "candidate": {"text": "p"}},
        {"query": {"text": "x"}, "candidate": {"text": "p"}, "target_modal": "sound"},
        {"query": {"text": 3}, "candidate": {"text": "p"}},
        {"query": {}, "candidate": {"text": "p"}},
        {"query": {"text": "x"}, "candidate": {}},
        {"query": "x", "candidate": {"text": "p"}},
        {"query": {"text": "x"}},
    ]
    pairs = open_pairs(write(tmp_path / "unite.json", rows))
    assert read(pairs) == [
        ("unite", ("Find\nred", a), [("", b)], [("n",)]),
        ("unite", ("x",), [("p",)], [("", b), ("n",)]),
    ]
    assert pairs.targets.tolist() == [3, 0]
    assert pairs.skipped == [
        "unite.json entry 2: candidate: it has a video, which cannot be read",
        "unite.json entry 2: candidate: the image cannot be read: lost.png: "
        "the file does not exist",
        "unite.json entry 3: query: it has a video, which cannot be read",
        "unite.json entry 4: target_modal: got 'sound', expected some of text, image, video",
        "unite.json entry 5: query: text: got 3, expected a string",
        "unite.json entry 6: query: got {}, expected one object",
        "unite.json entry 7: candidate: it is empty",
        "unite.json entry 8: query: got 'x', expected an object",
        "unite.json entry 9: it has no candidate",
    ]


def webqa(folder):
    for number in range(3):
        picture(folder / f"images/{number}.jpg", number)
    write(folder / "text_corpus.jsonl", [{"content": f"snippet {i}"} for i in range(3)])
    images = ["0.jpg", "1.jpg", 2]
    found = [{"content": f"mm{i}", "image": x, "caption": f"c{i}"} for i, x in enumerate(images)]
    write(folder / "mm_it_corpus.jsonl", [*found, {"content": "mm3", "image": "lost.jpg"}])
    rows = [
        {"q_text": "a", "positive": ["mm0", "mm2", "mm9"], "type": "mm_it"},
        {"q_text": "b", "positive": "snippet 1", "negative": ["mm1"], "type": "text"},
        {"q_text": "c", "positive": ["mm3"], "type": "mm_it"},
        {"q_text": "", "positive": ["mm1"], "type": "mm_it"},
        {"q_text": "d", "type": "mm_it"},
        {"q_text": "e", "q_image": "1.jpg", "positive": ["mm1"]},
    ]
    write(folder / "val_query.jsonl", rows)
    return folder


def test_webqa(tmp_path):
    pairs = open_pairs(webqa(tmp_path))
    assert detect_pair_format(tmp_path) == "webqa"
    assert read(pairs) == [
        ("mm_it", ("a",), [("c0", "0.jpg"), ("c2", "2.jpg")], []),
        ("text", ("b",), [("snippet 1",)], [("c1", "1.jpg")]),
        ("all", ("e", "1.jpg"), [("c1", "1.jpg")], []),
    ]
    assert pairs.corpus_names == ["text", "mm_it"] and pairs.task_corpora == [[0, 1]] * 3
    assert pairs.corpora.tolist() == [0, 0, 0, 1, 1, 1]
    expected = ["snippet 0", "snippet 1", "snippet 2", "c0", "c1", "c2"]
    assert texts_of(pairs, pairs.candidates) == expected
    assert pairs.skipped == [
        "mm_it_corpus.jsonl line 4: item: the image cannot be read: lost.jpg: "
        "the file does not exist",
        "val_query.jsonl line 1: positive: got 'mm9', which no corpus has",
        "val_query.jsonl line 3: positive: got 'mm3', which no corpus has",
        "val_query.jsonl line 3: it has no positive in a corpus",
        "val_query.jsonl line 4: query: it has neither a text nor an image",
        "val_query.jsonl line 5: got {'q_text': 'd', 'type': 'mm_it'}, "
        "expected an object with positive",
    ]
    assert read(open_pairs(tmp_path, split="test")) == read(pairs)
    write(tmp_path / "train_query.jsonl", [{"q_text": "t", "positive": ["mm0"], "type": "mm_it"}])
    assert len(open_pairs(tmp_path)) == 1 and len(open_pairs(tmp_path, split="test")) == 3
    write(tmp_path / "text_corpus.jsonl", [{"content": "twice"}, {"content": "twice"}])
    again = "text_corpus.jsonl line 2: content: got 'twice' again, expected different ones"
    assert open_pairs(tmp_path).skipped[0] == again


def test_mbeer(tmp_path):
    for number in range(3):
        picture(tmp_path / f"images/{number}.png", number)

    def row(first, second, images, **other):
        keys = ("item_id_1", "item_title_1", "item_image_1")
        values = zip(keys, (first, f"t{first}", images[0]), strict=True)
        found = {**dict(values), "item_id_2": second, "item_title_2": f"t{second}", "tag": 1}
        return {**found, "item_image_2": images[1], **other}

    absolute = str(tmp_path / "images/1.png")
    rows = [
        row(7, 8, ["/data/authors/0.png", absolute]),
        row(8, 9, [absolute, ""]),
        row(8, 7, ["images/1.png", ""], item_title_1="other"),
        row(1, 2, ["/etc/hostname", ""]),
        row("", 2, ["", ""]),
    ]
    pairs = open_pairs(write(tmp_path / "train.jsonl", rows))
    assert read(pairs) == [
        ("train", ("t7", "images/0.png"), [("t8", absolute)], []),
        ("train", ("t8", absolute), [("t9",)], []),
        ("train", ("other", "images/1.png"), [("t7",)], []),
    ]
    names = [pairs.items.texts[row] for row in range(len(pairs.items))]
    products = {name: [] for name in pairs.products.tolist()}
    for product, name in zip(pairs.products.tolist(), names, strict=True):
        products[product].append(name)
    assert sorted(products.values()) == [["t7", "t7"], ["t8", "other"], ["t9"]]
    assert pairs.skipped == [
        "train.jsonl line 4: item 1: the image cannot be read: /etc/hostname: "
        "it leads outside the folder",
        "train.jsonl line 5: item_id_1: got '', expected a number or a string",
    ]


def test_mixtures(tmp_path):
    text_set(tmp_path / "one", {"a": [("q", "1")], "b": [("q", "2"), ("r", "")]})
    text_set(tmp_path / "two/one", {"a": [("q", "3")]})
    picture(webqa(tmp_path / "webqa") / "images/0.jpg", 9)
    sources = [
        {"data": "one"},
        {"data": "two/one/a.json", "format": "mmeb", "weight": 2},
        {"data": "two/one", "weight": 0.5},
        {"data": "webqa"},
    ]
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"sources": sources}))
    pairs = open_pairs(path)
    names = ["one/a", "one/b", "a/a", "one.2/a", "webqa/mm_it", "webqa/text", "webqa/all"]
    assert detect_pair_format(path) == "mixture" and pairs.task_names == names
    assert pairs.weights.tolist() == [1, 1, 2, 0.5, 1, 1, 1]
    assert pairs.skipped[0] == "one/b.json entry 2: pos: it is empty"
    corpora = dict(zip(texts_of(pairs, pairs.candidates), pairs.corpora.tolist(), strict=True))
    assert pairs.items.files.roots == [
        tmp_path / "one",
        tmp_path / "two/one",
        tmp_path / "two/one",
        tmp_path / "webqa/images",
    ]
    searched = [[pairs.corpus_names[corpus] for corpus in x] for x in pairs.task_corpora]
    assert searched == [*([name] for name in names[:4]), *[["webqa/text", "webqa/mm_it"]] * 3]
    found = {text: pairs.corpus_names[corpus] for text, corpus in corpora.items()}
    assert found.items() >= {"1": "one/a", "2": "one/b", "c0": "webqa/mm_it"}.items()
    assert len(pairs.candidates) == 4 + 6


def test_sources_have_pictures_of_their_own(tmp_path):
    for name in ("one", "two"):
        row = mmeb_row(f"q {name}", "", "", ("", "0.png", ""))
        write(tmp_path / name / "a.json", [mmeb_row("q", "p"), row])
    picture(tmp_path / "two/0.png")
    sources = [{"data": "one"}, {"data": "two"}]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    pairs = open_pairs(tmp_path / "mixture.json")
    assert texts_of(pairs, pairs.queries) == ["q", "q", "q two"]
    lost = "pos: the image cannot be read: 0.png: the file does not exist"
    assert pairs.skipped == [f"one/a.json entry 2: {lost}"]
    assert pairs.items.load_image(int(pairs.positives[2][0]), 4).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r'expected an object \{"sources": \[...\]\} with a source'),
        (["one"], r"sources\[0\]: got 'one', expected an object with data"),
        ([{"data": "one", "wieght": 1}], r"sources\[0\]: got 'wieght', expected data, format, we"),
        ([{"data": "one", "weight": 0}], r"sources\[0\].weight: got 0, expected a number above 0"),
        ([{"data": "one", "weight": True}], r"weight: got True, expected a number above 0"),
        ([{"data": "lost"}], r"sources\[0\]: .*lost does not exist"),
        ([{"data": "none"}], r"sources\[0\]: .* holds no pairs in a known format"),
        ([{"data": "one", "format": "mixture"}], r"sources\[0\]: got another mixture"),
        ([{"data": "empty"}], r"sources\[0\]: .*empty has no usable pair"),
        ([{"data": "one", "format": "glami"}], r"format: got 'glami', expected 'webqa' or 'mmeb'"),
    ],
)
def test_broken_mixtures(tmp_path, sources, message):
    text_set(tmp_path / "one", {"a": [("q", "1")]})
    text_set(tmp_path / "empty", {"a": [("q", "")]})
    (tmp_path / "none").mkdir()
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"sources": sources}))
    with pytest.raises(ValueError, match=message):
        open_pairs(path, "mixture")


GOOD = json.dumps(mmeb_row("q", "p"))


@pytest.mark.parametrize("chunk", [3, 40, 2**22])
@pytest.mark.parametrize(
    ("text", "found", "skipped"),
    [
        (f"[{GOOD}, {GOOD}]", 2, []),
        (f"[{GOOD}", 1, ["after entry 1: the file is cut, so"]),
        (f"[{GOOD}, ", 1, ["entry 2: the file is cut, so the rest of the list is not read"]),
        (f"[{GOOD}, {GOOD[:30]}", 1, ["entry 2: the file is cut in it, so"]),
        (f"[{GOOD} {GOOD}]", 1, ["after entry 1: a comma is missing, so"]),
        (f"[{GOOD}, {{'q': 1}}, {GOOD}, {GOOD}]", 1, ["entry 2: it is not valid JSON: Expecting"]),
        (f"[{GOOD}, 123456, null, {GOOD}]", 2, ["entry 2: got 123456, ", "entry 3: got None, "]),
        (f"[{GOOD}, {'[' * 9000}]", 1, ["entry 2: "]),
        (f"{GOOD}\n\n{GOOD}\r\n", 2, []),
        (f"{GOOD}\n{GOOD[:-3]}\n[]\n{GOOD}", 2, ["line 2: it is not valid JSON", "line 3: got []"]),
        (f"\ufeff[{GOOD}]", 1, []),
    ],
)
def test_broken_json(tmp_path, monkeypatch, chunk, text, found, skipped):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    if chunk == 3 and "[[" in text:
        return  # many thousand reads
    rows = list(json_rows.json_rows(path))
    assert sum(isinstance(row, dict) for _, row in rows) == found
    pairs = open_pairs(path, "mmeb")
    assert len(pairs.skipped) == len(skipped)
    for sentence, start in zip(pairs.skipped, skipped, strict=True):
        assert sentence.startswith(f"rows.json {start}")


@pytest.mark.parametrize("chunk", [1, 2, 5, 2**22])
def test_parts_of_a_list_may_end_anywhere(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    values = [
        123456,
        True,
        None,
        -1.5e-3,
        'a\\"\u00e9\n',
        {"k": [1, {}]},
        False,
        [None, True] * 20,
        "",
        7,
        [],
    ]
    path = tmp_path / "rows.json"
    for spaces in range(20):
        path.write_text(" " * spaces + json.dumps(values * 3, indent=1))
        assert [value for _, value in json_rows.json_rows(path)] == values * 3


def test_rows_of_other_encodings_are_named(tmp_path):
    text = json.dumps([mmeb_row("q", "p"), mmeb_row("caf\xe9", "p")], ensure_ascii=False)
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    assert open_pairs(path).skipped == [
        "rows.json entry 2: qry: its text holds bytes that are not UTF-8"
    ]
    path.write_text(json.dumps([mmeb_row("q", "p"), mmeb_row("\ud800", "p")]))
    assert open_pairs(path).skipped == ["rows.json entry 2: qry: its text holds a lone surrogate"]
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"rows.json: got UTF-16, expected UTF-8: save it as UTF"):
        open_pairs(path, "mmeb")


def test_long_entries_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ENTRY", 200)
    monkeypatch.setattr(json_rows, "CHUNK", 50)
    long = mmeb_row("q" * 500, "p")
    pairs = open_pairs(write(tmp_path / "a.jsonl", [mmeb_row("a", "p"), long, mmeb_row("b", "p")]))
    assert texts_of(pairs, pairs.queries) == ["a", "b"]
    assert pairs.skipped == ["a.jsonl line 2: it has more than 200 characters"]
    pairs = open_pairs(write(tmp_path / "b.json", [mmeb_row("a", "p"), long]))
    assert len(pairs) == 1
    assert re.match(r"b.json entry 2: it is not valid JSON: it has more than", pairs.skipped[0])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"qry": "q"}, "it has no pos_text"),
        (mmeb_row(3, "p"), "qry: got 3, expected a string"),
        (mmeb_row("q", ["p", 3]), "pos_text: got ['p', 3], expected a string or a list of strings"),
        (mmeb_row("", "p"), "qry: it has neither a text nor an image"),
        (mmeb_row("<|image_1|>", "p"), "qry: it has neither a text nor an image"),
        (mmeb_row("q", ""), "pos: it is empty"),
        (mmeb_row("q", "p", images=(3, "", "")), "qry_image_path: got 3, expected a string or a"),
        (
            mmeb_row("q", ["a", "b"], images=("", ["x"], "")),
            "pos_image_path: got 1 pictures, expected 2, as in pos_text",
        ),
        (
            mmeb_row("q", "p", "n", ("", "", "lost.png")),
            "neg: the image cannot be read: lost.png: the file does not exist",
        ),
    ],
)
def test_broken_rows_are_named(tmp_path, row, sentence):
    pairs = open_pairs(write(tmp_path / "rows.json", [mmeb_row("good", "p"), row]), "mmeb")
    assert len(pairs.skipped) == 1
    assert pairs.skipped[0].startswith(f"rows.json entry 2: {sentence}")
    # Without its negative, a pair can still be used.
    assert len(pairs) == 1 + sentence.startswith("neg")


def test_what_holds_no_pairs(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n,a,0\n")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "empty.json").touch()
    assert detect_pair_format(tmp_path) is None
    assert [detect_pair_format(tmp_path / name) for name in ("other.json", "empty.json")] == [
        None
    ] * 2
    with pytest.raises(
        ValueError, match="holds no pairs in a known format .webqa, mmeb, unite, mb"
    ):
        open_pairs(tmp_path)
    for name in PAIR_FORMATS:
        with pytest.raises(ValueError, match="expected|has no|holds no|no usable|got no"):
            open_pairs(tmp_path, name)
        with pytest.raises(ValueError, match="expected|has no|holds no|no usable|got no"):
            open_pairs(tmp_path / "empty.json", name)
    with pytest.raises(FileNotFoundError, match="lost does not exist"):
        open_pairs(tmp_path / "lost")
    with pytest.raises(FileNotFoundError, match="lost does not exist"):
        open_pairs(tmp_path / "lost", "mmeb")
    with pytest.raises(ValueError, match="^split: got 'val', expected 'train' or 'test'"):
        open_pairs(tmp_path, "mmeb", "val")
    with pytest.raises(ValueError, match="^root: got 'lost', expected a folder"):
        open_pairs(tmp_path, "mmeb", root="lost")
    with pytest.raises(ValueError, match="has no usable pair; the first row: rows.json entry 1: "):
        open_pairs(write(tmp_path / "rows.json", [mmeb_row("", "")]))
