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
from mmfused.tools import comparison, end_to_end_tables, grocery, outcome, targets
from mmfused.tools.comparison import Comparison, comparisons, label
from mmfused.tools.conditions import device_type, folders, ours_of, read, with_compiled
from mmfused.tools.results_text import (
    how_measured,
    in_checkout,
    machine,
    mebibytes,
    milliseconds,
    paragraphs,
)

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


# ---- slower rows ---------------------------------------------------------------------------------


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


# ---- GPUs ----------------------------------------------------------------------------------------


def gpu_block(results: Path) -> str:
    found = []
    for folder, records in cards(results).items():
        rows = comparisons(records)
        verdicts = [verdict for verdict in targets.judge(records) if verdict.row.device == "cuda"]
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


def cards(results: Path) -> dict[Path, list[dict]]:
    """Return the records of each GPU, by folder; only those in which the library was timed."""
    found = {
        folder: [record for record in read(folder) if device_type(record) == "cuda"]
        for folder in folders(results)
    }
    return {folder: records for folder, records in found.items() if comparisons(records)}


def status_line(results: Path) -> str:
    """Return a sentence: the GPUs on which the library was timed."""
    on = ", ".join(machine(records) for records in cards(results).values())
    return f"Timed on {on}." if on else "Nothing has been timed on a GPU yet."


def picture_block(results: Path) -> str:
    """Return each GPU's picture, table and rooflines; without a GPU, the picture of the first CPU.

    The table has the cases of the targets, and below it why any of them is slower.
    """
    shown = list(cards(results)) or [f for f in folders(results) if comparisons(read(f))][:1]
    return "\n\n".join(readme_part(folder) for folder in shown)


def readme_part(folder: Path) -> str:
    rows = comparisons(read(folder))
    address = f"{RAW}/{in_checkout(folder / 'speedup.png')}"
    parts = [
        f"![Speed-up of each case over its best baseline]({address})",
        caption([row for row in rows if row.best is not None]),
    ]
    if device_type(rows[0].record) == "cuda":
        wanted = {(row.op, row.case) for row in targets.ROWS}
        aimed = [row for row in rows if (row.record["op"], row.record["case"]["name"]) in wanted]
        parts += [gpu_table(aimed) if aimed else "", reasons(aimed), roofline_links(folder)]
    return paragraphs(*parts)


def caption(rows: list[Comparison]) -> str:
    records = [row.record for row in rows]
    if not records:
        return ""
    where = "above the inputs" if device_type(records[0]) == "cuda" else "kept for the backward"
    dtypes = comparison.distinct(record["dtype"] for record in records)
    speedups = [row.speedup for row in rows if row.speedup is not None]
    return (
        f"{machine(records)}, {dtypes}, {comparison.passes(records[0])}: from "
        f"{min(speedups):.2f} to {max(speedups):.2f} times the speed of the fastest baseline that "
        f"passed the accuracy check. Its name is at the bar; beside it, the memory {where}. "
        f"[All results]({BENCHMARKS_PAGE})."
    )


def roofline_links(folder: Path) -> str:
    """Return links to the rooflines, in one line."""
    links = (
        f"[{path.name.removesuffix('-roofline.png')}]({RAW}/{in_checkout(path)})"
        for path in comparison.pictures(read(folder), folder)
        if path.name != "speedup.png"
    )
    return f"Rooflines: {', '.join(links)}."


# ---- pages ---------------------------------------------------------------------------------------


def pages(results: Path) -> dict[str, dict[str, str]]:
    """Return the content of each block of each page."""
    status = {"status": status_line(results)}
    ops = {
        "gpu": gpu_block(results),
        "cpu": cpu_block(results),
        "cpu-rooflines": cpu_rooflines_block(results),
    }
    ops |= {f"cpu-{op}": cpu_op_block(op, results) for op in comparison.OPS if op != "models"}
    return {
        "README.md": status | {"picture": picture_block(results)},
        **dict.fromkeys(("docs/index.md", "docs/platforms.md", "docs/reliability.md"), status),
        "benchmarks/NOTES.md": {"outcome": outcome.block(results)},
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
