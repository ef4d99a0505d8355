"""Every row of a metadata.csv is read, or reported with its line number."""

import time

import numpy as np
import pytest
from PIL import Image

from mmfused.data import ProductFolder, open_table

HEADER = "file_name,text,label\n"


def rows_of(tmp_path, text, encoding="utf-8"):
    data = text if isinstance(text, bytes) else (HEADER + text).encode(encoding)
    (tmp_path / "metadata.csv").write_bytes(data)
    return list(read_rows(tmp_path))


def read_rows(folder):
    """Yield the line of each row, its fields, and the reason if it is broken."""
    table = open_table(folder)
    columns = [table.columns[name].to_pylist() for name in ("image", "text", "label")]
    for row, fields in enumerate(zip(*columns, strict=True)):
        yield int(table.where(row).rpartition(" ")[2]), fields, table.broken.get(row)


def good(rows):
    return [(line, *fields) for line, fields, reason in rows if reason is None]


def broken(rows):
    return {line: reason for line, _, reason in rows if reason is not None}


def test_an_unclosed_quote_breaks_only_its_own_row(tmp_path):
    lines = [f"{i}.png,thing {i},{i}" for i in range(900)]
    lines[1] = '1.png,"thing 1,1'
    rows = rows_of(tmp_path, "\n".join(lines) + "\n")
    assert len(rows) == 900 and broken(rows) == {
        3: "it has an opening quote without a closing quote"
    }
    assert good(rows)[1] == (4, "2.png", "thing 2", "2") and good(rows)[-1][0] == 901


@pytest.mark.parametrize(
    "closing",
    [
        '5.png,"mug, red",5',  # closes the quote in the middle of a field, which is malformed
        '5.png,mug 5",5',  # closes the quote at the end of a field: four lines form a valid row
        ',mug 5",5',
    ],
)
def test_an_unclosed_quote_breaks_only_its_own_row_if_a_later_quote_closes_it(tmp_path, closing):
    lines = [f"{i}.png,thing {i},{i}" for i in range(8)]
    lines[2], lines[5] = '2.png,"thing 2,2', closing
    rows = rows_of(tmp_path, "\n".join(lines))
    assert broken(rows) == {4: "it has an opening quote without a closing quote"}
    assert [row[0] for row in good(rows)] == [2, 3, 5, 6, 7, 8, 9] and good(rows)[4][2].startswith(
        "mug"
    )


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines, one text",
        "one\n\n\nfour",
        "a list:\n- 1, red\n- 2, blue",
        "numbers\n1,2\n3,4,5,6",
        "prices, in\n3,50 or 4,50",
        'he said ""red""\nand left',
        "carriage\r\nreturns\r\nin it",
    ],
)
def test_a_quoted_text_may_have_several_lines(tmp_path, text):
    rows = rows_of(tmp_path, f'0.png,"{text}",0\n1.png,next,1\n')
    assert (
        broken(rows) == {}
        and good(rows)[0][2] == text.replace('""', '"')
        and good(rows)[1][1:] == ("1.png", "next", "1")
    )


@pytest.mark.parametrize(
    ("columns", "record", "text"),
    [
        ("text,label,file_name", '"specs:\nwidth,5,\nend",0,0.png', "specs:\nwidth,5,\nend"),
        ("file_name,text,label", '0.png,"specs:\n,,5\nend",0', "specs:\n,,5\nend"),
        (
            "file_name,text,label",
            '0.png,"line 1\nsee 1.png,now,2\nend",0',
            "line 1\nsee 1.png,now,2\nend",
        ),
    ],
)
def test_a_line_of_a_text_may_look_like_a_row(tmp_path, columns, record, text):
    (tmp_path / "0.png").touch()
    (tmp_path / "metadata.csv").write_text(f"{columns}\n{record}\n")
    assert list(read_rows(tmp_path)) == [(2, ("0.png", text, "0"), None)]


def test_lines_that_start_with_existing_pictures_are_rows_even_inside_an_open_quote(tmp_path):
    for row in range(5):
        (tmp_path / f"{row}.png").touch()
    rows = rows_of(tmp_path, '0.png,"open,0\n1.png,a,1\nodd line\n3.png,closing 5",3\n4.png,b,4\n')
    assert broken(rows)[2] == "it has an opening quote without a closing quote" and [
        row[1] for row in good(rows)
    ] == [
        "1.png",
        "3.png",
        "4.png",
    ]


def test_spaces_in_the_header_and_empty_lines_before_it_are_ignored(tmp_path):
    (tmp_path / "metadata.csv").write_text("\n\nfile_name, text, label\n,a mug,3\n")
    assert ProductFolder(tmp_path).texts == ["a mug"]


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "metadata.csv", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        ValueError, match="metadata.csv: got 1099511627776 bytes, expected at most 68719476736"
    ):
        ProductFolder(tmp_path)


def test_quotes_within_a_text_are_kept(tmp_path):
    rows = rows_of(tmp_path, '0.png,a 5" mug,0\n1.png,"a ""red"" mug",1\n2.png,"a" mug,2\n')
    assert broken(rows) == {} and [row[2] for row in good(rows)] == [
        'a 5" mug',
        'a "red" mug',
        "a mug",
    ]


def test_rows_that_are_not_utf8_are_reported_and_the_others_read(tmp_path):
    content = (
        HEADER.encode()
        + "0.png,crème,0\n".encode()
        + "1.png,crème,1\n".encode("latin-1")
        + "2.png,Käse,2".encode()
    )
    rows = rows_of(tmp_path, content)
    assert broken(rows) == {3: "it holds bytes that are not UTF-8"}
    assert [row[2] for row in good(rows)] == ["crème", "Käse"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_line_endings_are_read_and_empty_lines_skipped(tmp_path, end):
    content = end.join(["\ufefffile_name,text,label", "0.png,a\u2028b\x0bc,0", "", "1.png,d,1"])
    rows = rows_of(tmp_path, content.encode())
    assert broken(rows) == {} and [row[:3] for row in good(rows)] == [
        (2, "0.png", "a\u2028b\x0bc"),
        (4, "1.png", "d"),
    ]


def test_zero_bytes_and_wrong_numbers_of_fields_are_reported(tmp_path):
    rows = rows_of(tmp_path, "0.png,a\0b,0\n1.png,a,b,1\n2.png,a\n3.png,a,3\n")
    assert broken(rows) == {
        2: "it holds a zero byte",
        3: "it has 4 fields, but the header has 3; it may have an unquoted comma",
        4: "it has 2 fields, but the header has 3; it may have an unquoted comma",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text,label,text\n0.png,a,0,b\n", "got column text twice"),
        (b"file_name,text,label,label\n", "got column label twice"),
        (
            b"file_name,coarse_label,text,label,coarse_label\n",
            "got column coarse_label twice",
        ),
        ("file_name,text,label\n".encode("utf-16"), "got UTF-16, expected UTF-8"),
        (b"name,text,label\n", "got a header line without file_name: name, text, label"),
        (b'"file_name,text,label\n0.png,a,0\n', "got a header line that cannot be read"),
        # Python 3.10 refuses a NUL in CSV itself.
        (b"\xff\x00\xfe\n", "got a header line .*file_name, text, label"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ProductFolder(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_an_ignored_column_may_occur_twice(tmp_path):
    (tmp_path / "metadata.csv").write_text("note,file_name,text,label,note\nx,,a mug,3,y\n")
    assert ProductFolder(tmp_path).texts == ["a mug"]


def test_all_skipped_rows_are_listed_in_order(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    rows = [
        '0.png,"open,0',
        "0.png,ok,1",
        "gone.png,a,1",
        "0.png,a",
        "0.png,a,-3",
        "../0.png,a,1",
        "0.png,ok,2",
    ]
    (tmp_path / "metadata.csv").write_text(HEADER + "\n".join(rows))
    data = ProductFolder(tmp_path, image_size=4)
    assert data.labels == [1, 2] and [sentence.split(":")[0] for sentence in data.skipped] == [
        "metadata.csv line 2 (0.png)",
        "metadata.csv line 4 (gone.png)",
        "metadata.csv line 5 (0.png)",
        "metadata.csv line 6 (0.png)",
        "metadata.csv line 7 (../0.png)",
    ]
    with pytest.raises(ValueError, match="line 2 .*an opening quote"):
        ProductFolder(tmp_path, strict=True)


def test_coarse_labels_are_read_even_if_the_first_row_is_broken(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,label,coarse_label\n,a\n,a mug,1,7\n,a pot,2,8\n"
    )
    data = ProductFolder(tmp_path)
    assert data.coarse_labels == [7, 8] and len(data.skipped) == 1


def test_many_rows_with_many_open_quotes_are_read_in_seconds(tmp_path):
    lines = [
        f'{i}.png,"open {i},{i}' if i % 50 == 0 else f"{i}.png,thing {i},{i}" for i in range(20_000)
    ]
    begun = time.monotonic()
    rows = rows_of(tmp_path, "\n".join(lines))
    assert len(rows) == 20_000 and len(broken(rows)) == 400
    assert time.monotonic() - begun < 20
