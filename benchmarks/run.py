"""Gate and time one op against its baselines: ``python benchmarks/run.py OP``, or ``mmfused bench
OP``.

Every provider of a case first passes the accuracy gate, in the shape and with the compiled code
that is then timed. Who fails is reported and not timed; where that is one of the library's own, the
exit code is 1."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

if not __package__:  # run as a file: the checkout it lies in comes first, whatever is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused import ops
from mmfused.benchmarks import measure, report
from mmfused.benchmarks.sources import ROOT, source_hash

OPS = (*ops.OPS, "models")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNFINISHED = 3  # exit code: all is well, and some cases wait for another run
BUDGET_SECONDS = 300.0  # on CUDA, for compiling: the whole run then stays under 9 minutes
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = "runs/bench"  # for what must not replace committed results


def add_arguments(parser: argparse.ArgumentParser, out: str | None = None) -> None:
    """The options of this script and of ``mmfused bench``, which differ in the default of
    ``--out``.
    """
    parser.add_argument("op", metavar="OP", help=f"one of {', '.join(OPS)}")
    option = parser.add_argument
    option("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    sizes = "query_pooling: B, N, D, L queries, H heads; masked_info_nce: B, D, K"
    sizes += "; topk_routing: T, E, k, D, S; grouped_mlp: T, D, I, E, k; gated_cross_attention: B, N, M, D, H; models: none"
    option("--shape", metavar="B=..,N=..", help=f"one case of your own instead ({sizes})")
    option(
        "--dtype",
        metavar="DTYPE",
        help=f"one of {', '.join(DTYPES)} (default: bf16 on CUDA, fp32 on a CPU)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--forward", dest="backward", action="store_false", help="time the forward alone"
    )
    which.add_argument(
        "--backward",
        action="store_true",
        default=True,
        help="time forward, backward and both (default)",
    )
    option(
        "--repeats",
        type=int,
        metavar="N",
        help="samples of each time (default: 31 on CUDA, 21 on a CPU, 3 if --quick)",
    )
    option(
        "--quick",
        action="store_true",
        help="small batches, few samples: shows that all works, not how fast",
    )
    option(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also time everything compiled (default: on CUDA)",
    )
    option(
        "--slice",
        metavar="I/N",
        help="only the I-th of N parts of the cases, to run the parts one by one",
    )
    limit = f"after these seconds compile nothing more, and say so (default: {BUDGET_SECONDS:.0f} on CUDA, else no limit)"
    option("--budget-seconds", type=float, metavar="S", help=limit)
    resume = "pass over cases measured already with these sources, versions and settings; begin none once the budget is spent"
    option("--resume", action="store_true", help=f"{resume} (exit code {UNFINISHED}: some wait)")
    where = out or f"benchmarks/results/<device>, {SCRATCH} if --quick"
    option("--out", default=out, metavar="DIR", help=f"folder for the results (default: {where})")


@dataclass
class Settings:
    """What is asked for, and the machine it is asked of."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    backward: bool
    compiled: bool
    quick: bool
    budget: measure.Budget

    def facts(self) -> dict:
        """What two records must share to be of the same measurement, beside the case and the
        machine.
        """
        names = ("repeats", "backward", "compiled", "quick")
        return {"dtype": str(self.dtype).removeprefix("torch.")} | {
            name: getattr(self, name) for name in names
        }


def run(args: argparse.Namespace) -> int:
    """0: measured; 1: one of the library's own failed the gate; 3: see ``--resume``. Raises
    ValueError on a bad request.
    """
    settings = chosen_settings(args)
    device, op = settings.device, load_op(args.op)
    cases = chosen_cases(args, op, device)
    facts = report.environment(device) | {"source": source_hash(args.op)}
    folder = chosen_folder(args, facts["device"])
    if args.resume:
        known = report.read_records(args.op, folder)
        cases = [
            case
            for case in cases
            if not any(measured(case, settings, facts, record) for record in known)
        ]
        if not cases:
            print(f"{args.op}: all of it is measured already, in {folder}.")
            return 0
    facts |= {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    rates = measure.ceilings(device, settings.dtype)
    flops, moved = rates["flops_per_second"] / 1e12, rates["bytes_per_second"] / 1e9
    print(f"{facts['device']}: {flops:.3g} TFLOP/s, {moved:.4g} GB/s", flush=True)

    records = []
    for case in cases:
        if args.resume and records and settings.budget.spent():
            break
        begun = time.monotonic()
        record = describe(args.op, op, case, settings, rates) | {"environment": facts}
        record["providers"] = measure_case(op, case, settings)
        if hasattr(op, "extras") and not faults_of(op, record):
            record |= op.extras(case, device, settings.dtype)
        record["took_seconds"] = time.monotonic() - begun
        report.write_record(record, folder)
        records.append(record)
    finish(args.op, op, records, folder)
    if faults := [fault for record in records for fault in faults_of(op, record)]:
        print("FAILED the accuracy gate:", *faults, sep="\n  ")
        return 1
    waiting = [case.name for case in cases[len(records) :]]
    if waiting:
        print(f"The budget is spent: {', '.join(waiting)} wait for another run with --resume.")
    return UNFINISHED if waiting else 0


def measured(case, settings: Settings, facts: dict, record: dict) -> bool:
    """Whether ``record`` is of this case, by these sources, versions and settings, green, and
    nothing left out for want of time.
    """
    op, here = load_op(record["op"]), ("device", "versions", "source")
    return (
        record["case"] == asdict(case)
        and record.get("settings") == settings.facts()
        and all(record["environment"].get(name) == facts[name] for name in here)
        and record["providers"].keys() == {label for label, *_ in variants(op, case, settings)}
        and not faults_of(op, record)
        and all(found["gate"] != "skipped" for found in record["providers"].values())
    )


def faults_of(op, record: dict) -> list[str]:
    """What is wrong with the library's own providers of this case, and with what else was measured
    of it.
    """
    case, faults = record["case"]["name"], list(record.get("faults", []))
    for label, found in record["providers"].items():
        if found["gate"] == "failed" and report.eager_name(label) in op.OURS:
            faults += [f"{case}: {label}: {reason}" for reason in found["reasons"]]
    return faults


def describe(name: str, op, case, settings: Settings, rates: dict[str, float]) -> dict:
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


def measure_case(op, case, settings: Settings) -> dict[str, dict]:
    """What to report of each provider. Who fails the gate is not timed."""
    if settings.compiled:
        torch._dynamo.reset()  # what is compiled for one case must not count against the next
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # the last case's blocks have other sizes
    problem = op.make(case, settings.device, settings.dtype)
    gate = measure.Gate(op, case, problem)
    providers, found = {}, {}
    for label, name, mode in variants(op, case, settings):
        if mode is not None and settings.budget.spent():
            provider, why = (
                None,
                f"the budget of {settings.budget.limit:.0f} s was spent before it was compiled",
            )
            found[label] = {"compiled": mode, "gate": "skipped", "reasons": [why]}
        else:
            provider, found[label] = gate.admit(name, mode)
        print(
            f"{case.name}: {label}: {'; '.join([found[label]['gate'], *found[label]['reasons']])}",
            flush=True,
        )
        if provider is not None:
            providers[label] = provider
    del gate  # its float64 results are large
    clock(providers, found, problem, settings)
    return found


def variants(op, case, settings: Settings) -> list[tuple[str, str, str | None]]:
    """(label, provider, compile mode) of all that is measured, the compiled ones last."""
    eager = [(name, name, None) for name in op.PROVIDERS]
    mode = (
        "max-autotune-no-cudagraphs"
        if case.headline and settings.device.type == "cuda"
        else "default"
    )
    return eager + [(f"{name}, compiled", name, mode) for name in op.PROVIDERS if settings.compiled]


def clock(providers: dict, found: dict[str, dict], problem, settings: Settings) -> None:
    """Add memory, kernels and times to what is ``found`` about each provider."""
    for label, provider in providers.items():
        found[label] |= measure.footprint(provider, problem) | {"seconds": {}}
    launches = {
        "eager": measure.eager_seconds(providers, problem, settings.repeats, settings.backward)
    }
    if settings.device.type == "cuda":
        replays, refused = measure.graph_seconds(
            providers, problem, settings.repeats, settings.backward
        )
        launches["graph"] = replays
        for label, why in refused.items():
            found[label]["reasons"].append(why)
    for launch, samples in launches.items():
        for label, passes in samples.items():
            found[label]["seconds"][launch] = passes


def finish(name: str, op, records: list[dict], folder: Path) -> None:
    everything = report.read_records(name, folder)
    report.write_csv(name, everything, folder)
    note = report.draw(name, records, everything, folder)
    for record in records:
        print("", report.table(record, op.OURS), sep="\n")
    print(f"\nRaw samples, CSV and pictures are in {folder}.", *([note] if note else []))


# ---- the request ---------------------------------------------------------------------------------


def load_op(name: str):
    if name not in OPS:
        raise ValueError(f"op: got {name!r}, expected one of {', '.join(OPS)}")
    return importlib.import_module(f"mmfused.benchmarks.{name}")


def chosen_settings(args: argparse.Namespace) -> Settings:
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    dtype = args.dtype or ("bf16" if on_cuda else "fp32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    repeats = (3 if args.quick else 31 if on_cuda else 21) if args.repeats is None else args.repeats
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    limit = BUDGET_SECONDS if args.budget_seconds is None and on_cuda else args.budget_seconds
    compiled = on_cuda if args.compile is None else args.compile
    return Settings(
        device, DTYPES[dtype], repeats, args.backward, compiled, args.quick, measure.Budget(limit)
    )


def chosen_cases(args: argparse.Namespace, op, device: torch.device) -> list:
    if args.shape:
        if args.case or args.slice:
            raise ValueError("shape is given with case or slice; it is one case by itself.")
        return [op.custom(parse_shape(args.shape))]
    cases = {case.name: case for case in op.cases(device.type, args.quick)}
    for name in args.case or ():
        if name not in cases:
            raise ValueError(
                f"case is {name!r}; {args.op} on {device.type} takes one of {', '.join(cases)}."
            )
    return sliced([cases[name] for name in args.case or cases], args.slice)


def chosen_folder(args: argparse.Namespace, device_name: str) -> Path:
    if args.out or args.quick:
        return Path(args.out or SCRATCH)
    return RESULTS / report.slug(device_name)


def sliced(cases: list, part: str | None) -> list:
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
        prog="benchmarks/run.py", description="Gate and time one op against its baselines."
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"benchmarks/run.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
