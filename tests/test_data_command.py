"""`mmfused data` prints what a data set holds, and draws a contact sheet."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from published_data import write_mmeb, write_webqa

from mmfused.cli import main
from mmfused.data import contact_sheet, report

PALETTE = {"mugs": (200, 30, 30), "plates": (30, 30, 200), "bowls": (30, 160, 30)}


def encoded(colour, size, kind, **options):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Write 12 rows, of which 9 are usable, with 7 pictures; the body of one is damaged."""
    root = tmp_path_factory.mktemp("shop")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    files = {
        "a.png": encoded(PALETTE["mugs"], (40, 30), "PNG"),
        "b.jpg": encoded(PALETTE["mugs"], (100, 60), "JPEG", exif=exif),
        "copy of a.png": encoded(PALETTE["mugs"], (40, 30), "PNG"),
        "d.png": encoded(PALETTE["plates"], (20, 21), "PNG"),
        "e.png": encoded(PALETTE["plates"], (20, 23), "PNG"),
        "f.png": encoded(PALETTE["bowls"], (11, 13), "PNG"),
        "cut.png": file.getvalue()[:4000],
        "words.jpg": b"no picture",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    rows = [
        ("a.png", "four", "mugs"),
        ("b.jpg", "Šaty čajové", "mugs"),
        ("copy of a.png", "", "mugs"),
        ("", "no picture, only a text", "mugs"),
        ("d.png", "d", "plates"),
        ("lost 1.jpg", "x", "plates"),
        ("lost 2.jpg", "x", "plates"),
        ("e.png", "e" * 3000, "plates"),
        ("cut.png", "damaged", "plates"),
        ("words.jpg", "x", "bowls"),
        ("f.png", "bowl", "bowls"),
        ("f.png", "the same picture", ""),
    ]
    lines = "".join(",".join(f'"{field}"' for field in row) + "\n" for row in rows)
    (root / "metadata.csv").write_text("file_name,text,label\n" + lines, encoding="utf-8")
    return root


def run(*options):
    return main(["data", *map(str, options)])


def reported(tmp_path, *options):
    out = tmp_path / "report.json"
    assert run(*options, "--out", out, "--overwrite") == 0
    return json.loads(out.read_text())


def test_the_report_of_products(shop, tmp_path, capsys):
    found = reported(tmp_path, shop, "--image-size", 100)
    assert (found["kind"], found["format"], found["rows"]) == ("products", "metadata", 12)
    assert found["usable_rows"] == 9
    lost = {group["reason"]: (group["rows"], group["example"]) for group in found["lost"]}
    missing = "the image cannot be read: the file does not exist"
    assert lost[missing] == (2, f"metadata.csv line 7 (lost 1.jpg): {missing}")
    assert list(lost)[0] == missing and sum(rows for rows, _ in lost.values()) == 3
    assert found["classes"] == {
        "count": 3,
        "without_label": 1,
        "most_frequent": [
            {"name": "mugs", "rows": 4},
            {"name": "plates", "rows": 3},
            {"name": "bowls", "rows": 1},
        ],
        "smallest": {"name": "bowls", "rows": 1},
    }
    # Lengths without "": 1, 4, 4, 7, 11, 16, 23, 3000.
    assert found["texts"] == {"empty": 1, "median_length": 9, "longest": 3000}
    pictures = found["pictures"]
    assert (pictures["present"], pictures["without"], pictures["read"]) == (8, 1, 8)
    assert pictures["formats"] == {"PNG": 7, "JPEG": 1} and not pictures["broken"]
    assert pictures["distinct"] == 6  # "copy of a.png", and "f.png" of two rows
    # Upright, b.jpg has 60 x 100 pixels: widths 11, 11, 20, 20, 40, 40, 60, 70.
    assert pictures["width"] == [11, 30, 70] and pictures["height"] == [13, 26, 100]
    sizes = [(shop / name).stat().st_size for name in ("f.png", "cut.png")]
    assert pictures["bytes"][0] <= sizes[0] and pictures["bytes"][2] == sizes[1] == 4000
    assert found["memory"] == {"image_size": 100, "bytes": 9 * 30000, "streamed": False}
    shown = capsys.readouterr().out
    for part in (
        "12, of which 9 are usable",
        "mugs, 4 rows",
        "lost  2 x the image cannot be read",
        "for example metadata.csv line 7 (lost 1.jpg)",
        "263.7 KiB at 100 px; in training, pictures are decoded at the start",
    ):
        assert part in shown


def test_decoding_names_the_broken_pictures(shop, tmp_path, capsys):
    found = reported(tmp_path, shop, "--decode")["pictures"]
    assert found["decoded"] and found["read"] == 8 and found["formats"]["PNG"] == 6
    (broken,) = found["broken"]
    assert broken["rows"] == 1 and broken["example"].startswith("cut.png: ")
    assert "broken  1 x" in capsys.readouterr().out


def test_headers_of_large_sets_are_read_from_a_spread_sample(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HEADERS", 3)
    monkeypatch.setattr(report, "IN_MEMORY", 9 * 3 * 224**2 - 1)
    found = reported(tmp_path, shop)
    assert found["pictures"]["read"] == 3 and found["pictures"]["files"] == 8
    assert sum(found["pictures"]["formats"].values()) == 3
    assert found["memory"]["streamed"]
    shown = capsys.readouterr().out
    assert "3 of 8, evenly spread" in shown and "decoded when needed" in shown
    assert reported(tmp_path, shop, "--decode")["pictures"]["read"] == 8


def test_columns_formats_and_splits_are_passed_on(shop, tmp_path):
    renamed = (shop / "metadata.csv").read_text(encoding="utf-8")
    path = shop / "products.csv"
    path.write_text(renamed.replace("file_name,text,label", "pic,title,class"), encoding="utf-8")
    columns = "image=pic,text=title,label=class"
    found = reported(tmp_path, path, "--columns", columns, "--labels", "name")
    assert found["usable_rows"] == 9 and found["classes"]["count"] == 3
    # No label is an index, so only the row without a label is left.
    found = reported(tmp_path, path, "--columns", columns, "--labels", "index")
    assert found["usable_rows"] == 1 and found["classes"]["smallest"] is None
    header = "item_id,image_id,name,description,category\n"
    for split, rows in (("train", 5), ("test", 2)):
        lines = "".join(f"{row},{row},mug,,{7 + row}\n" for row in range(rows))
        (tmp_path / f"GLAMI-1M-{split}.csv").write_text(header + lines)
    (tmp_path / "images").mkdir()
    for row in range(5):
        (tmp_path / f"images/{row}.jpg").write_bytes(encoded("red", (9, 9), "JPEG"))
    assert reported(tmp_path, tmp_path)["rows"] == 5
    found = reported(tmp_path, tmp_path, "--split", "test", "--format", "glami")
    assert found["rows"] == 2 and found["classes"]["smallest"]["name"] == "8"


def test_the_report_of_pairs(tmp_path, capsys):
    data = write_mmeb(tmp_path / "mmeb")
    found = reported(tmp_path, data)
    assert (found["kind"], found["format"], found["queries"]) == ("pairs", "mmeb", 16)
    assert found["positives"] == [1, 1, 1] and found["negatives"] == [0, 0, 1]
    assert found["tasks"] == [{"name": "train", "rows": 16}]
    kinds = {(kind["query"], kind["candidate"]): kind["pairs"] for kind in found["modalities"]}
    assert kinds == {("image and text", "text"): 8, ("text", "image and text"): 8}
    assert found["pictures"]["files"] == found["pictures"]["distinct"] == 8
    assert found["pictures"]["width"] == [40] * 3 and found["pictures"]["height"] == [32] * 3
    assert "image and text -> text (8)" in capsys.readouterr().out

    data = write_webqa(tmp_path / "webqa")
    (data / "images/3.png").unlink()
    found = reported(tmp_path, data, "--decode")
    assert found["format"] == "webqa" and found["queries"] == 8 and found["candidates"] == 15
    assert {corpus["name"]: corpus["rows"] for corpus in found["corpora"]} == {
        "text": 8,
        "mm_it": 7,
    }
    assert found["lost"] and found["pictures"]["files"] == 7
    assert {task["name"]: task["rows"] for task in found["tasks"]} == {"text": 4, "mm_it": 4}


@pytest.mark.parametrize(
    ("sentences", "reason"),
    [
        (
            [
                "a.csv line 3 (m 1.jpg): label: got 'x', ends",
                "a.csv line 7 (y): label: got '', ends",
            ],
            "label: got …, ends",
        ),
        (["a.tar (no image): cut at byte 72: the rest is lost"], "cut at byte …: the rest is lost"),
        (
            [
                "t.json entry 2: pos: unread: a/b.jpg: gone",
                "t.json entry 5: pos: unread: 7.png: gone",
            ],
            "pos: unread: …: gone",
        ),
        (["12 negatives are also positives: left out"], "… negatives are also positives: left out"),
    ],
)
def test_sentences_are_grouped_by_reason(sentences, reason):
    assert report.describe_lost(sentences) == [
        {"reason": reason, "rows": len(sentences), "example": sentences[0]}
    ]


def cell(sheet, number):
    """Return the colour in the middle of a picture of a sheet."""
    width, height = contact_sheet.CELL
    middle = contact_sheet.GAP + contact_sheet.SIDE // 2
    row, column = divmod(number, contact_sheet.COLUMNS)
    return sheet.getpixel((middle + column * width, middle + row * height))


def test_the_contact_sheet_shows_all_classes(shop, tmp_path):
    path = tmp_path / "sheet.png"
    assert run(shop, "--sheet", path) == 0
    sheet = Image.open(path).convert("RGB")
    grey = contact_sheet.GREY
    # No label; bowls, mugs and plates; the pictures of two rows are missing or damaged.
    expected = [PALETTE["bowls"]] * 2 + [PALETTE["mugs"]] * 3 + [grey] + [PALETTE["plates"]] * 2
    for number, colour in enumerate([*expected, grey]):
        assert np.abs(np.subtract(cell(sheet, number), colour)).max() <= 3, number
    # Below each picture there is a text.
    top = contact_sheet.GAP + contact_sheet.SIDE
    texts = np.asarray(sheet)[top : top + 3 * contact_sheet.LINE]
    assert (texts[:, contact_sheet.GAP : contact_sheet.CELL[0]] < 100).any()
    assert not list(tmp_path.glob(".*"))


def test_the_contact_sheet_of_pairs_has_queries_beside_positives(tmp_path):
    data = write_mmeb(tmp_path / "mmeb")
    pairs = contact_sheet.pair_cells(reported_set(data), 10)
    assert len(pairs) == 10
    for query, positive in zip(pairs[::2], pairs[1::2], strict=True):
        assert query.heading == "query, train" and positive.heading == "positive, train"
        assert (query.image is None) != (positive.image is None)


def reported_set(path):
    from mmfused.data import open_pairs

    return open_pairs(path)


def test_rows_are_spread_evenly_over_groups():
    groups = np.repeat([3, 5, 9], [2, 40, 100])
    rows = contact_sheet.rows_of_groups(groups, 20)
    assert len(rows) == 20 and [int((groups[rows] == g).sum()) for g in (3, 5, 9)] == [2, 9, 9]
    assert rows.tolist() == sorted(set(rows.tolist())) and {0, 1, 2, 41, 42, 141} <= {*rows}
    assert contact_sheet.rows_of_groups(np.arange(100), 5).tolist() == [0, 25, 50, 74, 99]
    thirds = np.repeat([0, 1, 2], 9)
    assert thirds[contact_sheet.rows_of_groups(thirds, 5)].tolist() == [0, 0, 1, 1, 2]
    assert contact_sheet.rows_of_groups([1, 0, 1], 48).tolist() == [1, 0, 2]


def test_texts_are_shortened_to_the_width_of_a_picture():
    font = contact_sheet._font()
    for text in ("word " * 60, "W" * 300, "čšř " * 50, "", "short"):
        lines = contact_sheet._lines(font, text, 2)
        assert len(lines) <= 2
        assert all(font.getlength(line) <= contact_sheet.SIDE for line in lines)
        assert ("…" in "".join(lines)) == (len(text) > 20)
        assert text.replace(" ", "").startswith("".join(lines).replace(" ", "").rstrip("…"))
    assert contact_sheet._lines(font, "short", 2) == ["short"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sheet", "sheet.jpg"], "sheet: got 'sheet.jpg', expected a .png file in an existing"),
        (["--out", "gone/report.json"], "out: got 'gone/report.json', expected a .json file in"),
        (["--out", "report.json"], "out: report.json already exists; choose another name or over"),
        (["--image-size", "0"], "image_size: got 0, expected"),
        (["--columns", "image"], "columns: got 'image', expected NAME=COLUMN,.."),
        (["--format", "xml"], "format: got 'xml', expected"),
        (["--columns", "image=nothing"], "got a header line without nothing"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(shop, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    assert run(shop, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "{}"


def test_overwrite_replaces_files_and_no_folders(shop, tmp_path, capsys):
    out, folder = tmp_path / "report.json", tmp_path / "sheet.png"
    out.write_text("{}")
    folder.mkdir()
    assert run(shop, "--sheet", folder, "--overwrite") == 2
    assert "sheet.png already exists" in capsys.readouterr().err
    assert run(shop, "--out", out, "--overwrite") == 0
    assert json.loads(out.read_text())["rows"] == 12 and folder.is_dir()


def test_a_missing_set_is_one_sentence(tmp_path, capsys):
    assert (
        run(tmp_path / "gone") == 2 and "gone', expected a folder with" in capsys.readouterr().err
    )
    write_mmeb(tmp_path / "mmeb")
    assert run(tmp_path / "mmeb", "--columns", "text=qry") == 2
    assert "columns: got 'text=qry' with" in capsys.readouterr().err
