"""Labels of product folders: indices, names of classes, and the mapping of the training data."""

from __future__ import annotations

import csv
from itertools import chain

import pytest

from mmfused.data import ProductFolder
from mmfused.data.labels import sorted_names
from mmfused.data.strings import Strings


def write(root, labels, coarse=None):
    rows = [("file_name", "text", "label"), *(("", f"text {i}", x) for i, x in enumerate(labels))]
    if coarse is not None:
        rows = [(*row, more) for row, more in zip(rows, ["coarse_label", *coarse], strict=True)]
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return root


def rows_and_reasons(data):
    """Return the numbers of the kept rows, and the reasons of the others by their numbers."""
    kept = [int(text.split()[1]) for text in data.texts]
    found = (sentence.split(" (no file_name): ") for sentence in data.skipped)
    return kept, {int(where.split()[-1]) - 2: reason for where, reason in found}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["mug", "plate", "bowl", "mug"], ["bowl", "mug", "plate"]),
        (["Äpfel", "zinc", "Zinc", "10"], ["10", "Zinc", "zinc", "Äpfel"]),
        (["b2", "b10", "b2"], ["b10", "b2"]),
        (["n/a", "3.5 cm", "7"], ["3.5 cm", "7", "n/a"]),
    ],
)
def test_labels_that_are_no_numbers_are_names(tmp_path, labels, names):
    data = ProductFolder(write(tmp_path, labels))
    assert data.class_names == names and data.num_classes == len(names) and data.skipped == []
    assert [data.class_names[label] for label in data.labels] == labels
    assert all(type(label) is int for label in data.labels)


def test_names_that_are_all_integers_are_in_the_order_of_their_numbers(tmp_path):
    labels = ["20117", "7", "1532", "-4", "7", "007"]
    data = ProductFolder(write(tmp_path, labels), labels="name")
    assert data.class_names == ["-4", "007", "7", "1532", "20117"]
    assert data.labels == [4, 2, 3, 0, 2, 1] and data.num_classes == 5
    # One name that is no integer makes the order alphabetical.
    assert sorted_names(["10", "9", "x"]) == ["10", "9", "x"]
    assert sorted_names(["10", "9"]) == ["9", "10"]


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (["0", "3", "1"], [0, 1, 2]),
        (["x", "3", "1"], [1, 2]),  # a first row with a fault changes nothing
        (["3", "x"], [0]),  # as many names as numbers
        (["-1", "2.0", "5", "1e3"], [2]),  # numbers, but no indices
        (["", "", "", "4", "x"], [3]),
    ],
)
def test_labels_of_which_most_are_numbers_are_indices(tmp_path, labels, kept):
    data = ProductFolder(write(tmp_path, labels))
    assert data.class_names is None and data.labels == [int(labels[row]) for row in kept]
    assert data.num_classes == max(data.labels) + 1
    found, reasons = rows_and_reasons(data)
    assert found == kept
    assert reasons == {
        row: f"label: got {label!r}, expected an integer from 0 to 2147483647"
        for row, label in enumerate(labels)
        if row not in kept
    }


def test_the_kind_of_labels_can_be_given(tmp_path):
    write(tmp_path, ["1", "mug", "plate"])
    assert ProductFolder(tmp_path).class_names == ["1", "mug", "plate"]
    data = ProductFolder(tmp_path, labels="index")
    assert data.class_names is None and data.labels == [1] and len(data.skipped) == 2
    with pytest.raises(ValueError, match="labels: got 'names', expected 'auto' or 'index' or"):
        ProductFolder(tmp_path, labels="names")


def test_a_format_with_names_has_names_whatever_they_look_like(tmp_path):
    (tmp_path / "images").mkdir()
    rows = "image_id,name,description,category,label_source\n1,A,a,20117,x\n2,B,b,7,x\n3,C,,7,x\n"
    (tmp_path / "GLAMI-1M-train.csv").write_text(rows)
    data = ProductFolder(tmp_path, columns={"image": ""})
    assert data.class_names == ["7", "20117"] and data.labels == [1, 0, 0]
    assert data.texts == ["A a", "B b", "C"]
    assert ProductFolder(tmp_path, columns={"image": ""}, labels="index").labels == [20117, 7, 7]


@pytest.mark.parametrize("labels", ["auto", "name"])
def test_labels_are_looked_up_in_the_classes_of_the_training_data(tmp_path, labels):
    write(tmp_path, ["plate", "x", "", "mug", "plate"])
    names = ["mug", "bowl", "plate"]
    data = ProductFolder(tmp_path, class_names=names, labels=labels)
    assert data.labels == [2, 0, 2] and data.class_names == names and data.num_classes == 3
    assert rows_and_reasons(data) == (
        [0, 3, 4],
        {
            1: "label: got 'x', which is none of the 3 classes of the training data",
            2: "label: got '', expected the name of a class",
        },
    )
    # Names that look like numbers are still names.
    assert ProductFolder(write(tmp_path, ["7", "1"]), class_names=["1", "7"]).labels == [1, 0]


def test_names_contradict_indices_and_too_few_classes(tmp_path):
    write(tmp_path, ["plate", "mug"])
    with pytest.raises(ValueError, match="class_names: got names with labels 'index', expected"):
        ProductFolder(tmp_path, class_names=["plate"], labels="index")
    with pytest.raises(ValueError, match="num_classes: got 1, but the data have 2 classes"):
        ProductFolder(tmp_path, num_classes=1)
    assert ProductFolder(tmp_path, num_classes=4).num_classes == 4


def test_rows_that_are_not_read_have_no_classes_but_rows_without_a_picture_have(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,label\n,a,mug\nx,y,shifted,bowl\ngone.jpg,b,vase\n,c,plate\n"
    )
    data = ProductFolder(tmp_path)
    assert data.class_names == ["mug", "plate", "vase"] and data.labels == [0, 1]


def test_names_are_part_of_the_digest(tmp_path):
    digests = set()
    for labels in (["a", "b"], ["a", "c"], ["0", "1"]):
        data = ProductFolder(write(tmp_path, labels))
        digests.add(data.digest)
        assert data.fingerprint == data.digest  # without pictures
    assert len(digests) == 3


def test_rows_without_a_label_are_kept_if_none_is_needed(tmp_path):
    write(tmp_path, ["2", "", "x"])
    data = ProductFolder(tmp_path, needs_label=False, labels="index")
    assert data.labels == [2, -1] and len(data.skipped) == 1 and data.num_classes == 3
    data = ProductFolder(tmp_path, needs_label=False, labels="name")
    assert data.labels == [0, -1, 1] and data.class_names == ["2", "x"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n,a\n,b\n")
    data = ProductFolder(tmp_path, needs_label=False)
    assert data.labels == [-1, -1] and data.num_classes == 0
    with pytest.raises(ValueError, match="header line without label"):
        ProductFolder(tmp_path)


def test_coarse_labels_stay_indices(tmp_path):
    data = ProductFolder(write(tmp_path, ["mug", "mug", "jar"], coarse=[3, "x", 1]))
    assert data.coarse_labels == [3, 1] and data.class_names == ["jar", "mug"]
    assert data.skipped == [
        "metadata.csv line 3 (no file_name): coarse_label: got 'x', "
        "expected an integer from 0 to 2147483647"
    ]


def test_a_row_reports_its_first_fault(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,label,coarse_label\n,,x,y\n,,1,y\n,,1,1\n,a,1\n,b,2,2\n"
    )
    data = ProductFolder(tmp_path)
    reasons = [sentence.split("): ")[1].split(",")[0] for sentence in data.skipped]
    assert reasons == [
        "label: got 'x'",
        "coarse_label: got 'y'",
        "file_name and text are both empty",
        "it has 3 fields",
    ]


def test_the_column_of_texts_is_named_once(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,title,kind\n,a mug,0\n")
    names = {"label": "kind"}
    assert ProductFolder(tmp_path, text_column="title", columns=names).texts == ["a mug"]
    data = ProductFolder(tmp_path, columns={"text": "title", **names})
    assert data.texts == ["a mug"] and data.text_column == "title"
    with pytest.raises(ValueError, match="text_column: got 'title' and columns with text=name"):
        ProductFolder(tmp_path, text_column="title", columns={"text": "name", **names})


def test_strings_behave_like_a_list():
    import pyarrow

    chunks = [["a", None], [], ["é", "a", ""]]
    strings = Strings(pyarrow.chunked_array(chunks, pyarrow.string()))
    expected = [text or "" for text in chain(*chunks)]
    assert list(strings) == expected and len(strings) == 5
    assert strings == expected and expected == strings and strings == Strings(expected)
    assert strings != expected[:4] and strings != [*expected[:4], "x"] and strings != "aéa"
    assert strings[-3] == "é" and strings[1:4] == ["", "é", "a"] and strings[::2] == expected[::2]
    assert strings.take([3, 3, 0]) == ["a", "a", "a"] and "é" in strings and "x" not in strings
    assert strings.empty().tolist() == [False, True, False, False, True]
    names, places = strings.groups()
    assert [names[place] for place in places] == expected and len(names) == 3
    assert repr(strings) == repr(expected)
    assert repr(Strings(["ab"] * 21)) == "<21 strings, the first 'ab'>"
    assert list(Strings(pyarrow.chunked_array([], pyarrow.string()))) == []
    with pytest.raises(IndexError):
        strings[5]
