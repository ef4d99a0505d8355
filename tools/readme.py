"""Write the measured numbers of README, and its pictures, from benchmarks/results.

    python tools/readme.py [--check]

Text between ``<!-- results: begin NAME -->`` and ``<!-- results: end NAME -->`` is replaced;
pictures are drawn beside the results. With ``--check`` nothing is written: the exit code is 1 where
README or a picture differs from the files.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if not __package__:  # run as a file: import this checkout, whatever is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import report, tables
from mmfused.tools import comparison, grocery, targets
from mmfused.tools.comparison import Comparison, comparisons, label
from mmfused.tools.conditions import compiled_too, folders, kind, ours_of, read

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results: begin ([\w-]+) -->)(.*?)(<!-- results: end \2 -->)", re.DOTALL)
NOTHING_ON_A_GPU = (
    "Nothing has been timed on a GPU yet: the numbers below are a CPU's. "
    "`make gpu` times every op on a CUDA card."
)
NOT_ON_A_CPU = "Not timed on a CPU."  # README may omit a block with this content

_EXPERTS_ON_A_CPU = (
    "on a CPU both run one product for each expert, and there is nothing to gain. Where torch's "
    "grouped_mm serves a model on a CPU already, keep it."
)
_PRODUCTS_ON_A_CPU = (
    "on a CPU the layer is its matrix products, which a layer written by hand has too, and there "
    "is little to gain. Who trains on a CPU and has such a layer should keep it."
)
# Why a case is slower than the best baseline, and when not to use the op, by "device/op/case",
# where device is cuda or cpu.
SLOWER = {
    "cpu/gated_cross_attention/uniecs": _PRODUCTS_ON_A_CPU,
    "cpu/gated_cross_attention/uniecs-missing": _PRODUCTS_ON_A_CPU,
    "cpu/grouped_mlp/fluid-256": _EXPERTS_ON_A_CPU,
    "cpu/grouped_mlp/swiglu-e8": _EXPERTS_ON_A_CPU,
    "cpu/grouped_mlp/swiglu-e8-hot": _EXPERTS_ON_A_CPU,
    "cpu/topk_routing/custom-T16384-E16-k2-D0-S1": (
        "routing is a few passes over a small matrix, and `composed` adds what makes it name the "
        "same experts on every backend, also of equals. On a CPU take it for that, not for speed."
    ),
}


# ---- words and numbers ---------------------------------------------------------------------------


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
    """Return the devices, passes, samples, versions and commits of the records, each once.

    Results made with older sources keep their commit, so several may be listed.
    """
    facts = [record["environment"] for record in records]
    threads = (
        ""
        if kind(records[0]) == "cuda"
        else comparison.each_once(f", {fact['threads']} threads" for fact in facts)
    )
    samples = comparison.each_once(sample_count(record) for record in records)
    source = comparison.each_once(
        str(fact["commit"])[:7] + (" with changes" if fact["dirty"] else "") for fact in facts
    )
    machine = comparison.each_once(fact["device"] for fact in facts) + threads
    dtypes = comparison.each_once(record["dtype"] for record in records)
    made_with = comparison.each_once(map(comparison.versions, records))
    timed = f"{dtypes}, {comparison.passes(records[0])}, medians of {samples} interleaved samples"
    return f"{machine}; {timed}; {made_with}; commit {source}"


def sample_count(record: dict) -> int:
    which = report.longest_pass(record)
    return max(
        len(passes[which])
        for provider in record["providers"].values()
        for passes in provider.get("seconds", {}).values()
        if which in passes
    )


def reasons(rows: list[Comparison]) -> str:
    """Return a line for each sentence, with its cases and the provider that is faster."""
    slower = [row for row in rows if row.faster is not None]
    unsaid = [row.key for row in slower if row.key not in SLOWER]
    if unsaid:
        raise ValueError(
            f"SLOWER in tools/readme.py has no sentence for {', '.join(unsaid)}, "
            "slower than another provider"
        )
    lines: dict[str, list[str]] = {}
    for row in slower:
        seconds, name = row.faster
        case = row.record["case"]["name"]
        called = report.sizes(row.record) if case.startswith("custom-") else f"`{case}`"
        faster = f"{called} ({name} is {row.ours[0] / seconds:.2f} times as fast)"
        lines.setdefault(SLOWER[row.key], []).append(faster)
    return "\n\n".join(
        f"Slower: {'; '.join(cases)}: {sentence}" for sentence, cases in lines.items()
    )


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


# ---- GPUs ----------------------------------------------------------------------------------------


def gpu_block(results: Path) -> str:
    found = []
    for folder in folders(results):
        records = [record for record in read(folder) if kind(record) == "cuda"]
        if rows := comparisons(records):
            verdicts = [
                verdict for verdict in targets.judge(records) if verdict.row.device == "cuda"
            ]
            met = f"{targets.count(verdicts)}; `python tools/targets.py` lists them."
            judged = f"{met} {rooflines(folder, records)}"
            measured = f"{how_measured([row.record for row in rows])}."
            found.append(
                paragraphs(
                    picture(folder, "speedup"), measured, gpu_table(rows), reasons(rows), judged
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


def picture(folder: Path, name: str) -> str:
    text = f"{name} of each case over its best baseline, {folder.name}"
    return f"![{text}]({path_in_readme(folder / f'{name}.png')})"


def rooflines(folder: Path, records: list[dict]) -> str:
    drawn = [path for path in comparison.pictures(records, folder) if path.name != "speedup.png"]
    links = ", ".join(
        f"[{path.name.removesuffix('-roofline.png')}]({path_in_readme(path)})" for path in drawn
    )
    return links and f"Rooflines: {links}."


def path_in_readme(path: Path) -> str:
    return f"benchmarks/results/{path.parent.name}/{path.name}"


# ---- CPUs ----------------------------------------------------------------------------------------


def cpu_records(folder: Path) -> list[dict]:
    return [record for record in read(folder) if kind(record) == "cpu"]


def cpu_block(results: Path) -> str:
    shown = [(folder, records) for folder in folders(results) if (records := cpu_records(folder))]
    return "\n\n".join(
        paragraphs(picture(folder, "speedup"), rooflines(folder, records))
        for folder, records in shown
    )


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
    """Return time and memory of each timed provider, in the benchmark's order, ours last."""
    records = [row.record for row in rows]
    own = compiled_too(ours_of(records[0]["op"]))
    checked = {
        name: found["gate"]
        for record in records
        for name, found in record["providers"].items()
        if "seconds" in found and name not in own
    }
    checked |= {row.ours[1]: "passed" for row in rows}
    lines = []
    for row in rows:
        cells = [
            cpu_cell(row.record["providers"].get(name, {}), report.longest_pass(row.record))
            for name in checked
        ]
        lines.append([label(row.record), *cells, "" if row.best is None else f"{row.speedup:.2f}"])
    heads = [
        name if result == "passed" else f"{name} (a ceiling)" for name, result in checked.items()
    ]
    return tables.markdown(["case", *heads, "speed-up"], lines)


def cpu_cell(provider: dict, which: str) -> str:
    samples = provider.get("seconds", {}).get("eager", {}).get(which)
    if not samples:
        return ""
    median = report.summary(samples)["median"]
    return f"{milliseconds(median)}, {mebibytes(provider['saved_bytes'])} MiB"


# ---- README --------------------------------------------------------------------------------------


def blocks(results: Path) -> dict[str, str]:
    found = {"gpu": gpu_block(results), "cpu": cpu_block(results)}
    found |= {f"cpu-{op}": cpu_op_block(op, results) for op in comparison.OPS if op != "models"}
    return found | grocery.blocks(results / "grocery")


def fill(text: str, made: dict[str, str]) -> str:
    """Return ``text`` with each block's content between its markers.

    A block of one line stays on the line of its markers.
    """
    marked = [name for _, name, _, _ in MARKED.findall(text)]
    needed = [name for name, block in made.items() if block != NOT_ON_A_CPU or name in marked]
    if sorted(marked) != sorted(needed):
        wrong = sorted(
            {name for name in [*marked, *needed] if marked.count(name) != 1 or name not in made}
        )
        raise ValueError(
            f"README: got blocks {', '.join(wrong)} missing, twice or unknown, "
            "expected each block once"
        )

    def put(found):
        begin, name, before, end = found.groups()
        apart = "\n" if before.startswith("\n") or "\n" in made[name] else ""
        return f"{begin}{apart}{made[name]}{apart}{end}"

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
        for path, (mark, draw) in drawings.items():
            comparison.draw(path, mark, draw)
    except ImportError:
        print("matplotlib is not installed, so no picture was drawn.")


def run(check: bool) -> int:
    """Return 0 where README and pictures are up to date, or were made so, else 1."""
    readme, results = ROOT / "README.md", ROOT / "benchmarks" / "results"
    before, drawings = readme.read_text(encoding="utf-8"), all_pictures(results)
    if not check:  # before fill, so that pictures are drawn even if README's blocks are wrong
        draw_all(drawings)
    after = fill(before, blocks(results))
    if check:
        stale = [
            path for path, (mark, _) in drawings.items() if not comparison.is_current(path, mark)
        ]
        faults = [
            f"README's block {name} is not what the files under benchmarks/results give"
            for name in differing(before, after)
        ]
        faults += [f"{path_in_readme(path)} shows other results than its files" for path in stale]
        print(
            *(f"{fault}; `make readme` puts it right." for fault in faults),
            sep="\n",
            end="\n" if faults else "",
        )
        return 1 if faults else 0
    if after != before:
        report.write(readme, lambda path: path.write_text(after, encoding="utf-8"))
    changed = differing(before, after)
    print(
        f"{readme.name}: {'changed ' + ', '.join(changed) if changed else 'as the files give it'}."
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    about = "Make README's numbers and pictures from the results."
    parser = argparse.ArgumentParser(prog="tools/readme.py", description=about)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where they differ"
    )
    args = parser.parse_args(argv)
    try:
        return run(args.check)
    except (ValueError, OSError) as error:
        print(f"tools/readme.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
