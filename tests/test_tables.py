"""Rows of CSV, TSV and JSONL files, damaged sources, and how fast rows are read."""

import json
import os
import struct
import subprocess
import sys
import time

import format_folders as folders
import pytest
from format_folders import broken, table_of, texts

from mmfused.data import lines, rows
from mmfused.data.tables import open_table

UNCLOSED = "it has an opening quote without a closing quote"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Parquet is copied to the cache of datasets."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_columns_by_name_and_texts_of_several_columns(tmp_path):
    columns = {"image": "filepath", "text": "title+ description", "label": "class"}
    expected = [("1.jpg", "Red mug", "mugs"), ("2.jpg", "Blue", "mugs"), ("", "of tea", "pots")]
    header = ["class", "description", "title", "filepath"]
    values = [["mugs", " mug ", "Red", "1.jpg"], [" mugs", "", "Blue ", " 2.jpg"]]
    values.append(["pots ", "of tea", "  ", " "])
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        text = "\n".join(delimiter.join(line) for line in [header, *values])
        table = table_of(tmp_path / name, text, columns=columns)
        assert [tuple(row.values()) for row in table.columns.to_pylist()] == expected
        assert table.where(2) == f"{name} line 4" and table.named_labels is None
    text = "\n".join(json.dumps(dict(zip(header, line, strict=True))) for line in values)
    table = table_of(tmp_path / "a.jsonl", "\n" + text, columns=columns)
    assert [tuple(row.values()) for row in table.columns.to_pylist()] == expected
    assert table.where(2) == "a.jsonl line 4"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": "a"}, "columns: got 'picture', expected image, text, label, coarse_label"),
        ({"text": 3}, "columns: got text=3, expected the name of a column"),
        ({"text": "a++b"}, r"columns: got text='a\+\+b', expected names joined by '\+'"),
        ({"text": "", "image": ""}, "columns: got neither image nor text"),
        ({"label": ""}, "columns: got no label, expected the name of a column"),
        ({"text": "title"}, "got a header line without title: file_name, text, label, expected a"),
        ({"coarse_label": "group"}, "without group: .*expected a header line with file_name, text"),
    ],
)
def test_invalid_columns_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        table_of(tmp_path / "a.csv", "file_name,text,label\n", columns=columns)


def test_rows_without_pictures_or_texts_by_choice(tmp_path):
    text = "file_name,text,label\n1.jpg,mug,0\n"
    table = table_of(tmp_path / "a.csv", text, columns={"image": ""})
    assert table.columns.to_pylist() == [{"image": "", "text": "mug", "label": "0"}]
    table = table_of(tmp_path / "a.csv", text, columns={"text": ""})
    assert table.columns.to_pylist() == [{"image": "1.jpg", "text": "", "label": "0"}]


def test_an_unclosed_quote_among_rows_with_names_of_classes(tmp_path):
    for row in range(6):
        (tmp_path / f"{row}.png").touch()
    records = [f"{row}.png,thing {row},mugs" for row in range(6)]
    records[1], records[4] = '1.png,"thing 1,mugs', '4.png,thing 4",mugs'
    table = table_of(tmp_path / "a.csv", "file_name,text,label\n" + "\n".join(records))
    assert broken(table) == {"a.csv line 3": UNCLOSED}
    assert texts(table) == ["thing 0", "thing 2", "thing 3", 'thing 4"', "thing 5"]


def test_a_quoted_text_that_looks_like_rows_but_names_no_pictures(tmp_path):
    (tmp_path / "0.png").touch()
    record = '0.png,"sizes,in\na,b,c\nd,e,f",mugs\n1.png,next,pots'
    table = table_of(tmp_path / "a.csv", "file_name,text,label\n" + record)
    assert not table.broken and texts(table) == ["sizes,in\na,b,c\nd,e,f", "next"]


def test_broken_lines_of_tsv_and_their_numbers(tmp_path):
    text = (
        'file_name\ttext\tlabel\n\ta,b\tx\n\ta\n\n\t"two\nlines"\tx\n\ta\0\tx\n\ta\tb\tx\n\tend\tx'
    )
    table = table_of(tmp_path / "a.tsv", text)
    assert texts(table) == ["a,b", "two\nlines", "end"]
    assert broken(table) == {
        "a.tsv line 3": "it has 2 fields, but the header has 3; it may have an unquoted tab",
        "a.tsv line 7": "it holds a zero byte",
        "a.tsv line 8": "it has 4 fields, but the header has 3; it may have an unquoted tab",
    }
    assert table.where(5) == "a.tsv line 9"


LINES = [
    ('{"file_name": "", "text": "ok 1", "label": 3}', None),
    ("{broken", "it is not JSON: Expecting property name .* at character 2"),
    ("[1, 2]", "it is JSON, but not an object"),
    ('{"file_name": "", "text": "a"}', "it has no field 'label'"),
    ('{"file_name": "x.jpg", "label": 1}', "it has no field 'text'"),
    ('{"file_name": "", "text": 7, "label": 1}', "text: got 7, expected a string"),
    ('{"file_name": ["a"], "text": "a", "label": 1}', "file_name: got a list, expected a string"),
    ('{"file_name": "", "text": "a", "label": null}', "label: got null, expected a string or a n"),
    ('{"file_name": "", "text": "a", "label": {}}', "label: got an object, expected a string"),
    ('{"file_name": "", "text": "a\\ud800", "label": 1}', "zero byte or a lone surrogate"),
    ('{"file_name": "", "text": "a\\u0000", "label": 1}', "zero byte or a lone surrogate"),
    ('{"file_name": "", "text": "a", "text": "b", "label": 1}', "it has the key 'text' twice"),
    ('{"file_name": "", "text": "a", "label": NaN}', "it holds NaN, which is not JSON"),
    ('{"file_name": "", "text": "a", "label": 1e999}', "label: got Infinity, expected a string"),
    ('{"file_name": "", "text": "a", "label": ' + "1" * 5000 + "}", "a number of 5000 digits"),
    ("[" * 100_000, "it is nested too deeply|not JSON"),
    (
        '{"file_name": "", "text": "a\xff", "label": 1}'.encode("latin-1"),
        "bytes that are not UTF-8",
    ),
    ('{"file_name": "", "text": "a\0", "label": 1}', "it holds a zero byte"),
    ('{"file_name": "", "text": null, "label": true}', None),
    ('{"file_name": null, "text": " 5€ ", "label": 2.5, "extra": NaN}', "it holds NaN"),
    ('{"file_name": null, "text": " 5\\u20ac ", "label": "x"}', None),
]


def test_each_broken_line_of_jsonl_is_named(tmp_path):
    written = [line if isinstance(line, bytes) else line.encode() for line, _ in LINES]
    table = table_of(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(written))
    assert texts(table) == ["ok 1", "", "5€"] and len(table.columns) == len(LINES)
    labels = table.columns["label"].to_pylist()
    assert [label for row, label in enumerate(labels) if row not in table.broken] == [
        "3",
        "true",
        "x",
    ]
    for row, (_, reason) in enumerate(LINES):
        assert (reason is None) == (row not in table.broken)
        if reason is not None:
            with pytest.raises(ValueError, match=reason):
                raise ValueError(table.broken[row])
        assert table.where(row) == f"a.jsonl line {row + 1}"
    assert table.columns["image"][4].as_py() == "x.jpg"


def test_a_column_that_no_line_of_jsonl_has(tmp_path):
    text = '{"a": 1, "text": "x"}\n{"text": "y", "label": 1}\n'
    with pytest.raises(
        ValueError, match="a.jsonl: got no column file_name, only a, text, label, e"
    ):
        table_of(tmp_path / "a.jsonl", text)
    assert len(table_of(tmp_path / "a.jsonl", "").columns) == 0
    table = table_of(tmp_path / "a.jsonl", "no\n")
    assert len(table.columns) == 1 and len(table.broken) == 1


def test_coarse_labels_of_jsonl(tmp_path):
    fields = {"file_name": "", "text": "a", "label": 1}
    text = "\n".join(map(json.dumps, [fields, {**fields, "coarse_label": 4}]))
    table = table_of(tmp_path / "a.jsonl", text)
    assert table.columns["coarse_label"].to_pylist() == ["", "4"]
    assert table.broken == {0: "it has no field 'coarse_label'"}
    table = table_of(tmp_path / "a.jsonl", json.dumps(fields))
    assert table.columns.column_names == ["image", "text", "label"] and not table.broken


def test_a_line_that_is_too_long_costs_its_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    for end in ("\n", "\r\n"):
        for length in (80, 98, 99, 100, 101, 250, 1000):
            text = end.join(["file_name,text,label", f',"{"x" * length}",0', ",ok,1"])
            table = table_of(tmp_path / "a.csv", text)
            assert texts(table)[-1:] == ["ok"] and table.where(1) == "a.csv line 3"
            long = length + 5 + len(end) > 99 + len(end)
            assert (
                list(table.broken.values())
                == ["it has a line of more than 100 characters"] * (length > 95)
                or not long
            )


def test_a_field_that_is_too_long_and_faults_of_quoted_rows(tmp_path):
    records = [b"," + b"x" * 200_000 + b",0", b',"a, \xff",0', b',"a, \0",0', b',"a, b",0']
    records += [b"\xff.jpg,a,0"]
    table = table_of(tmp_path / "a.csv", b"file_name,text,label\n" + b"\n".join(records))
    assert texts(table) == ["a, b"] and broken(table) == {
        "a.csv line 2": "it cannot be read: field larger than field limit (131072)",
        "a.csv line 3": "it holds bytes that are not UTF-8",
        "a.csv line 4": "it holds a zero byte",
        "a.csv line 6": "it holds bytes that are not UTF-8",
    }
    assert table.columns["image"][4].as_py() == "?.jpg"


def test_a_long_line_within_a_quoted_text(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    text = f'file_name,text,label\n,"a\n{"x" * 200}\nb",0\n,ok,1\n'
    table = table_of(tmp_path / "a.csv", text)
    # The rest of the long line is lost, and the quote is still closed.
    assert list(broken(table)) == ["a.csv line 2"] and texts(table) == ["ok"]
    assert table.where(1) == "a.csv line 5"


def test_rows_are_kept_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ROWS", 7)
    records = [f",thing {row},{row}" if row % 5 else f",thing {row}" for row in range(100)]
    table = table_of(tmp_path / "a.csv", "file_name,text,label\n" + "\n".join(records))
    assert table.columns["text"].num_chunks > 10 and list(table.broken) == list(range(0, 100, 5))
    assert texts(table) == [f"thing {row}" for row in range(100) if row % 5]
    monkeypatch.setattr(rows, "CHUNK_ROWS", 1000)
    monkeypatch.setattr(rows, "CHUNK_LETTERS", 30)
    assert open_table(tmp_path / "a.csv").columns["text"].num_chunks > 10


def test_damaged_folders_of_datasets_are_one_sentence(tmp_path):
    products = folders.make_products(6)

    def refused(name, change, message):
        root = tmp_path / name
        (folders.write_arrow if name[0] == "a" else folders.write_parquet)(root, products)
        change(root)
        with pytest.raises(ValueError, match=message) as caught:
            open_table(root)
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)

    refused("a1", lambda root: (root / "state.json").unlink(), "a1: datasets cannot read it")
    refused("a2", lambda root: (root / "dataset_info.json").write_text("{"), "a2: datasets cannot")
    shard = "data-00001-of-00002.arrow"
    refused("a3", lambda root: (root / shard).unlink(), "a3: datasets cannot read it")
    refused("a4", lambda root: os.truncate(root / shard, 300), "a4: datasets cannot read it")
    refused("a5", lambda root: (root / "dataset_dict.json").write_text("["), "is truncated or corr")
    refused("a6", lambda root: (root / "dataset_dict.json").write_text("{}"), "split: got 'train'")
    part = "train-00001-of-00002.parquet"
    refused(
        "p1",
        lambda root: (root / part).write_bytes(b"no parquet"),
        "p1.train-00001-of-00002.parquet: dat",
    )
    refused("p2", lambda root: os.truncate(root / part, 0), "p2.train-00001-of-00002.parquet: dat")
    other = folders.dataset_of(products).rename_column("text", "title")
    refused(
        "p3",
        lambda root: other.to_parquet(str(root / part)),
        "got the columns image, title, label, expected those of train-00000-of",
    )


def test_damaged_offsets_and_the_numbers_of_rows_in_later_shards(tmp_path):
    products = [folders.Product(None, "", text, "1") for text in ("mug", "plate", "a", "b", "\0")]
    folders.write_arrow(tmp_path, products)
    table = open_table(tmp_path)
    assert table.columns["text"].num_chunks == 2 and table.broken == {4: "it holds a zero byte"}
    path = tmp_path / "data-00000-of-00002.arrow"
    data = path.read_bytes()
    offsets = struct.pack("<4i", 0, 3, 8, 9)
    assert data.count(offsets) == 1
    # Reading the text of a row would read other memory.
    path.write_bytes(data.replace(offsets, struct.pack("<4i", 0, 2**30, 8, 9)))
    with pytest.raises(
        ValueError, match="datasets cannot read it .*expected rows that can be read"
    ):
        open_table(tmp_path)


def test_columns_of_other_types_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    good = {"image": ["a"], "text": ["a"], "label": [1]}
    for name, value, expected in (
        ("image", [["a"]], "expected bytes, names of files, or structs"),
        ("image", [{"x": 1}], "expected bytes, names of files, or structs"),
        ("text", [3], "got column text of int64, expected strings"),
        ("label", [[1]], "got column label of list<.*>, expected strings, integers, floats"),
        ("label", [{"a": 1}], "got column label of struct"),
    ):
        table = pyarrow.table({**good, name: [*value]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=expected):
            open_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table(good), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="got no column title, only image, text, label, expected"):
        open_table(tmp_path / "a.parquet", columns={"text": "title"})


def test_datasets_is_imported_only_where_it_reads(tmp_path):
    folders.write_csv(tmp_path / "a", folders.make_products(2))
    folders.write_arrow(tmp_path / "b", folders.make_products(2))
    code = (
        "import sys\n"
        "from mmfused.data.tables import open_table\n"
        "assert not {'pyarrow', 'datasets'} & sys.modules.keys()\n"
        "open_table(sys.argv[1])\n"
        "assert 'datasets' not in sys.modules\n"
        "sys.modules['datasets'] = None\n"
        "open_table(sys.argv[2])\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.stderr.rstrip().endswith("not installed: pip install datasets")


def test_many_rows_take_seconds(tmp_path):
    count = 50_000
    begun = time.monotonic()
    records = "\n".join(f'{row}.jpg,"mug, {row}",{row}' for row in range(count))
    table = table_of(tmp_path / "a.csv", "file_name,text,label\n" + records)
    assert table.columns["label"].to_pylist()[-1] == str(count - 1) and not table.broken
    fields = {"file_name": "", "text": "mug", "label": 1}
    table = table_of(tmp_path / "a.jsonl", (json.dumps(fields) + "\n") * count)
    assert len(table.columns) == count and not table.broken
    assert time.monotonic() - begun < 15
