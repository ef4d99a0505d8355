"""``mmfused demo``: compare two backends in training, and query pooling with torch's attention."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmfused
from mmfused.library import Backend, choose
from mmfused.models.fields import check_field

HELP = "train FLUID with the reference and the default backend, time query pooling, and compare"
STEPS = 300
# Largest accepted mean difference of the loss curves. The backends round differently, and training
# amplifies the differences.
CURVE_BOUND = 0.02
QUERIES = 32
TOKENS = 197
DIM = 768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused demo`` to ``parser``."""
    parser.add_argument(
        "--out",
        default="demo",
        metavar="DIR",
        help="folder for the results (default: demo)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help=f"number of steps of each training (default: {STEPS})",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=21,
        help="number of timings of query pooling, whose median is reported (default: 21)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, time query pooling and print the table.

    Return 1 if the loss curves differ by more than ``CURVE_BOUND``, else 0.
    """
    from mmfused.training.files import write_atomically, write_json

    out = Path(args.out)
    _check(args, out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = choose("demo", device, torch.float32)
    print(
        f"Training FLUID tiny on the generated product set for {args.steps} steps on {device}: "
        f"reference, then {best}."
    )
    runs = {
        backend: _train_in_process(backend, args.steps, out / backend)
        for backend in ("reference", best)
    }
    print("Timing query pooling.")
    op = _measure_op(device, best, args.repeats)
    result = _compare(runs["reference"], runs[best], op, best, args.steps)
    write_atomically(out / "demo.json", lambda path: write_json(path, result))
    write_atomically(out / "demo.png", lambda path: _draw(runs, op, best, path))
    _print_table(result, best)
    print(f"\nResults written to {out / 'demo.json'}, charts to {out / 'demo.png'}.")
    difference = result["curve_mean_difference"]
    if difference > CURVE_BOUND:
        print(
            f"FAILED: the mean difference of the loss curves is {difference:.3g}, "
            f"expected at most {CURVE_BOUND}."
        )
        return 1
    return 0


def _check(args: argparse.Namespace, out: Path) -> None:
    from mmfused.training.run_folder import check_replaceable

    for name in ("steps", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected at least 1")
    check_field("steps", args.steps, int)
    check_replaceable(out / "demo.json", "curve_bound", replace=True)
    if (out / "demo.png").exists() and not (out / "demo.json").exists():
        raise FileExistsError(
            f"out: {out / 'demo.png'} was written by another program; "
            "choose another folder, or move it"
        )


# ---- training ------------------------------------------------------------------------------------


def _train_in_process(backend: Backend, steps: int, out: Path) -> dict[str, Any]:
    """Train in a separate process, and return the summary and the history.

    The process must be separate because peak memory is measured per process.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        summary = pool.submit(_train, backend, steps, str(out)).result()
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    history = {
        "train": [record for record in records if "loss" in record],
        "val": [record for record in records if "accuracy" in record],
    }
    return {"summary": summary, "history": history}


def _train(backend: Backend, steps: int, out: str) -> dict[str, Any]:
    from mmfused.training.run import TrainConfig, train

    config = TrainConfig(out=out, backend=backend, steps=steps, val_every=steps, overwrite=True)
    return train(config)


# ---- query pooling -------------------------------------------------------------------------------


def _measure_op(device: torch.device, backend: Backend, repeats: int) -> dict[str, Any]:
    """Measure query pooling and an nn.MultiheadAttention with the same weights.

    Return the shape of the inputs, the seconds of forward and backward with all gradients, and the
    number of bytes that forward saves for backward.

    Raises:
        RuntimeError: the two modules return different outputs.
    """
    from mmfused.testing import interleaved_medians, saved_bytes

    on_cuda = device.type == "cuda"
    batch, dtype = (256, torch.bfloat16) if on_cuda else (32, torch.float32)
    torch.manual_seed(0)
    pool = mmfused.QueryPooling(DIM, QUERIES, q_proj=True, out_proj=True, bias=True)
    pool = pool.to(device, dtype)
    attention = nn.MultiheadAttention(DIM, 1, batch_first=True).to(device, dtype)
    _copy_weights(pool, attention)
    x = torch.randn(batch, TOKENS, DIM, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(batch, QUERIES, DIM, device=device, dtype=dtype)

    assert pool.queries is not None
    queries = pool.queries

    def baseline() -> Tensor:
        return attention(queries.expand(batch, -1, -1), x, x, need_weights=False)[0]

    def ours() -> Tensor:
        with mmfused.backend(backend):
            return pool(x)

    _check_equal(ours(), baseline())
    forwards: dict[str, Callable[[], Tensor]] = {"baseline": baseline, "ours": ours}
    leaves: dict[str, list[Tensor]] = {
        "baseline": [x, queries, *attention.parameters()],
        "ours": [x, *pool.parameters()],
    }

    def step(name: str) -> object:
        return torch.autograd.grad(forwards[name](), leaves[name], upstream, allow_unused=True)

    steps: dict[str, Callable[[], object]] = {name: partial(step, name) for name in forwards}
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


def _check_equal(ours: Tensor, baseline: Tensor) -> None:
    difference = (ours - baseline).norm() / baseline.norm()
    if not difference < (3e-2 if ours.dtype == torch.bfloat16 else 1e-4):
        raise RuntimeError(
            "query pooling and nn.MultiheadAttention have a relative difference of "
            f"{float(difference):.2g}"
        )


@torch.no_grad()
def _copy_weights(pool: Any, attention: Any) -> None:
    parts = [pool.q_proj, pool.k_proj, pool.v_proj]
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    attention.out_proj.load_state_dict(pool.out_proj.state_dict())


# ---- results -------------------------------------------------------------------------------------


def _compare(
    reference: Mapping[str, Any],
    ours: Mapping[str, Any],
    op: Mapping[str, Any],
    best: str,
    steps: int,
) -> dict[str, Any]:
    """Return the contents of ``demo.json``."""
    losses = [
        torch.tensor([r["loss"] for r in run["history"]["train"]], dtype=torch.float64)
        for run in (reference, ours)
    ]
    difference = (losses[0] - losses[1]).abs()
    summaries = reference["summary"], ours["summary"]
    step_seconds = _fast_step(reference), _fast_step(ours)
    return {
        "mmfused": mmfused.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "reference": _measured(reference),
        best: _measured(ours),
        "curve_max_difference": float(difference.max()),
        "curve_mean_difference": float(difference.mean()),
        "curve_bound": CURVE_BOUND,
        "step_time_ratio": step_seconds[0] / step_seconds[1],
        "peak_memory_ratio": summaries[0]["peak_memory"] / summaries[1]["peak_memory"],
        "op": op,
        "op_time_ratio": op["seconds"]["baseline"] / op["seconds"]["ours"],
        "op_saved_ratio": op["saved_bytes"]["baseline"] / op["saved_bytes"]["ours"],
    }


def _measured(run: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("accuracy", "macro_f1", "val_loss", "step_seconds", "peak_memory", "seconds", "device")
    return {
        **{key: run["summary"][key] for key in keys},
        "fast_step_seconds": _fast_step(run),
    }


def _fast_step(run: Mapping[str, Any]) -> float:
    """Return the time that a tenth of the steps do not exceed.

    The two trainings run one after the other, so other work on the machine would distort the ratio
    of their median times.
    """
    seconds = sorted(record["seconds"] for record in run["history"]["train"])
    return seconds[len(seconds) // 10]


def _print_table(result: Mapping[str, Any], best: str) -> None:
    reference, ours, op = result["reference"], result[best], result["op"]
    shape = ", ".join(f"{name}={value}" for name, value in op["shape"].items() if name != "dtype")

    def row(
        name: str,
        show: Callable[[Any], str],
        left: Any,
        right: Any,
        ratio: str = "",
    ) -> tuple[str, str, str, str]:
        return f"  {name}", show(left), show(right), f"{result[ratio]:.2f}x" if ratio else ""

    def op_row(
        name: str,
        show: Callable[[Any], str],
        key: str,
        ratio: str,
    ) -> tuple[str, str, str, str]:
        return row(name, show, op[key]["baseline"], op[key]["ours"], ratio)

    def both(key: str) -> tuple[Any, Any]:
        return reference[key], ours[key]

    largest = f"{result['curve_max_difference']:.2g}"
    mean = f"{result['curve_mean_difference']:.2g}"
    _print_columns(
        [
            (
                f"FLUID tiny, {result['steps']} steps on {ours['device']}",
                "reference",
                best,
                "ratio",
            ),
            row("accuracy", _percent, *both("accuracy")),
            row("macro F1", _percent, *both("macro_f1")),
            row(
                "time of a fast step", _milliseconds, *both("fast_step_seconds"), "step_time_ratio"
            ),
            row("peak memory", _mebibytes, *both("peak_memory"), "peak_memory_ratio"),
            ("  loss curves, largest difference", "", largest, ""),
            (f"  loss curves, mean difference (bound {CURVE_BOUND})", "", mean, ""),
            (f"query pooling, {shape}", "nn.MHA", best, "ratio"),
            op_row("forward + backward", _milliseconds, "seconds", "op_time_ratio"),
            op_row("saved for backward", _mebibytes, "saved_bytes", "op_saved_ratio"),
        ]
    )


def _print_columns(rows: list[tuple[str, str, str, str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print(name.ljust(widths[0]), *aligned, sep="  ")


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def _draw(
    runs: Mapping[str, Any],
    op: Mapping[str, Any],
    best: str,
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    curves, times, saved = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, style in (("reference", "-"), (best, "--")):
        history = runs[name]["history"]["train"]
        steps = [record["step"] for record in history]
        losses = [record["loss"] for record in history]
        curves.plot(steps, losses, style, label=name, linewidth=1)
    curves.set(xlabel="step", ylabel="training loss", title="FLUID tiny, same seed")
    curves.legend()
    for axes, key, scale, label in (
        (times, "seconds", 1e3, "ms"),
        (saved, "saved_bytes", 2**-20, "MiB"),
    ):
        heights = [op[key][name] * scale for name in ("baseline", "ours")]
        bars = axes.bar(["nn.MHA", best], heights, color=["C0", "C1"])
        axes.bar_label(bars, fmt="%.1f")
        axes.set(ylabel=label)
    times.set(title="query pooling\nforward + backward")
    saved.set(title="query pooling\nsaved for backward")
    figure.savefig(path, format="png", dpi=120)
