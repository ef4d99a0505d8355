"""``mmfused demo``: one training twice, plain PyTorch and this machine's best backend, then the op
alone; one table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import mmfused
from mmfused.library import choose
from mmfused.models.fields import check_field

HELP = (
    "train FLUID twice, with and without this library's ops, time query pooling alone, and compare"
)
STEPS = 300
# The backends round differently, and training amplifies that; a wrong gradient moves a loss by far
# more.
CURVE_BOUND = 0.02
QUERIES, TOKENS, DIM = 32, 197, 768


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--out", default="demo", metavar="DIR", help="folder for the results (default: demo)"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of each training (default: {STEPS})"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=21,
        help="timings of the op, of which the median counts (default: 21)",
    )


def run(args: argparse.Namespace) -> int:
    from mmfused.training.run_folder import check_replaceable, whole, write_json

    for name in ("steps", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected at least 1")
    check_field("steps", args.steps, int)
    out = Path(args.out)
    check_replaceable(out / "demo.json", "curve_bound", replace=True)
    if (out / "demo.png").exists() and not (out / "demo.json").exists():
        raise FileExistsError(
            f"out: {out / 'demo.png'} is another program's; choose another folder, or move it"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = choose("demo", device, torch.float32)
    print(
        f"Training FLUID tiny on the generated product set for {args.steps} steps on {device}: reference, then {best}."
    )
    runs = {
        backend: train_apart(backend, args.steps, out / backend) for backend in ("reference", best)
    }
    print("Timing query pooling alone.")
    op = measure_op(device, best, args.repeats)
    result = compare(runs["reference"], runs[best], op, best, args.steps)
    whole(out / "demo.json", lambda path: write_json(path, result))
    whole(out / "demo.png", lambda path: draw(runs, op, best, path))
    print_table(result, best)
    print(f"\n{out / 'demo.json'} holds the table, {out / 'demo.png'} the curves and bars.")
    if result["curve_mean_difference"] > CURVE_BOUND:
        difference = result["curve_mean_difference"]
        print(
            f"FAILED: the loss curves differ by {difference:.3g} in the mean; the bound is {CURVE_BOUND}."
        )
        return 1
    return 0


def train_apart(backend: str, steps: int, out: Path) -> dict:
    """Summary and history of a training in its own process, so that one's peak memory is not the
    other's.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        summary = pool.submit(train_once, backend, steps, str(out)).result()
    records = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    history = {
        "train": [r for r in records if "loss" in r],
        "val": [r for r in records if "accuracy" in r],
    }
    return {"summary": summary, "history": history}


def train_once(backend: str, steps: int, out: str) -> dict:
    from mmfused.training.loop import TrainConfig, train

    return train(
        TrainConfig(out=out, backend=backend, steps=steps, val_every=steps, overwrite=True)
    )


def measure_op(device: torch.device, backend: str, repeats: int) -> dict:
    """Query pooling and nn.MultiheadAttention with the same weights.

    Measures the seconds of forward and backward with all gradients, and the bytes that forward
    keeps for backward.

    Raises RuntimeError if their outputs disagree: a wrong op gets no timing.
    """
    from mmfused.testing import interleaved_medians, saved_bytes

    batch, dtype = (256, torch.bfloat16) if device.type == "cuda" else (32, torch.float32)
    torch.manual_seed(0)
    pool = mmfused.QueryPooling(DIM, QUERIES, q_proj=True, out_proj=True, bias=True).to(
        device, dtype
    )
    attention = torch.nn.MultiheadAttention(DIM, 1, batch_first=True).to(device, dtype)
    copy_weights(pool, attention)
    x = torch.randn(batch, TOKENS, DIM, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(batch, QUERIES, DIM, device=device, dtype=dtype)

    def baseline():
        return attention(pool.queries.expand(batch, -1, -1), x, x, need_weights=False)[0]

    def ours():
        with mmfused.backend(backend):
            return pool(x)

    difference = (ours() - baseline()).norm() / baseline().norm()
    if not difference < (3e-2 if dtype == torch.bfloat16 else 1e-4):
        raise RuntimeError(
            f"query pooling and nn.MultiheadAttention differ by {float(difference):.2g}, relative to the norm"
        )
    leaves = {
        "baseline": [x, pool.queries, *attention.parameters()],
        "ours": [x, *pool.parameters()],
    }
    forwards = {"baseline": baseline, "ours": ours}
    steps = {
        name: lambda name=name: torch.autograd.grad(
            forwards[name](), leaves[name], upstream, allow_unused=True
        )
        for name in forwards
    }
    seconds = interleaved_medians(steps, repeats)
    saved = {name: saved_bytes(forwards[name], tuple(leaves[name])) for name in forwards}
    shape = {
        "B": batch,
        "N": TOKENS,
        "D": DIM,
        "L": QUERIES,
        "heads": 1,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {"shape": shape, "seconds": seconds, "saved_bytes": saved}


@torch.no_grad()
def copy_weights(pool, attention):
    parts = [pool.q_proj, pool.k_proj, pool.v_proj]
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    attention.out_proj.load_state_dict(pool.out_proj.state_dict())


def compare(reference: dict, ours: dict, op: dict, best: str, steps: int) -> dict:
    losses = [
        torch.tensor([r["loss"] for r in run["history"]["train"]], dtype=torch.float64)
        for run in (reference, ours)
    ]
    difference = (losses[0] - losses[1]).abs()
    keys = ("accuracy", "macro_f1", "val_loss", "step_seconds", "peak_memory", "seconds", "device")
    return {
        "mmfused": mmfused.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "reference": {key: reference["summary"][key] for key in keys},
        best: {key: ours["summary"][key] for key in keys},
        "curve_max_difference": float(difference.max()),
        "curve_mean_difference": float(difference.mean()),
        "curve_bound": CURVE_BOUND,
        "step_time_ratio": reference["summary"]["step_seconds"] / ours["summary"]["step_seconds"],
        "peak_memory_ratio": reference["summary"]["peak_memory"] / ours["summary"]["peak_memory"],
        "op": op,
        "op_time_ratio": op["seconds"]["baseline"] / op["seconds"]["ours"],
        "op_saved_ratio": op["saved_bytes"]["baseline"] / op["saved_bytes"]["ours"],
    }


def print_table(result: dict, best: str):
    reference, ours, op = result["reference"], result[best], result["op"]
    shape = ", ".join(f"{name}={value}" for name, value in op["shape"].items() if name != "dtype")
    milliseconds, mebibytes = (lambda s: f"{s * 1e3:.1f} ms"), (lambda b: f"{b / 2**20:.1f} MiB")
    rows = [
        (f"FLUID tiny, {result['steps']} steps on {ours['device']}", "reference", best, "ratio"),
        ("  accuracy", f"{reference['accuracy']:.1%}", f"{ours['accuracy']:.1%}", ""),
        ("  macro F1", f"{reference['macro_f1']:.1%}", f"{ours['macro_f1']:.1%}", ""),
        (
            "  time of a step",
            *both(milliseconds, reference, ours, "step_seconds"),
            f"{result['step_time_ratio']:.2f}x",
        ),
        (
            "  peak memory",
            *both(mebibytes, reference, ours, "peak_memory"),
            f"{result['peak_memory_ratio']:.2f}x",
        ),
        ("  loss curves, largest difference", "", f"{result['curve_max_difference']:.2g}", ""),
        (
            f"  loss curves, mean difference (bound {CURVE_BOUND})",
            "",
            f"{result['curve_mean_difference']:.2g}",
            "",
        ),
        (f"query pooling, {shape}", "nn.MHA", best, "ratio"),
        (
            "  forward + backward",
            *both(milliseconds, *pair(op["seconds"]), 0),
            f"{result['op_time_ratio']:.2f}x",
        ),
        (
            "  saved for backward",
            *both(mebibytes, *pair(op["saved_bytes"]), 0),
            f"{result['op_saved_ratio']:.2f}x",
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for name, *cells in rows:
        print(
            name.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)),
            sep="  ",
        )


def both(show, reference, ours, key) -> tuple[str, str]:
    return show(reference[key]), show(ours[key])


def pair(measured: dict) -> tuple[list, list]:
    return [measured["baseline"]], [measured["ours"]]


def draw(runs: dict, op: dict, best: str, path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    curves, times, saved = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, style in (("reference", "-"), (best, "--")):
        history = runs[name]["history"]["train"]
        curves.plot(
            [r["step"] for r in history],
            [r["loss"] for r in history],
            style,
            label=name,
            linewidth=1,
        )
    curves.set(xlabel="step", ylabel="training loss", title="FLUID tiny, same seed")
    curves.legend()
    for axes, key, scale, label in (
        (times, "seconds", 1e3, "ms"),
        (saved, "saved_bytes", 2**-20, "MiB"),
    ):
        bars = axes.bar(
            ["nn.MHA", best],
            [op[key][name] * scale for name in ("baseline", "ours")],
            color=["C0", "C1"],
        )
        axes.bar_label(bars, fmt="%.1f")
        axes.set(ylabel=label)
    times.set(title="query pooling\nforward + backward")
    saved.set(title="query pooling\nsaved for backward")
    figure.savefig(path, format="png", dpi=120)
