"""Check and time one op against its baselines.

    python benchmarks/run.py OP        or        mmfused bench OP

Before a provider is timed, its accuracy is checked with the same shape and the same compiled code.
A provider that fails is reported but not timed. The exit status is 1 if a provider of the library
fails. Baselines that compute only a part of the case are timed without a check.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused import ops
from mmfused.benchmarks import charts, measure, report, tables
from mmfused.benchmarks.footprint import footprint
from mmfused.benchmarks.sources import ROOT, source_hash

OPS = (*ops.OPS, "models")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNFINISHED = 3  # exit status if the budget ran out before all cases were measured
LONG_CALL_SECONDS = 0.1  # if every forward takes longer, no CUDA graphs are timed
BUDGET_SECONDS = 300.0  # default of --budget-seconds on CUDA
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = "runs/bench"  # for results of quick runs, which must not replace committed results


def add_arguments(parser: argparse.ArgumentParser, out: str | None = None) -> None:
    """Add the options that this script and ``mmfused bench`` share.

    ``out``: the default of ``--out``.
    """
    parser.add_argument("op", metavar="OP", help=f"one of {', '.join(OPS)}")
    option = parser.add_argument
    option("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    sizes = "; ".join(f"{op}: {load_op(op).SIZES}" for op in ops.OPS)
    option("--shape", metavar="B=..,N=..", help=f"sizes of one custom case to run ({sizes})")
    dtypes = f"one of {', '.join(DTYPES)} (default: bf16 on CUDA, fp32 on a CPU)"
    option("--dtype", metavar="DTYPE", help=dtypes)
    which = parser.add_mutually_exclusive_group()
    forward = "time only the forward"
    which.add_argument("--forward", dest="backward", action="store_false", help=forward)
    both = "time forward, backward and both (default)"
    which.add_argument("--backward", action="store_true", default=True, help=both)
    repeats = "timing samples per provider (default: 31 on CUDA, 21 on a CPU, 3 if --quick)"
    option("--repeats", type=int, metavar="N", help=repeats)
    quick = "use small batches and few samples, to check that everything works"
    option("--quick", action="store_true", help=quick)
    compiled = "also time the providers with torch.compile (default: only on CUDA)"
    option("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    part = "run only the I-th of N parts of the cases"
    option("--slice", metavar="I/N", help=part)
    limit = (
        "seconds after which compiled providers are skipped "
        f"(default: {BUDGET_SECONDS:.0f} on CUDA, else no limit)"
    )
    option("--budget-seconds", type=float, metavar="S", help=limit)
    resume = (
        "skip cases already measured with these sources, versions and settings; start no case "
        f"after --budget-seconds (exit status {UNFINISHED} if not all were measured)"
    )
    option("--resume", action="store_true", help=resume)
    where = out or f"benchmarks/results/<device>, {SCRATCH} if --quick"
    option("--out", default=out, metavar="DIR", help=f"folder for the results (default: {where})")


@dataclass
class Settings:
    """How to measure: the device and the options of the command."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    backward: bool
    compiled: bool
    quick: bool
    budget: measure.Budget

    def facts(self) -> dict[str, Any]:
        """Return the settings that two runs must share for ``--resume`` to skip a case."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "repeats": self.repeats,
            "backward": self.backward,
            "compiled": self.compiled,
            "quick": self.quick,
        }


def run(args: argparse.Namespace) -> int:
    """Measure the requested cases; raise ValueError if an argument is invalid.

    Returns 1 if ``faults_of`` finds a fault, UNFINISHED if the budget ran out before all cases were
    measured, else 0.
    """
    settings = chosen_settings(args)
    device, op = settings.device, load_op(args.op)
    cases = chosen_cases(args, op, device)
    facts = report.environment(device) | {"source": source_hash(args.op)}
    folder = chosen_folder(args, facts["device"])
    if args.resume:
        earlier = report.read_records(args.op, folder)
        cases = [
            case
            for case in cases
            if not any(is_result(record, case, settings, facts) for record in earlier)
        ]
        if not cases:
            print(f"{args.op}: all cases have results in {folder} already.")
            return 0
    facts |= {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    rates = measure.ceilings(device, settings.dtype)
    flops, moved = rates["flops_per_second"] / 1e12, rates["bytes_per_second"] / 1e9
    print(f"{facts['device']}: {flops:.3g} TFLOP/s, {moved:.4g} GB/s", flush=True)

    records = []
    for case in cases:
        if args.resume and records and settings.budget.spent():
            break
        record = measured_record(args.op, op, case, settings, rates) | {"environment": facts}
        report.write_record(record, folder)
        records.append(record)
    finish(args.op, op, records, folder)
    if faults := [fault for record in records for fault in faults_of(op, record)]:
        print("FAILED the accuracy check:", *faults, sep="\n  ")
        return 1
    left = [case.name for case in cases[len(records) :]]
    if left:
        print(f"The budget is spent. Not measured: {', '.join(left)}; continue with --resume.")
    return UNFINISHED if left else 0


def measured_record(
    name: str,
    op: ModuleType,
    case: Any,
    settings: Settings,
    rates: dict[str, float],
) -> dict[str, Any]:
    begun = time.monotonic()
    record = describe(name, op, case, settings, rates)
    record["providers"] = measure_case(op, case, settings)
    if hasattr(op, "extras") and not faults_of(op, record):
        record |= op.extras(case, settings.device, settings.dtype)
    record["took_seconds"] = time.monotonic() - begun
    return record


def is_result(record: dict[str, Any], case: Any, settings: Settings, facts: dict[str, Any]) -> bool:
    """Return whether ``record`` is a complete and accurate result of this case.

    The record must have these settings, and the device, versions, source hash and tuned plans of
    ``facts``. If nothing is to be compiled, it may have compiled providers, even skipped ones.
    """
    op, same = load_op(record["op"]), ("device", "versions", "source", "tuned")
    labels = {label for label, *_ in variants(op, case, settings)}
    found = record["providers"]
    return (
        record["case"] == asdict(case)
        and record.get("settings") in (settings.facts(), settings.facts() | {"compiled": True})
        and all(record["environment"].get(name) == facts.get(name) for name in same)
        and labels <= found.keys()
        and not faults_of(op, record)
        and all(found[label]["gate"] != "skipped" for label in labels)
    )


def faults_of(op: ModuleType, record: dict[str, Any]) -> list[str]:
    """Return the faults that ``extras`` reported and the faults of the library's providers."""
    case, faults = record["case"]["name"], list(record.get("faults", []))
    for label, found in record["providers"].items():
        if found["gate"] == "failed" and report.eager_name(label) in op.OURS:
            faults += [f"{case}: {label}: {reason}" for reason in found["reasons"]]
    return faults


def describe(
    name: str,
    op: ModuleType,
    case: Any,
    settings: Settings,
    rates: dict[str, float],
) -> dict[str, Any]:
    work = op.work(case, settings.dtype.itemsize)
    return {
        "op": name,
        "case": asdict(case),
        "settings": settings.facts(),
        "dtype": settings.facts()["dtype"],
        "backward": settings.backward,
        "quick": settings.quick,
        "backward_is": "both minus forward, sample by sample",
        "ceilings": rates,
        "work": work,
        "floor_seconds": measure.floor_seconds(work, rates),
    }


def measure_case(op: ModuleType, case: Any, settings: Settings) -> dict[str, dict[str, Any]]:
    """Check and time each variant of each provider; return label -> entry for the record."""
    # So that the recompilation limit counts for each case; on CUDA, FlexAttention is compiled too.
    if settings.compiled or settings.device.type == "cuda":
        torch._dynamo.reset()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # free the memory of the previous case, which had other sizes
    problem = op.make(case, settings.device, settings.dtype)
    check = measure.AccuracyCheck(op, case, problem)
    providers, found = {}, {}
    for label, name, mode in variants(op, case, settings):
        if mode is not None and settings.budget.spent():
            limit = settings.budget.limit
            reason = f"the budget of {limit:.0f} s was spent before it was compiled"
            provider, entry = None, {"compiled": mode, "gate": "skipped", "reasons": [reason]}
        else:
            provider, entry = check.admit(name, mode)
        print(f"{case.name}: {label}: {'; '.join([entry['gate'], *entry['reasons']])}", flush=True)
        found[label] = entry
        if provider is not None:
            providers[label] = provider
    del check  # free its float64 results, which are large
    time_providers(providers, found, problem, settings)
    return found


def variants(op: ModuleType, case: Any, settings: Settings) -> list[tuple[str, str, str | None]]:
    """Return (label, provider, compile mode) of each variant to measure; compiled ones are last."""
    found: list[tuple[str, str, str | None]] = [(name, name, None) for name in op.PROVIDERS]
    autotuned = case.headline and settings.device.type == "cuda"
    mode = "max-autotune-no-cudagraphs" if autotuned else "default"
    if settings.compiled:
        found += [(f"{name}, compiled", name, mode) for name in op.PROVIDERS]
    return found


def time_providers(
    providers: dict[str, measure.Provider],
    found: dict[str, dict[str, Any]],
    problem: measure.Problem,
    settings: Settings,
) -> None:
    """Add memory, kernels and times to the entry of each provider in ``found``."""
    for label, provider in providers.items():
        found[label] |= footprint(provider, problem) | {"seconds": {}}
    arguments = (providers, problem, settings.repeats, settings.backward)
    launches = {"eager": measure.eager_seconds(*arguments)}
    # Nothing is left of what a launch costs in a case whose calls are long.
    shortest = min((min(passes["forward"]) for passes in launches["eager"].values()), default=0.0)
    if settings.device.type == "cuda" and shortest < LONG_CALL_SECONDS:
        launches["graph"], without_graph = measure.graph_seconds(*arguments)
        for label, reason in without_graph.items():
            found[label]["reasons"].append(reason)
    for launch, samples in launches.items():
        for label, passes in samples.items():
            found[label]["seconds"][launch] = passes


def finish(name: str, op: ModuleType, records: list[dict[str, Any]], folder: Path) -> None:
    """Write the CSV and the pictures, and print the tables."""
    all_records = report.read_records(name, folder)
    report.write_csv(name, all_records, folder)
    note = charts.draw(name, records, all_records, folder)
    for record in records:
        print("", tables.table(record, op.OURS), sep="\n")
    print(f"\nAll samples, the CSV and the pictures are in {folder}.", *([note] if note else []))


# ---- arguments -----------------------------------------------------------------------------------


def load_op(name: str) -> ModuleType:
    if name not in OPS:
        raise ValueError(f"op: got {name!r}, expected one of {', '.join(OPS)}")
    return importlib.import_module(f"mmfused.benchmarks.{name}")


def chosen_settings(args: argparse.Namespace) -> Settings:
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    dtype = args.dtype or ("bf16" if on_cuda else "fp32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    default = 3 if args.quick else 31 if on_cuda else 21
    repeats = default if args.repeats is None else args.repeats
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    limit = BUDGET_SECONDS if args.budget_seconds is None and on_cuda else args.budget_seconds
    compiled = on_cuda if args.compile is None else args.compile
    return Settings(
        device=device,
        dtype=DTYPES[dtype],
        repeats=repeats,
        backward=args.backward,
        compiled=compiled,
        quick=args.quick,
        budget=measure.Budget(limit),
    )


def chosen_cases(args: argparse.Namespace, op: ModuleType, device: torch.device) -> list[Any]:
    if args.shape:
        if args.case or args.slice:
            raise ValueError(f"shape: got {args.shape!r} with case or slice, expected shape alone")
        return [op.custom(parse_shape(args.shape))]
    cases = {case.name: case for case in op.cases(device.type, args.quick)}
    for name in args.case or ():
        if name not in cases:
            names = ", ".join(cases)
            raise ValueError(
                f"{args.op} on {device.type}: case: got {name!r}, expected one of {names}"
            )
    return sliced([cases[name] for name in args.case or cases], args.slice)


def chosen_folder(args: argparse.Namespace, device_name: str) -> Path:
    if args.out or args.quick:
        return Path(args.out or SCRATCH)
    return RESULTS / report.slug(device_name)


def sliced(cases: list[Any], part: str | None) -> list[Any]:
    if part is None:
        return cases
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"slice: got {part!r}, expected I/N with 1 <= I <= N, such as 1/3")
    return cases[int(index) - 1 :: int(count)]


def parse_shape(text: str) -> dict[str, int]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(size.isdigit() for _, _, size in pairs):
        raise ValueError(f"shape: got {text!r}, expected sizes such as B=8,N=197")
    return {name.strip(): int(size) for name, _, size in pairs}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py", description="Check and time one op against its baselines."
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"benchmarks/run.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
