"""Small folders in the layouts in which GLAMI-1M, MMEB, UNITE's data and WebQA are published."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "white")


def picture(path: Path, number: int, size=(40, 32)) -> None:
    """Write a picture of random pixels that depends only on ``number``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_glami(root: Path) -> Path:
    """Write 18 training and 6 test rows of three categories with large, sparse ids."""
    columns = "item_id,image_id,image_url,name,description,geo,category,category_name,label_source"
    categories = {7: "womens-dresses", 1532: "bags", 20117: "mens-sneakers"}
    for split, first, rows in (("train", 0, 18), ("test", 100, 6)):
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"GLAMI-1M-{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns.split(","))
            for row in range(first, first + rows):
                category = (1532, 20117, 7)[row % 3]
                url, name = "https://example.org/1.jpg", f"Šaty {COLOURS[row % 4]}"
                description = f'červené, "krásné" {categories[category]}'
                fields = [row, row, url, name, description, "cz", category]
                writer.writerow([*fields, categories[category], "human"])
                picture(root / "images" / f"{row}.jpg", row)
    return root


def write_mmeb(root: Path) -> Path:
    """Write 16 pairs: half ask about a picture, half search for one, four with a negative."""
    rows = []
    for number in range(8):
        image = f"images/{number}.jpg"
        picture(root / image, number)
        empty = dict.fromkeys(
            ("qry_image_path", "pos_image_path", "neg_text", "neg_image_path"), ""
        )
        question = "<|image_1|>\nRepresent the given image with the question: what is it? "
        rows.append(
            {**empty, "qry": question, "qry_image_path": image, "pos_text": f"answer {number}"}
        )
        found = {"pos_text": "<|image_1|>\nRepresent the given image.", "pos_image_path": image}
        rows.append({**empty, "qry": f"Find an image of {COLOURS[number % 4]} {number}", **found})
    for number in range(4):
        rows[2 * number]["neg_text"] = f"answer {number + 4}"
    (root / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return root / "train.json"


def write_unite(root: Path) -> Path:
    """Write 8 pairs of a picture with an instruction and the next picture."""
    rows = []
    for number in range(8):
        picture(root / f"images/{number}.jpg", number)
        query = {"text": "<|IMAGE|>\nmake it red", "image": f"images/{number}.jpg"}
        candidate = {"image": f"images/{(number + 1) % 8}.jpg"}
        rows.append({"query": query, "candidate": candidate, "target_modal": "image"})
    (root / "unite.json").write_text(json.dumps(rows), encoding="utf-8")
    return root / "unite.json"


def write_webqa(root: Path) -> Path:
    """Write 8 questions with two positives each: four are texts, four pictures with a caption."""
    texts = [{"content": f"snippet {number}"} for number in range(8)]
    pictures = []
    for number in range(8):
        picture(root / f"images/{number}.png", number)
        pictures.append(
            {"content": f"mm{number}", "image": f"{number}.png", "caption": f"caption {number}"}
        )
    queries = []
    for number in range(8):
        kind, name = ("mm_it", "mm") if number % 2 else ("text", "snippet ")
        positive = [f"{name}{number}", f"{name}{(number + 1) % 8}"]
        queries.append({"q_text": f"question {number}", "positive": positive, "type": kind})
    for name, rows in (
        ("mm_it_corpus", pictures),
        ("text_corpus", texts),
        ("val_query", queries),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return root
