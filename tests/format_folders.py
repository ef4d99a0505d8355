"""Writes the same products in each format that a table can be read from."""

import csv
import io
import json
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image


class Product(NamedTuple):
    """A row: the bytes of a picture file or None, its suffix, a text and a label."""

    picture: bytes | None
    suffix: str
    text: str
    label: str


TEXTS = ["Red mug", 'plate, "blue"', "", "Käse 5€", "两行\nof text", "zelené šaty", "a+b=c"]


def make_products(count=11, classes=("0", "1", "2"), size=12, gaps=True):
    """Return products with random pictures; with ``gaps``, some lack the picture or the text."""
    generator = np.random.default_rng(count)
    products = []
    for row in range(count):
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[row % 3]
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (size, size + row % 3, 3), np.uint8)
        Image.fromarray(pixels).save(file, kind)
        text = TEXTS[row % len(TEXTS)] if gaps else f"product {row}"
        picture = None if gaps and row % 5 == 3 else file.getvalue()
        products.append(Product(picture, suffix, text, classes[row % len(classes)]))
    return products


def name_of(row, product):
    """Return the path of the row's picture file relative to the folder, or ""."""
    return "" if product.picture is None else f"pictures/{row:04d}.{product.suffix}"


def write_pictures(folder, products):
    """Write the picture files, and return their names."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    names = [name_of(row, product) for row, product in enumerate(products)]
    for name, product in zip(names, products, strict=True):
        if product.picture is not None:
            (folder / name).write_bytes(product.picture)
    return names


def write_csv(folder, products, name="metadata.csv", delimiter=","):
    names = write_pictures(folder, products)
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["file_name", "text", "label"])
        for image, product in zip(names, products, strict=True):
            writer.writerow([image, product.text, product.label])
    return folder


def write_tsv(folder, products):
    return write_csv(folder, products, "metadata.tsv", "\t")


def write_jsonl(folder, products):
    names = write_pictures(folder, products)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for row, (image, product) in enumerate(zip(names, products, strict=True)):
            fields = {"file_name": image, "text": product.text, "label": _value(product.label)}
            file.write(json.dumps(fields, ensure_ascii=row % 2 == 0) + "\n")
    return folder


def dataset_of(products):
    """Return a datasets.Dataset with the columns image (bytes and path), text and label."""
    import datasets

    def image(row, product):
        if product.picture is None:
            return None
        return {"bytes": product.picture, "path": name_of(row, product).rpartition("/")[2]}

    columns = {
        "image": [image(row, product) for row, product in enumerate(products)],
        "text": [product.text for product in products],
        "label": [_value(product.label) for product in products],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def write_arrow(folder, products):
    dataset_of(products).save_to_disk(str(folder), num_shards=2)
    return folder


def write_parquet(folder, products):
    folder.mkdir(parents=True, exist_ok=True)
    half = len(products) // 2
    for part, rows in enumerate((range(half), range(half, len(products)))):
        dataset = dataset_of(products).select(rows)
        dataset.to_parquet(str(folder / f"train-{part:05d}-of-00002.parquet"))
    return folder


def write_tars(folder, products, tars=2):
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(products) // tars)
    for part in range(tars):
        with tarfile.open(folder / f"part-{part:04d}.tar", "w") as tar:
            for row in range(part * size, min((part + 1) * size, len(products))):
                for name, data in members_of(row, products[row]):
                    add_member(tar, name, data)
    return folder


def members_of(row, product):
    """Return (name, bytes) of each member of a row."""
    members = []
    if product.picture is not None:
        members.append((f"a.b/{row:04d}.{product.suffix}", product.picture))
    if product.text:
        members.append((f"a.b/{row:04d}.txt", product.text.encode()))
    return [*members, (f"a.b/{row:04d}.cls", product.label.encode())]


def add_member(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_classes(folder, products):
    """Write the pictures of the products that have one; texts are not written."""
    for row, product in enumerate(products):
        if product.picture is not None:
            (folder / product.label).mkdir(parents=True, exist_ok=True)
            (folder / product.label / f"{row:04d}.{product.suffix}").write_bytes(product.picture)
    return folder


def write_glami(folder, products, split="train"):
    """Write products in the layout of GLAMI-1M; the text becomes name and description."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / f"GLAMI-1M-{split}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            "item_id,image_id,image_url,name,description,geo,category,category_name,label_source".split(
                ","
            )
        )
        for row, product in enumerate(products):
            name, _, description = product.text.partition(" ")
            image = "" if product.picture is None else str(row)
            ends = [product.label, f"category {product.label}", "human"]
            writer.writerow([row, image, "", name, description, "cz", *ends])
            if product.picture is not None:
                (folder / "images" / f"{row}.jpg").write_bytes(product.picture)
    return folder


def _value(label):
    return int(label) if label.isdigit() else label


WRITERS = {
    "csv": write_csv,
    "tsv": write_tsv,
    "jsonl": write_jsonl,
    "arrow": write_arrow,
    "parquet": write_parquet,
    "webdataset": write_tars,
    "glami": write_glami,
}
