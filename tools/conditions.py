"""The conditions of tools/targets.py, and the choice of the times to compare.

A benchmark times each provider with one or two launches: "eager" calls and, on a GPU, replay of a
CUDA "graph". A speed-up is a ratio of medians with the same launch. Small cases are compared with
the launch "graph". A case on a GPU is small if the floor (least possible time) of its forward or
its backward is under 100 us. Other cases are compared with the launch with which the baseline is
faster. A condition without a baseline uses the launch with which the library is faster.
"""

from __future__ import annotations

import importlib
import json
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..benchmarks import report

SMALL_SECONDS = 100e-6  # cases with a lower floor are compared by CUDA graph replay
SIGNS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


class NotMeasured(Exception):
    """The results lack a number that a condition needs; the message gives the reason."""


class Failed(Exception):
    """The op failed the accuracy check, so it meets no condition."""


# ---- records -------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict]:
    """Return the records in a device's folder, except those of quick runs.

    The key "file" of a record is its path relative to the parent of ``folder``.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "providers" in record and not record.get("quick"):
            records.append(record | {"file": f"{folder.name}/{path.name}"})
    return records


def folders(results: Path) -> list[Path]:
    """Return ``results`` and its subfolders, except folders without records."""
    return [folder for folder in (results, *sorted(results.glob("*/"))) if read(folder)]


def device_type(record: dict) -> str:
    return "cuda" if "cuda" in record["environment"] else "cpu"


def ours_of(op: str) -> tuple[str, ...]:
    """Return the names of an op's providers that belong to the library."""
    return importlib.import_module(f"mmfused.benchmarks.{op}").OURS


def with_compiled(names: Iterable[str]) -> list[str]:
    return [label for name in names for label in (name, f"{name}, compiled")]


def is_compiled(label: str) -> bool:
    return label != report.eager_name(label)


def fastest(record: dict, labels: Iterable[str], which: str) -> dict[str, tuple[float, str]]:
    """Return launch -> (median seconds of pass ``which``, label) of the fastest of ``labels``.

    Only providers that passed the accuracy check count.
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
    return (
        device_type(record) == "cuda" and min(floors["forward"], floors["backward"]) < SMALL_SECONDS
    )


def common_launch(
    record: dict,
    ours: dict,
    rivals: dict | None = None,
    strict: bool = True,
) -> str | None:
    """Return the launch whose times are compared, or None if the times cannot be compared.

    ``strict``: compare a small case only by CUDA graph. If false, another launch is used if one
    side has no graph.
    """
    rivals = ours if rivals is None else rivals
    shared = [launch for launch in rivals if launch in ours]
    if is_small(record) and (strict or "graph" in shared):
        shared = [launch for launch in shared if launch == "graph"]
    return min(shared, key=lambda launch: rivals[launch][0], default=None)


# ---- conditions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The data that a condition reads: a record, a provider's name, and all records of the op."""

    record: dict
    ours: str
    op_records: list[dict]

    def provider(self) -> dict:
        """Return the entry of ``ours``; raise Failed or NotMeasured if it was not timed."""
        provider = self.record["providers"].get(self.ours, {"gate": "missing", "reasons": []})
        if provider["gate"] == "failed":
            raise Failed("; ".join(provider["reasons"]))
        if "seconds" not in provider:
            raise NotMeasured(
                "; ".join([f"{self.ours}: {provider['gate']}, not timed", *provider["reasons"]])
            )
        return provider

    def times(self, which: str, eager: bool = False) -> dict[str, tuple[float, str]]:
        """Return the fastest time of ``ours`` by launch; ``eager``: ignore the compiled variant."""
        self.provider()
        return fastest(self.record, [self.ours] if eager else with_compiled([self.ours]), which)

    def launch(self, ours: dict, rivals: dict | None = None) -> str:
        launch = common_launch(self.record, ours, rivals)
        if launch is None:
            raise NotMeasured(
                "the two sides do not both have a CUDA graph"
                if is_small(self.record)
                else f"no times of {self.ours} to compare"
            )
        return launch


@dataclass(frozen=True)
class Condition:
    """A bound on a number. ``measure`` returns the number and a remark, or raises NotMeasured."""

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
    """Bound the time of a pass, as a multiple of the floor."""

    def measure(bench):
        times = bench.times(which)
        seconds, label = times[launch := bench.launch(times)]
        return seconds / bench.record["floor_seconds"][which], f"{label}, {launch}"

    return Condition(f"{which} / floor", "<=", at_most, measure)


def share_of_floor(which: str, at_least: float) -> Condition:
    """Bound the floor, as a share of the time of a pass."""

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
    """Require a speed-up over the fastest of the baselines ``names``; "*" means all baselines.

    ``ours``: the provider to compare, if not the provider of the row.
    ``which``: a pass. "step" means the training step, or forward + backward if the case has no
    parameters to train.
    ``form``: the baselines that count. "either": eager and compiled ones. "both": eager and
    compiled ones, and a compiled one must have been timed. "compiled": only compiled ones.
    "eager": only eager ones, and ours must be eager too.
    """

    def measure(bench):
        bench = bench if ours is None else Bench(bench.record, ours, bench.op_records)
        bench.provider()  # raises if ours failed, even if no baseline was timed
        timed = timed_pass(bench.record, which)
        rivals = fastest_rivals(bench.record, names, form, timed)
        mine = bench.times(timed, eager=form == "eager")
        launch = bench.launch(mine, rivals)
        ratios = {each: rivals[each][0] / mine[each][0] for each in rivals if each in mine}
        others = [f"{each} {ratio:.3g} x" for each, ratio in ratios.items() if each != launch]
        return ratios[launch], ", ".join(
            [f"{mine[launch][1]} against {rivals[launch][1]}", launch, *others]
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
    """Return the fastest baseline by launch; ``names`` and ``form`` as in :func:`faster_than`."""
    ours = with_compiled(ours_of(record["op"]))
    labels = with_compiled(names)
    if names == ("*",):
        labels = [label for label in record["providers"] if label not in ours]
    compiled = [label for label in labels if is_compiled(label)]
    eager = [label for label in labels if not is_compiled(label)]
    labels = {"compiled": compiled, "eager": eager}.get(form, labels)
    rivals = fastest(record, labels, which)
    if not rivals or (form == "both" and not fastest(record, compiled, which)):
        raise NotMeasured(why_not_timed(record, compiled if form == "both" else labels))
    return rivals


def timed_pass(record: dict, which: str) -> str:
    """Return ``which``, but "both" instead of "step" if no provider has times of a step."""
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
    return "; ".join(reasons) or f"{', '.join(labels)}: not timed"


def faster_than_case(other: str, at_least: float) -> Condition:
    """Require a speed-up over the same provider on the case ``other``."""

    def measure(bench):
        mine = bench.times("both")
        others = [record for record in bench.op_records if record["case"]["name"] == other]
        if not others:
            raise NotMeasured(f"{other} is not measured")
        theirs = Bench(others[0], bench.ours, []).times("both")
        launch = bench.launch(mine, theirs)
        return theirs[launch][0] / mine[launch][0], launch

    return Condition(f"speed against ours on {other}", ">=", at_least, measure)


def memory(key: str, sign: str, gigabytes: float) -> Condition:
    """Bound the "peak" memory above the inputs, or the memory "saved" for the backward."""

    def measure(bench):
        count = bench.provider().get(f"{key}_bytes")
        if count is None:
            raise NotMeasured(f"{key} memory was not measured")
        return count / 1e9, ""

    return Condition(f"{key} memory", sign, gigabytes, measure, " GB")


def launches(which: str, at_most: int, extra: int = 0) -> Condition:
    """Bound the number of kernels of a pass, not counting ``extra`` kernels of the benchmark."""

    def measure(bench):
        provider = bench.provider()
        total, forward = provider.get("kernels"), provider.get("forward_kernels")
        if total is None or forward is None:
            raise NotMeasured("kernels were not counted")
        return (
            forward if which == "forward" else total - forward
        ) - extra, f"not counting {extra} of the benchmark" if extra else ""

    return Condition(f"launches {which}", "<=", at_most, measure, "")


def captured_in_graph() -> Condition:
    """Require that a CUDA graph was captured, which is possible only without host syncs."""

    def measure(bench):
        graph = "graph" in bench.provider()["seconds"]
        return float(graph), "captured" if graph else "; ".join(bench.provider()["reasons"])

    return Condition("CUDA graph: no host sync", ">=", 1, measure, "")
