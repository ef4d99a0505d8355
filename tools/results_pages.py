"""Write the measured numbers of README and docs from the files in benchmarks/results.

    python tools/results_pages.py [--check]

The text between ``<!-- results: begin NAME -->`` and ``<!-- results: end NAME -->`` is replaced.
Pictures are saved next to the results. With ``--check`` nothing is written, and the exit status is
1 if a page or a picture is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report, tables
from mmfused.tools import comparison, end_to_end_tables, grocery, targets
from mmfused.tools.comparison import Comparison, comparisons, label
from mmfused.tools.conditions import device_type, folders, ours_of, read, with_compiled

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results: begin ([\w-]+) -->)(.*?)(<!-- results: end \2 -->)", re.DOTALL)
NOTHING_ON_A_GPU = "Nothing has been timed on a GPU yet. `make gpu` times every op on a CUDA card."
NOT_ON_A_CPU = "Not timed on a CPU."  # a page may omit a block with this content
# README is also shown by package indexes, which resolve no relative links.
RAW = "https://raw.githubusercontent.com/mmfused/mmfused/main"
BENCHMARKS_PAGE = "https://mmfused.github.io/mmfused/benchmarks.html"

_EXPERTS_ON_A_CPU = (
    "on a CPU both compute one product per expert, so there is nothing to gain. If a model on a "
    "CPU already uses torch's grouped_mm, keep it."
)
_PRODUCTS_ON_A_CPU = (
    "on a CPU the layer spends its time in matrix products, which a hand-written layer computes "
    "too, so there is little to gain. If you train on a CPU and have such a layer, keep it."
)
# "device/op/case" (device: cuda or cpu) -> why another provider is faster, and when to use it.
SLOWER = {
    "cpu/gated_cross_attention/uniecs": _PRODUCTS_ON_A_CPU,
    "cpu/gated_cross_attention/uniecs-missing": _PRODUCTS_ON_A_CPU,
    "cpu/grouped_mlp/fluid-256": _EXPERTS_ON_A_CPU,
    "cpu/grouped_mlp/swiglu-e8": _EXPERTS_ON_A_CPU,
    "cpu/grouped_mlp/swiglu-e8-hot": _EXPERTS_ON_A_CPU,
    "cpu/topk_routing/custom-T16384-E16-k2-D0-S1": (
        "routing is a few passes over a small matrix, and `composed` does extra work to choose the "
        "same experts on every backend, even from tied logits. On a CPU use it for that, not for "
        "speed."
    ),
}


# ---- formatting ----------------------------------------------------------------------------------


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def mebibytes(count: int | None) -> str:
    return (
        ""
        if count is None
        else f"{count / 2**20:.0f}"
        if count >= 100 * 2**20
        else f"{count / 2**20:.2g}"
    )


def how_measured(records: list[dict]) -> str:
    """Return a line with the devices, passes, samples, versions and commits of the records.

    Commits may differ, because results of older sources stay valid.
    """
    facts = [record["environment"] for record in records]
    samples = comparison.distinct(sample_count(record) for record in records)
    source = comparison.distinct(
        str(fact["commit"])[:7] + (" with changes" if fact["dirty"] else "") for fact in facts
    )
    dtypes = comparison.distinct(record["dtype"] for record in records)
    made_with = comparison.distinct(map(comparison.versions, records))
    timed = f"{dtypes}, {comparison.passes(records[0])}, medians of {samples} interleaved samples"
    return f"{machine(records)}; {timed}; {made_with}; commit {source}"


def machine(records: list[dict]) -> str:
    """Return the devices of the records; of CPUs, with the number of threads."""
    devices = comparison.distinct(record["environment"]["device"] for record in records)
    if device_type(records[0]) == "cuda":
        return devices
    threads = (f", {record['environment']['threads']} threads" for record in records)
    return devices + comparison.distinct(threads)


def sample_count(record: dict) -> int:
    which = report.longest_pass(record)
    return max(
        len(passes[which])
        for provider in record["providers"].values()
        for passes in provider.get("seconds", {}).values()
        if which in passes
    )


def reasons(rows: list[Comparison]) -> str:
    """Return each explanation of SLOWER that applies, with its cases and the faster providers."""
    slower = [row for row in rows if row.faster is not None]
    unexplained = [row.key for row in slower if row.key not in SLOWER]
    if unexplained:
        raise ValueError(
            f"SLOWER in tools/results_pages.py: got no explanation of {', '.join(unexplained)}, "
            "expected one for each case in which another provider is faster"
        )
    lines: dict[str, list[str]] = {}
    for row in slower:
        seconds, name = row.faster
        case = row.record["case"]["name"]
        title = report.sizes(row.record) if case.startswith("custom-") else f"`{case}`"
        faster = f"{title} ({name} is {row.ours[0] / seconds:.2f} times as fast)"
        lines.setdefault(SLOWER[row.key], []).append(faster)
    return "\n\n".join(
        f"Slower: {'; '.join(cases)}: {explanation}" for explanation, cases in lines.items()
    )


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


# ---- GPUs ----------------------------------------------------------------------------------------


def gpu_block(results: Path) -> str:
    found = []
    for folder in folders(results):
        records = [record for record in read(folder) if device_type(record) == "cuda"]
        if rows := comparisons(records):
            verdicts = [
                verdict for verdict in targets.judge(records) if verdict.row.device == "cuda"
            ]
            found.append(
                paragraphs(
                    picture(folder),
                    f"{how_measured([row.record for row in rows])}.",
                    gpu_table(rows),
                    reasons(rows),
                    f"{targets.count(verdicts)}; `python tools/targets.py` lists them.",
                    rooflines(folder, records),
                )
            )
    return "\n\n".join(found) or NOTHING_ON_A_GPU


def gpu_table(rows: list[Comparison]) -> str:
    lines = []
    for row in rows:
        floor = row.record["floor_seconds"][report.longest_pass(row.record)]
        best = (
            ["none was timed", "", ""]
            if row.best is None
            else [row.best[1], milliseconds(row.best[0]), f"{row.speedup:.2f}"]
        )
        memory = " and ".join(mebibytes(count) or "?" for count in row.memory)
        ours = [row.ours[1], milliseconds(row.ours[0]), f"{floor / row.ours[0]:.0%}"]
        lines.append(
            [
                row.record["op"],
                label(row.record),
                *best[:2],
                *ours[:2],
                best[2],
                ours[2],
                row.launch,
                memory,
            ]
        )
    head = [
        "op",
        "case",
        "best baseline",
        "its time",
        "ours",
        "our time",
        "speed-up",
        "of floor",
        "launch",
        "peak MiB, both",
    ]
    return tables.markdown(head, lines)


def picture(folder: Path) -> str:
    text = f"Speed-up of each case over its best baseline, {folder.name}"
    return f"![{text}](../{in_checkout(folder / 'speedup.png')})"


def rooflines(folder: Path, records: list[dict]) -> str:
    drawn = [path for path in comparison.pictures(records, folder) if path.name != "speedup.png"]
    return "\n\n".join(
        f"![Roofline of {path.name.removesuffix('-roofline.png')}](../{in_checkout(path)})"
        for path in drawn
    )


def in_checkout(path: Path) -> str:
    return f"benchmarks/results/{path.parent.name}/{path.name}"


# ---- CPUs ----------------------------------------------------------------------------------------


def cpu_records(folder: Path) -> list[dict]:
    return [record for record in read(folder) if device_type(record) == "cpu"]


def cpu_block(results: Path) -> str:
    return paragraphs(*(picture(folder) for folder in folders(results) if cpu_records(folder)))


def cpu_rooflines_block(results: Path) -> str:
    return paragraphs(*(rooflines(folder, cpu_records(folder)) for folder in folders(results)))


def cpu_op_block(op: str, results: Path) -> str:
    found = []
    for folder in folders(results):
        records = [record for record in cpu_records(folder) if record["op"] == op]
        if rows := comparisons(records):
            found.append(
                paragraphs(
                    cpu_table(rows),
                    f"({how_measured([row.record for row in rows])}.)",
                    reasons(rows),
                )
            )
    return "\n\n".join(found) or NOT_ON_A_CPU


def cpu_table(rows: list[Comparison]) -> str:
    """Return the time and memory of each provider, ours last; a column per case fits a page."""
    records = [row.record for row in rows]
    ours = with_compiled(ours_of(records[0]["op"]))
    statuses = {
        name: found["gate"]
        for record in records
        for name, found in record["providers"].items()
        if "seconds" in found and name not in ours
    }
    statuses |= {row.ours[1]: "passed" for row in rows}
    lines = []
    for name, status in statuses.items():
        cells = [
            cpu_cell(record["providers"].get(name, {}), report.longest_pass(record))
            for record in records
        ]
        lines.append([name if status == "passed" else f"{name} (a ceiling)", *cells])
    lines.append(["speed-up", *("" if row.best is None else f"{row.speedup:.2f}" for row in rows)])
    return tables.markdown(["", *map(label, records)], lines)


def cpu_cell(provider: dict, which: str) -> str:
    samples = provider.get("seconds", {}).get("eager", {}).get(which)
    if not samples:
        return ""
    median = report.summary(samples)["median"]
    return f"{milliseconds(median)}, {mebibytes(provider['saved_bytes'])} MiB"


# ---- README --------------------------------------------------------------------------------------


def picture_block(results: Path) -> str:
    """Return the speed-ups on the first GPU, or else the first CPU, with a caption."""
    found = {
        folder: [row.record for row in comparisons(read(folder)) if row.best is not None]
        for folder in folders(results)
    }
    shown = [folder for folder, records in found.items() if records]
    folder = max(shown, key=lambda folder: device_type(found[folder][0]) == "cuda")
    records = found[folder]
    where = "above the inputs" if device_type(records[0]) == "cuda" else "kept for the backward"
    dtypes = comparison.distinct(record["dtype"] for record in records)
    speedups = [row.speedup for row in comparisons(records) if row.best is not None]
    caption = (
        f"{machine(records)}, {dtypes}, {comparison.passes(records[0])}: from "
        f"{min(speedups):.2f} to {max(speedups):.2f} times the speed of the fastest baseline that "
        f"passed the accuracy check. Its name is at the bar; beside it, the memory {where}. "
        f"[All results]({BENCHMARKS_PAGE})."
    )
    address = f"{RAW}/{in_checkout(folder / 'speedup.png')}"
    return paragraphs(f"![Speed-up of each case over its best baseline]({address})", caption)


# ---- pages ---------------------------------------------------------------------------------------


def pages(results: Path) -> dict[str, dict[str, str]]:
    """Return the content of each block of each page."""
    ops = {
        "gpu": gpu_block(results),
        "cpu": cpu_block(results),
        "cpu-rooflines": cpu_rooflines_block(results),
    }
    ops |= {f"cpu-{op}": cpu_op_block(op, results) for op in comparison.OPS if op != "models"}
    return {
        "README.md": {"picture": picture_block(results)},
        "docs/benchmarks.md": ops,
        "docs/end-to-end.md": end_to_end_tables.blocks(results / "end_to_end"),
        "docs/models.md": grocery.headlines(results / "grocery"),
        "docs/trained-models.md": grocery.blocks(results / "grocery"),
    }


def fill(page: str, text: str, contents: dict[str, str]) -> str:
    """Replace the text between the markers of each block by ``contents[name]``.

    Content of one line stays on the line of the markers if the old content was there.
    """
    marked = [name for _, name, _, _ in MARKED.findall(text)]
    needed = [name for name, block in contents.items() if block != NOT_ON_A_CPU or name in marked]
    if sorted(marked) != sorted(needed):
        wrong = sorted(
            {name for name in [*marked, *needed] if marked.count(name) != 1 or name not in contents}
        )
        raise ValueError(
            f"{page}: blocks: got {', '.join(wrong)} missing, repeated or unknown, "
            "expected each block once"
        )

    def put(found):
        begin, name, before, end = found.groups()
        newline = "\n" if before.startswith("\n") or "\n" in contents[name] else ""
        return f"{begin}{newline}{contents[name]}{newline}{end}"

    return MARKED.sub(put, text)


def differing(before: str, after: str) -> list[str]:
    """Return the names of the blocks whose content differs."""
    pairs = zip(MARKED.findall(before), MARKED.findall(after), strict=True)
    return [name for (_, name, old, _), (_, _, new, _) in pairs if old != new]


def all_pictures(results: Path) -> dict[Path, tuple[str, comparison.Fill]]:
    found = {}
    for folder in folders(results):
        found |= comparison.pictures(read(folder), folder)
    return found


def draw_all(drawings: dict[Path, tuple[str, comparison.Fill]]) -> None:
    try:
        for path, (numbers, fill_figure) in drawings.items():
            comparison.draw(path, numbers, fill_figure)
    except ImportError:
        print("matplotlib is not installed, so no picture was drawn.")


def run(check: bool) -> int:
    """Update the pages and pictures, or only check them; return 1 if the check fails, else 0."""
    results = ROOT / "benchmarks" / "results"
    drawings = all_pictures(results)
    if not check:  # draw before fill() can raise
        draw_all(drawings)
    stale, filled = [], {}
    for page, contents in pages(results).items():
        before = (ROOT / page).read_text(encoding="utf-8")
        filled[page] = fill(page, before, contents)
        stale += [f"{page}: block {name}" for name in differing(before, filled[page])]
    if check:
        stale += [
            in_checkout(path)
            for path, (numbers, _) in drawings.items()
            if not comparison.is_current(path, numbers)
        ]
        for name in stale:
            print(
                f"{name} differs from the files in benchmarks/results; `make results` updates it."
            )
        return 1 if stale else 0
    for page, text in filled.items():
        if any(name.startswith(f"{page}:") for name in stale):
            report.write(ROOT / page, lambda path, text=text: path.write_text(text, "utf-8"))
    print("\n".join(f"{name} updated" for name in stale) or "All pages are up to date.")
    return 0


def main(argv: list[str] | None = None) -> int:
    about = "Write the measured numbers of README and docs from the files in benchmarks/results."
    parser = argparse.ArgumentParser(prog="tools/results_pages.py", description=about)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit status 1 if a page or a picture is out of date",
    )
    args = parser.parse_args(argv)
    try:
        return run(args.check)
    except (ValueError, OSError) as error:
        print(f"tools/results_pages.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
