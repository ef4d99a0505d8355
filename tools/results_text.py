"""How the pages of results_pages.py show times, memory, and how something was measured."""

from __future__ import annotations

from pathlib import Path

from mmfused.benchmarks import report
from mmfused.tools import comparison
from mmfused.tools.conditions import device_type


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


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def in_checkout(path: Path) -> str:
    """Return the path of a file in a device's folder of results, relative to the checkout."""
    return f"benchmarks/results/{path.parent.name}/{path.name}"
