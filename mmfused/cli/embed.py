"""``mmfused embed``: the items of a folder as embeddings, in one ``.npz``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "embed a folder of products with a trained retrieval model, into one .npz"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with images and metadata.csv, or 'generated'")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .npz; a run that was stopped goes on from FILE.parts")
    parser.add_argument("--views", default="image,text,both", help="some of image, text, both (default: all)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of metadata.csv (default: text)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="items at a time (default: 256)")
    parser.add_argument("--backend", default="auto", help="auto, reference, composed or fused (default: auto)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    import mmfused
    from mmfused.run_folder import remove
    from mmfused.trained import load_trained

    out = Path(args.out)
    parts = out.with_name(out.name + ".parts")
    check(args, out)
    trained = load_trained(args.checkpoint, args.backend, args.device, args.threads)
    trained.must_retrieve("embed")
    data, batches = trained.batches(args.data, args.batch_size, args.text_column)
    job = {"checkpoint": trained.digest, "rows": trained.digest_of(data), "batch_size": args.batch_size, "views": args.views}
    begin(parts, job, args.overwrite)
    with mmfused.backend(args.backend):
        embed_parts(trained, batches, parts, tuple(args.views.split(",")))
    count = join_parts(parts, out, data)
    remove(parts)
    print(f"{count} items embedded, {len(data.skipped)} rows skipped, written to {out}")
    return 0


def check(args: argparse.Namespace, out: Path) -> None:
    from mmfused.models.retrieval import check_views

    for name in ("batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, takes a number above 0")
    check_views(tuple(args.views.split(",")))
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise ValueError(f"out: got {out}, takes an .npz in a folder that is there")
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"out: {out} is there already; choose another name or overwrite it")


def begin(parts: Path, job: dict, overwrite: bool) -> None:
    """The folder of what is done. Raises ValueError where it holds parts of another job."""
    from mmfused.run_folder import read_json, remove, whole, write_json

    if overwrite:
        remove(parts)
    parts.mkdir(exist_ok=True)
    if (parts / "job.json").is_file():
        if read_json(parts / "job.json") != job:
            raise ValueError(f"out: {parts} holds parts of another checkpoint, folder or batch size; remove or overwrite them")
    else:
        whole(parts / "job.json", lambda path: write_json(path, job))


def embed_parts(trained, batches, parts: Path, views: tuple[str, ...]) -> None:
    """A file for each batch that has none yet."""
    import torch
    from tqdm import tqdm

    from mmfused.ranking import embed_items
    from mmfused.run_folder import whole

    for index in tqdm(range(len(batches)), desc="embed", unit="batch"):
        path = parts / f"{index:08d}.npz"
        if not path.is_file():
            rows = torch.arange(index * batches.batch_size, min((index + 1) * batches.batch_size, len(batches.items)))
            embedded = embed_items(trained.model, [batches.items.batch(rows)], views, trained.amp)
            arrays = {name: value.numpy() for name, value in embedded.items()}
            whole(path, lambda temporary, arrays=arrays: save_npz(temporary, arrays))


def join_parts(parts: Path, out: Path, data) -> int:
    import numpy as np

    from mmfused.run_folder import whole

    loaded = [dict(np.load(path)) for path in sorted(parts.glob("*.npz"))]
    arrays = {name: np.concatenate([part[name] for part in loaded]) for name in loaded[0]}
    arrays["file_names"] = np.array(getattr(data, "file_names", [""] * len(data)))
    arrays["skipped"] = np.array(json.dumps(data.skipped))
    whole(out, lambda temporary: save_npz(temporary, arrays))
    return len(arrays["labels"])


def save_npz(path: Path, arrays: dict) -> None:
    import numpy as np

    with open(path, "wb") as file:  # given a name, numpy would put .npz behind it
        np.savez(file, **arrays)
