"""The conditions of tools/targets.py, and which time of a results file they use.

Speeds are ratios of medians of one run on one GPU. If the floor of a record is under 100 us in
either pass, both sides are judged by CUDA-graph replay. Otherwise both are judged by the launch
that is faster for the baseline, or for the op itself if there is no baseline.
"""

from __future__ import annotations

import importlib
import json
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..benchmarks import report

SMALL_SECONDS = 100e-6
SIGNS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


class NotMeasured(Exception):
    """The files lack what a condition needs; the message gives the reason."""


class Failed(Exception):
    """The op failed the accuracy check: no condition on it is met."""


# ---- records -------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict]:
    """Return all records of a device's folder with their ``file``, except those of quick runs."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "providers" in record and not record.get("quick"):
            records.append(record | {"file": f"{folder.name}/{path.name}"})
    return records


def folders(results: Path) -> list[Path]:
    """Return the folders under ``results``, itself included, that hold records."""
    return [folder for folder in (results, *sorted(results.glob("*/"))) if read(folder)]


def kind(record: dict) -> str:
    return "cuda" if "cuda" in record["environment"] else "cpu"


def ours_of(op: str) -> tuple[str, ...]:
    """Return the providers of an op that are the library's."""
    return importlib.import_module(f"mmfused.benchmarks.{op}").OURS


def compiled_too(names: Iterable[str]) -> list[str]:
    return [label for name in names for label in (name, f"{name}, compiled")]


def is_compiled(label: str) -> bool:
    return label != report.eager_name(label)


def fastest(record: dict, labels: Iterable[str], which: str) -> dict[str, tuple[float, str]]:
    """Return, by launch, the least median of a pass among ``labels``, and its label.

    Only providers that passed the accuracy check and were timed count.
    """
    best: dict[str, tuple[float, str]] = {}
    for label in labels:
        provider = record["providers"].get(label, {})
        if provider.get("gate") != "passed":
            continue
        for launch, passes in provider.get("seconds", {}).items():
            if which in passes:
                entry = report.summary(passes[which])["median"], label
                best[launch] = min(best.get(launch, entry), entry)
    return best


def is_small(record: dict) -> bool:
    floors = record["floor_seconds"]
    return kind(record) == "cuda" and min(floors["forward"], floors["backward"]) < SMALL_SECONDS


def common_launch(
    record: dict,
    ours: dict,
    rivals: dict | None = None,
    strict: bool = True,
) -> str | None:
    """Return the launch that both sides are judged by; None where there is none.

    Without ``strict``, a small case for which graphs are missing is judged by another launch.
    """
    rivals = ours if rivals is None else rivals
    shared = [launch for launch in rivals if launch in ours]
    if is_small(record) and (strict or "graph" in shared):
        shared = [launch for launch in shared if launch == "graph"]
    return min(shared, key=lambda launch: rivals[launch][0], default=None)


# ---- conditions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The record of a row, and those of the op's other cases."""

    record: dict
    ours: str
    others: list[dict]

    def provider(self) -> dict:
        provider = self.record["providers"].get(self.ours, {"gate": "missing", "reasons": []})
        if provider["gate"] == "failed":
            raise Failed("; ".join(provider["reasons"]))
        if "seconds" not in provider:
            raise NotMeasured(
                "; ".join([f"{self.ours}: {provider['gate']}, not timed", *provider["reasons"]])
            )
        return provider

    def times(self, which: str, eager: bool = False) -> dict[str, tuple[float, str]]:
        self.provider()
        return fastest(self.record, [self.ours] if eager else compiled_too([self.ours]), which)

    def launch(self, ours: dict, rivals: dict | None = None) -> str:
        launch = common_launch(self.record, ours, rivals)
        if launch is None:
            raise NotMeasured(
                "no CUDA graph of both sides"
                if is_small(self.record)
                else f"no times of {self.ours} to compare"
            )
        return launch


@dataclass(frozen=True)
class Condition:
    """A bound on a number; ``measure`` returns it with a remark, or raises NotMeasured."""

    what: str
    sign: str
    bound: float
    measure: Callable[[Bench], tuple[float, str]]
    unit: str = " x"

    @property
    def wanted(self) -> str:
        return f"{self.sign} {self.bound:g}{self.unit}"

    def shown(self, value: float, remark: str) -> str:
        return f"{value:.3g}{self.unit}" + (f" ({remark})" if remark else "")


def of_floor(which: str, at_most: float) -> Condition:
    def measure(bench):
        times = bench.times(which)
        seconds, label = times[launch := bench.launch(times)]
        return seconds / bench.record["floor_seconds"][which], f"{label}, {launch}"

    return Condition(f"{which} / floor", "<=", at_most, measure)


def share_of_floor(which: str, at_least: float) -> Condition:
    def measure(bench):
        ratio, remark = of_floor(which, 0).measure(bench)
        return 100 / ratio, remark

    return Condition(f"floor / {which}", ">=", 100 * at_least, measure, " %")


def faster_than(
    *names: str,
    at_least: float,
    which: str = "both",
    form: str = "either",
    ours: str | None = None,
) -> Condition:
    """Require a speed-up over the fastest of ``names``; "*": all that are not the library's.

    ``ours``: a provider other than the row's.
    ``which``: a pass; "step" is the whole training step where there are parameters to train, else
    forward + backward.
    ``form``: which rivals count. "either": the fastest, eager or compiled; "both": the same, but
    compiled ones must have been timed; "compiled": only these; "eager": only these, on both sides.
    """

    def measure(bench):
        bench = bench if ours is None else Bench(bench.record, ours, bench.others)
        bench.provider()  # raises where ours failed, with or without rivals
        over = timed_pass(bench.record, which)
        rivals = fastest_rivals(bench.record, names, form, over)
        mine = bench.times(over, eager=form == "eager")
        launch = bench.launch(mine, rivals)
        ratios = {each: rivals[each][0] / mine[each][0] for each in rivals if each in mine}
        beside = [f"{each} {ratio:.3g} x" for each, ratio in ratios.items() if each != launch]
        return ratios[launch], ", ".join(
            [f"{mine[launch][1]} against {rivals[launch][1]}", launch, *beside]
        )

    rivals = " or ".join(name.replace("*", "all baselines") for name in names)
    forms = {"both": ", compiled", "compiled": ", compiled", "eager": ", eager", "either": ""}
    what = {"both": "forward + backward", "step": "training step"}.get(which, which)
    title = f"{ours or 'speed'} against {rivals}{forms[form]}: {what}"
    return Condition(title, ">=", at_least, measure)


def fastest_rivals(
    record: dict,
    names: tuple[str, ...],
    form: str,
    which: str,
) -> dict[str, tuple[float, str]]:
    """Return the fastest baseline by launch; names and form are those of :func:`faster_than`."""
    own = compiled_too(ours_of(record["op"]))
    labels = compiled_too(names)
    if names == ("*",):
        labels = [label for label in record["providers"] if label not in own]
    compiled = [label for label in labels if is_compiled(label)]
    eager = [label for label in labels if not is_compiled(label)]
    labels = {"compiled": compiled, "eager": eager}.get(form, labels)
    rivals = fastest(record, labels, which)
    if not rivals or (form == "both" and not fastest(record, compiled, which)):
        raise NotMeasured(why_not_timed(record, compiled if form == "both" else labels))
    return rivals


def timed_pass(record: dict, which: str) -> str:
    passes = (
        times
        for provider in record["providers"].values()
        for times in provider.get("seconds", {}).values()
    )
    return "both" if which == "step" and not any("step" in times for times in passes) else which


def why_not_timed(record: dict, labels: list[str]) -> str:
    reasons = []
    for label in labels:
        provider = record["providers"].get(label)
        if provider is not None and "seconds" not in provider:
            reasons.append(f"{label}: {'; '.join([provider['gate'], *provider['reasons']])}")
    return "; ".join(reasons) or f"no {' or '.join(labels)} was timed"


def faster_than_case(other: str, at_least: float) -> Condition:
    def measure(bench):
        mine = bench.times("both")
        others = [record for record in bench.others if record["case"]["name"] == other]
        if not others:
            raise NotMeasured(f"{other} is not measured")
        theirs = Bench(others[0], bench.ours, []).times("both")
        launch = bench.launch(mine, theirs)
        return theirs[launch][0] / mine[launch][0], launch

    return Condition(f"speed against its own on {other}", ">=", at_least, measure)


def memory(key: str, sign: str, gigabytes: float) -> Condition:
    """Bound the memory; ``key``: "peak", above the inputs, or "saved", for the backward."""

    def measure(bench):
        count = bench.provider().get(f"{key}_bytes")
        if count is None:
            raise NotMeasured(f"{key} bytes were not counted")
        return count / 1e9, ""

    return Condition(f"{key} memory", sign, gigabytes, measure, " GB")


def launches(which: str, at_most: int, beside: int = 0) -> Condition:
    """Bound the number of kernels of a pass, without ``beside`` kernels of the benchmark itself."""

    def measure(bench):
        provider = bench.provider()
        total, forward = provider.get("kernels"), provider.get("forward_kernels")
        if total is None or forward is None:
            raise NotMeasured("kernels were not counted")
        return (
            forward if which == "forward" else total - forward
        ) - beside, f"without {beside} of the benchmark" if beside else ""

    return Condition(f"launches {which}", "<=", at_most, measure, "")


def captured_in_graph() -> Condition:
    """Require that a CUDA graph captures the call, hence that it never waits for the host."""

    def measure(bench):
        graph = "graph" in bench.provider()["seconds"]
        return float(graph), "captured" if graph else "; ".join(bench.provider()["reasons"])

    return Condition("CUDA graph: no host sync", ">=", 1, measure, "")
