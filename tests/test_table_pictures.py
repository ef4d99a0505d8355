"""Where the pictures of tables are: in files and in tars, which may be damaged."""

import os
import tarfile

import format_folders as folders
import pytest
from format_folders import broken, table_of, texts

from mmfused.data import picture_files, pictures, tars
from mmfused.data.pictures import BrokenPicture
from mmfused.data.tables import open_table


def test_paths_to_other_places_are_refused(tmp_path):
    root = tmp_path / "root"
    product = folders.make_products(1, gaps=False)[0]
    folders.write_pictures(root, [product])
    (tmp_path / "secret.jpg").write_bytes(product.picture)
    os.symlink("pictures/0000.jpg", root / "link.jpg")
    os.symlink("pictures", root / "folder")
    os.symlink(tmp_path / "secret.jpg", root / "pictures" / "out.jpg")
    os.symlink(tmp_path, root / "up")
    os.symlink("loop.jpg", root / "loop.jpg")
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("no picture at all")
    os.mkfifo(root / "pipe.jpg")
    with open(root / "large.jpg", "wb") as file:
        file.truncate(2**40)
    good = ["pictures/0000.jpg", "link.jpg", "folder/0000.jpg", "pictures/../link.jpg"]
    good.append(str(root / "pictures" / "0000.jpg"))
    outside = "it leads outside the folder"
    bad = {
        "../secret.jpg": outside,
        "pictures/../../secret.jpg": outside,
        str(tmp_path / "secret.jpg"): outside,
        "pictures/out.jpg": outside,
        "up/secret.jpg": outside,
        "/dev/zero": outside,
        "..": outside,
        "loop.jpg": "it is not a valid file name|symbolic links|does not exist",
        "gone.jpg": "the file does not exist",
        "link.jpg/x.jpg": "the file does not exist",
        "x" * 300 + ".jpg": "File name too long",
        "pictures": "it is not a regular file",
        "pipe.jpg": "it is not a regular file",
        "large.jpg": f"it has more than {pictures.MAX_BYTES} bytes",
    }
    names = [*good, *bad, "empty.jpg", "text.jpg"]
    text = "\n".join(["file_name,text,label", *(f"{name},,0" for name in names)])
    table = table_of(root / "metadata.csv", text)
    prints = {table.pictures.fingerprint(row) for row in range(len(good))}
    assert len(prints) == 1
    for row, name in enumerate(names):
        if name in good:
            assert table.pictures.read(row) == product.picture
            continue
        with pytest.raises(BrokenPicture, match=bad.get(name, "it is not a picture in a supp")):
            table.pictures.fingerprint(row)
        if name in bad:
            with pytest.raises(BrokenPicture, match=bad[name]):
                table.pictures.read(row)


@pytest.mark.parametrize("write", [folders.write_csv, folders.write_arrow, folders.write_tars])
def test_a_picture_that_is_too_large_is_refused(tmp_path, monkeypatch, write):
    table = open_table(write(tmp_path / "a", folders.make_products(2)))
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    for read in (table.pictures.read, table.pictures.fingerprint):
        with pytest.raises(BrokenPicture, match="it has more than 100 bytes"):
            read(0)


def test_few_folders_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_files, "MOST_FOLDERS", 2)
    for row in range(9):
        (tmp_path / str(row)).mkdir()
        (tmp_path / str(row) / "0.jpg").write_bytes(bytes([row]))
    table = table_of(
        tmp_path / "a.csv",
        "\n".join(["file_name,text,label", *(f"{row}/0.jpg,,0" for row in range(9))]),
    )
    assert [table.pictures.read(row)[0] for row in range(9)] == list(range(9))
    assert len(table.pictures._folders) <= 2


def test_a_fingerprint_changes_with_the_size_and_both_ends(tmp_path):
    picture = bytearray(b"\xff\xd8\xff" + bytes(20_000))
    path = tmp_path / "0.jpg"
    table = table_of(tmp_path / "a.csv", "file_name,text,label\n0.jpg,,0\n")
    prints = []
    for place in (None, 3, 4095, -4096, -1):
        changed = bytearray(picture)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        prints.append(table.pictures.fingerprint(0))
    for size in (20_004, 100, 4096, 4097, 8191, 8192):
        path.write_bytes(bytes(picture[:size]).ljust(size, b"\0"))
        prints.append(table.pictures.fingerprint(0))
    assert len(set(prints)) == len(prints)


HOSTILE_TARS = {
    "no tar": (b"no tar" * 1000, "the tar is cut or damaged: invalid header"),
    "empty": (b"", "the tar is cut or damaged: empty file"),
    "short": (b"abc", "the tar is cut or damaged: truncated header"),
}


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_a_file_that_is_no_tar_is_one_broken_row(tmp_path, name):
    data, reason = HOSTILE_TARS[name]
    (tmp_path / "a.tar").write_bytes(data)
    folders.write_tars(tmp_path, folders.make_products(2), 1)
    table = open_table(tmp_path)
    assert broken(table) == {"a.tar": reason} and len(table.columns) == 3


def test_damaged_members_of_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    picture = folders.make_products(1)[0].picture
    with tarfile.open(path, "w") as tar:
        for row, (suffix, data) in enumerate(
            [("txt", b"\xff"), ("txt", b"a\0"), ("json", b"{"), ("png", picture), ("cls", b"2")]
        ):
            folders.add_member(tar, f"{row}.jpg", picture)
            folders.add_member(tar, f"{row}.{suffix}", data)
            folders.add_member(tar, f"{row}.cls", b"1\n")
        link = tarfile.TarInfo("5.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folders.add_member(tar, "6.jpg", picture)
        sparse = tarfile.TarInfo("9.jpg")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
        folders.add_member(tar, "7.txt", b"no label")
        folders.add_member(tar, "8.txt", b"good")
        folders.add_member(tar, "8.cls", b"1")
    table = open_table(path)
    assert broken(table) == {
        "a.tar sample '0'": "it holds bytes that are not UTF-8",
        "a.tar sample '1'": "it holds a zero byte or a lone surrogate",
        "a.tar sample '2'": "it is not JSON: Expecting property name enclosed in double quotes "
        "at character 2",
        "a.tar sample '3'": "it has two pictures, .jpg and .png",
        "a.tar sample '4'": "it has two members .cls",
        "a.tar sample '5'": "a member is not a regular file",
        "a.tar sample '6'": "it has no field 'label'",
        "a.tar sample '9'": "a member is not a regular file",
        "a.tar sample '7'": "it has no field 'label'",
    }
    assert texts(table) == ["good"]
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("7.txt").offset
    data[header + 5] ^= 1  # the sum of the header is wrong
    path.write_bytes(data)
    assert broken(open_table(path))["a.tar"] == f"the tar is damaged at byte {header}"


def test_pictures_of_a_tar_that_changes(tmp_path):
    folders.write_tars(tmp_path, folders.make_products(1), 1)
    path = tmp_path / "part-0000.tar"
    table = open_table(path)
    os.truncate(path, 600)
    for read in (table.pictures.read, table.pictures.fingerprint):
        with pytest.raises(BrokenPicture, match="image file is truncated"):
            read(0)
    path.unlink()
    for read in (table.pictures.read, table.pictures.fingerprint):
        with pytest.raises(BrokenPicture, match="the file does not exist"):
            read(0)


def test_a_text_of_a_tar_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_LINE", 5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row, text in enumerate((b"longer", b"short")):
            folders.add_member(tar, f"{row}.txt", text)
            folders.add_member(tar, f"{row}.cls", b"1")
    table = open_table(tmp_path, columns={"image": ""})
    assert broken(table) == {"a.tar sample '0'": "it has a text of more than 5 bytes"}
    assert texts(table) == ["short"]
