"""Tune on this machine's GPU, and keep what is faster in the file that the library reads."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from mmfused.benchmarks import measure, report, run  # pyright: ignore[reportMissingImports]

from .. import tuned_file
from ..library import INTERPRETED
from ..tuned_file import Tuned
from . import features, settings
from .calls import Plans, Problem, problem_of
from .case import CaseTuner, Key, key_of
from .compile import Compiler
from .dry import dropped_of, dry_run
from .journal import Journal, table
from .options import Chosen, Options
from .timing import Timer
from .verify import Verifier

UNCHANGED = "the library's"


def tune(options: Options) -> int:
    """Tune, or list what would be tuned.

    Returns 0, or ``run.UNFINISHED`` if the budget did not suffice.

    Raises:
        ValueError: there is no GPU, or the file to write is that of another GPU.
    """
    if INTERPRETED:
        raise ValueError(
            "tune: TRITON_INTERPRET: got '1', expected it unset, because it disables compilation"
        )
    if options.dry_run:
        return 0 if dry_run(options) else run.UNFINISHED
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise ValueError(
            "tune: got no CUDA GPU, expected one to time plans on; --dry-run works without"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    # As Ctrl-C does, so that a run that is stopped is told from a plan that ended it. A kernel that
    # hangs lets neither pass.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with library_only(), Compiler(options.jobs, for_this_gpu=True) as compiler:
        return Tuning(options, device, compiler).run()


@contextlib.contextmanager
def library_only() -> Iterator[None]:
    """Let the library's own plans, form and router run, and not those of a tuned file."""
    caches = (tuned_file.of_device, tuned_file._read_once)
    with mock.patch.dict(os.environ, {tuned_file.VARIABLE: "off"}):
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@dataclass
class Decided:
    """What was decided about an op.

    Attributes:
        plans: the plan of each call of ``plan()`` that was tuned, which may be the library's.
        calls: these calls.
        measured: a record for people for each case.
    """

    plans: dict[Key, Any] = field(default_factory=dict)
    calls: dict[Key, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)


class Tuning:
    """One run of the command on a GPU.

    Args:
        options: what to tune.
        device: the GPU.
        compiler: compiles candidates; None: candidates are not compiled before they run.
        timer: makes what times a case; see :class:`.timing.Timer`.
    """

    def __init__(
        self,
        options: Options,
        device: torch.device,
        compiler: Compiler | None,
        timer: Any = Timer,
    ) -> None:
        self.options, self.device, self.compiler, self.timer = options, device, compiler, timer
        self.begun: float = time.monotonic()
        self.environment: dict[str, Any] = report.environment(device)
        self.card: str = self.environment["device"]
        triton = self.triton = tuned_file.triton_version() or "none"
        self.path: Path = options.out or tuned_file.default_folder()
        if options.out is None or self.path.is_dir():
            self.path /= tuned_file.file_name(self.card, triton)
        self.file: Tuned = self._file()
        self.records: list[dict[str, Any]] = []
        self.left: list[str] = []

    def run(self) -> int:
        """Tune all cases; what is decided is written after each of them."""
        for chosen in self.options.chosen:
            decided = Decided()
            for case in chosen.cases:
                if self.left:
                    self.left.append(f"{chosen.op} {case.name}")
                else:
                    self._tune_case(chosen, case, decided)
            if self.options.whole:
                self._tune_settings(chosen)
        self._print_end()
        return run.UNFINISHED if self.left else 0

    def spent(self) -> bool:
        """Return whether the budget is spent."""
        limit = self.options.budget_seconds
        return limit is not None and time.monotonic() - self.begun >= limit

    def _print_end(self) -> None:
        print("", table(self.records), "", sep="\n")
        print(f"Plans are in {self.path}, all samples in {self.path.with_suffix('')}.")
        if self.left:
            print(f"Left for another run of the same command: {', '.join(self.left)}.")

    # ---- one case --------------------------------------------------------------------------------

    def _tune_case(self, chosen: Chosen, case: Any, decided: Decided) -> None:
        name = f"{chosen.op} {case.name}"
        arguments = (self.device, self.options.dtype, self.options.arch)
        try:
            problem = problem_of(chosen.op, chosen.module, case, *arguments)
            journal = self._journal(chosen.op, case.name, asdict(case), base_of(problem, decided))
            if not journal.finished and self.spent():
                self.left.append(name)
                return
            if not journal.finished:
                print(f"{name}: tuning", flush=True)
                self._search(chosen, case, decided, journal, problem)
        except (measure.Unavailable, torch.OutOfMemoryError) as error:
            facts = self._facts(chosen.op, case.name, asdict(case), None)
            self.records.append({"facts": facts, "skipped": measure.first_line(error)})
            return
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.records.append(journal.record)
        if "skipped" in journal.record:
            return
        if not journal.finished:
            self.left.append(name)
        self._decide(chosen.op, case, problem, journal, decided)

    def _search(
        self,
        chosen: Chosen,
        case: Any,
        decided: Decided,
        journal: Journal,
        problem: Problem,
    ) -> None:
        """Tune a case, and write its journal."""
        verifier = Verifier(chosen.op, chosen.module, case, self.device, self.options.dtype)
        if verifier.drops():
            reason = "it drops values, so results of different plans cannot be compared"
            journal.write(finished=True, skipped=reason)
            return
        tried = journal.tried(problem)
        timer = self.timer(
            chosen.module,
            case,
            self.device,
            self.options.dtype,
            problem,
            self.options.repeats,
            lambda plans: journal.note_running(problem, plans),
        )

        if not timer({"": problem.default()}):
            journal.write(finished=True, skipped="the library's own plans cannot be timed")
            return

        def why_refused(plans: Plans) -> str | None:
            entries = problem.entries(plans)
            if self.compiler and (reason := features.why_refused(entries, self.compiler)):
                return reason
            journal.note_running(problem, plans)
            reason = verifier.why_refused(entries)
            journal.note_running(problem, None)
            return reason

        def why_dropped(best: Plans, plans: Any) -> dict[str, str]:
            if self.compiler is None:
                return {}
            return dropped_of(problem, case.name, best, dict(plans), self.compiler)

        tuner = CaseTuner(
            problem,
            decided.plans,
            timer,
            why_refused,
            why_dropped,
            self.spent,
            lambda search: journal.write_search(problem, search),
        )
        steps = list(journal.record.get("steps", ()))
        try:
            outcome = tuner.run(tried, journal.plans(problem, "best"), steps)
        except (KeyboardInterrupt, SystemExit):  # the plan that runs is not to blame
            journal.note_running(problem, None)
            raise
        journal.write_outcome(problem, outcome)

    def _decide(
        self,
        op: str,
        case: Any,
        problem: Problem,
        journal: Journal,
        decided: Decided,
    ) -> None:
        """Take over what a case's journal says, and write the file."""
        plans, record = journal.plans(problem, "plans"), journal.record
        if plans is None:
            return
        for i, (call, plan) in enumerate(zip(problem.reached, plans.plans, strict=True)):
            key = key_of(call)
            if key not in decided.plans or i in record["vetoed"]:
                decided.plans[key], decided.calls[key] = plan, call
        seconds = {name: median(samples) for name, samples in record["seconds"].items()}
        decided.measured.append(
            {
                "op": op,
                "case": case.name,
                "dtype": record["facts"]["dtype"],
                "default_seconds": seconds.get("default"),
                "tuned_seconds": seconds.get("best" if record["kept"] else "base"),
                "commit": record["environment"].get("commit"),
            }
        )
        self._write(op, decided)

    def _write(self, op: str, decided: Decided, **settings: Any) -> None:
        """Write what was decided about an op beside what the file says now.

        Another process may have written it, which tunes another op on another GPU.
        """
        self.file = self._file()
        merge(self.file, op, decided)
        for name, value in settings.items():
            setattr(self.file, name, value)
        tuned_file.write(self.path, self.file)

    # ---- the form of pooling, and the router -----------------------------------------------------

    def _tune_settings(self, chosen: Chosen) -> None:
        if chosen.op == "query_pooling":
            cases = settings.pooling_cases(chosen.module)
            times = self._setting(chosen, "form", cases, settings.form_seconds)
            if times is not None:
                both = [
                    settings.Pair(settings.saving(case), **settings.medians(times[case.name]))
                    for case in cases
                    if len(times[case.name]) == 2
                ]
                from ..ops.query_pooling.composed import ABSORBED_MUST_SAVE

                factor = settings.best_factor(both, ABSORBED_MUST_SAVE["cuda"])
                self._write(chosen.op, Decided(), absorbed_must_save=factor)
                print(f"query_pooling: absorbed_must_save: {factor or UNCHANGED}")
        elif chosen.op == "topk_routing":
            cases = [case for case in chosen.cases if not case.D]
            times = self._setting(chosen, "router", cases, settings.router_seconds)
            if times is not None:
                both = [(t["triton"], t["cuda"]) for t in times.values() if len(t) == 2]
                router: Any = settings.faster_router(both)
                self._write(chosen.op, Decided(), router=router)
                print(f"topk_routing: router: {router or UNCHANGED}")

    def _setting(
        self,
        chosen: Chosen,
        name: str,
        cases: list[Any],
        seconds: Any,
    ) -> dict[str, dict[str, list[float]]] | None:
        """Time the cases that the journal lacks; return all times, None if the budget is spent."""
        facts = {"cases": [asdict(case) for case in cases]}
        journal = self._journal(chosen.op, f"setting-{name}", facts, None)
        times = dict(journal.record.get("seconds", {}))
        for case in (case for case in cases if case.name not in times):
            if self.left or self.spent():
                self.left.append(f"{chosen.op} {name}")
                return None
            arguments = (self.device, self.options.dtype, self.options.repeats)
            try:
                times[case.name] = seconds(chosen.module, case, *arguments)
            except torch.OutOfMemoryError:
                times[case.name] = {}
            journal.write(seconds=times, finished=len(times) == len(cases))
        return times

    # ---- files -----------------------------------------------------------------------------------

    def _journal(self, op: str, name: str, shape: dict[str, Any], base: Any) -> Journal:
        facts = self._facts(op, name, shape, base)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        path = self.path.with_suffix("") / f"{op}-{name}-{facts['dtype']}.json"
        return Journal(path, facts, self.environment | {"started": started})

    def _facts(self, op: str, name: str, shape: dict[str, Any], base: Any) -> dict[str, Any]:
        """Return what a record must have in common with this run to be continued."""
        versions = self.environment["versions"]
        return {
            "op": op,
            "case": name,
            "shape": shape,
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "repeats": self.options.repeats,
            "device": self.card,
            "versions": {package: versions[package] for package in ("torch", "triton")},
            "source": tuned_file.sources_of(op),
            "base": base,
        }

    def _file(self) -> Tuned:
        """Return what the file to write holds already."""
        triton = self.triton
        fresh = Tuned(card=self.card, triton=triton)
        if not self.path.exists():
            return fresh
        try:
            found = tuned_file.read(self.path)
        except ValueError as error:
            if self.options.out is not None:  # it may be a file of something else
                raise ValueError(f"--out: {error}") from error
            print(f"{error}; it is written again.", flush=True)
            return fresh
        if (found.card, found.triton) != (self.card, triton):
            raise ValueError(
                f"--out: got {str(self.path)!r}, which is for {found.card} and Triton "
                f"{found.triton}, expected a file for {self.card} and Triton {triton}"
            )
        return found


def base_of(problem: Problem, decided: Decided) -> list[dict[str, Any]]:
    """Return the plans of a case that earlier cases have decided, for its journal."""
    return [
        {"call": i, "plan": tuned_file.encode(decided.plans[key_of(call)])}
        for i, call in enumerate(problem.reached)
        if key_of(call) in decided.plans
    ]


def merge(file: Tuned, op: str, decided: Decided) -> None:
    """Replace what a file says about the decided calls of an op, and keep the rest.

    What was found with other sources of the op's kernels is removed.
    """
    from mmfused.kernels.tuned import Entry

    source = tuned_file.sources_of(op)
    stale = file.sources.get(op) != source
    file.entries = [
        entry
        for entry in file.entries
        if entry.op != op or not (stale or key_of(entry) in decided.plans)
    ]
    file.entries += [
        Entry(call.op, call.arguments, call.default, decided.plans[key])
        for key, call in decided.calls.items()
        if decided.plans[key] != call.default
    ]
    cases = {(op, one["case"], one["dtype"]) for one in decided.measured}
    file.measured = [
        one
        for one in file.measured
        if (one["op"], one["case"], one["dtype"]) not in cases and not (stale and one["op"] == op)
    ]
    file.measured += decided.measured
    file.sources[op] = source
    if stale and op == "query_pooling":
        file.absorbed_must_save = None
    if stale and op == "topk_routing":
        file.router = None
