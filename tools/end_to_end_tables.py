"""Format the tables of docs/end-to-end.md from the results of tools/end_to_end.py.

All numbers are those of one GPU's part of the paper's batch: its samples through the encoders, the
rows of its samples in an in-batch loss, and the optimizer's step.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from ..benchmarks import tables

BASELINE = "torch modules"
GIB = 2**30
# AdamW reads a parameter, its gradient and two moments, and writes all but the gradient.
ADAMW_BYTES = 7 * 4
MODELS = ("fluid", "uniecs", "unica", "moon2", "unite")
Totals = dict[str, dict[str, float]]  # "whole" or an op -> measure -> number


def blocks(folder: Path) -> dict[str, str]:
    """Return the content of each block of the page."""
    records = [json.loads((folder / f"{name}.json").read_text("utf-8")) for name in MODELS]
    found = {
        "speed": speed_table(records),
        "memory": memory_table(records),
        "ops": ops_table(records),
        "fewer-encoders": variants_table(records),
        "batches": batches_table(records),
        "how-counted": how_counted(records),
    }
    found |= {f"summary-{record['model']}": summary(record) for record in records}
    return {f"end-to-end-{name}": content for name, content in found.items()}


# ---- totals --------------------------------------------------------------------------------------


def counts(record: dict, variant: str, backend: str, batch: int | None = None) -> Totals:
    """Return the counts of one GPU's part of ``batch``, by default the paper's batch.

    The encode phase was counted at two batch sizes; it grows linearly.
    """
    found, setup = record["counted"]["variants"][variant][backend], record["setup"]
    batch = batch or setup["batch"]
    local = batch / setup["gpus"]
    (small, low), (large, high) = ((int(size), x) for size, x in found["encode"].items())

    def line(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
        slopes = {key: (b[key] - a[key]) / (large - small) for key in a}
        return {key: a[key] + slopes[key] * (local - small) for key in a}

    totals = {"whole": line(low["whole"], high["whole"])}
    totals |= {op: line(low["ops"][op], high["ops"][op]) for op in low["ops"]}
    if found["compare"]:
        compared = found["compare"][str(batch)]
        for name, added in {"whole": compared["whole"], **compared["ops"]}.items():
            before = totals.setdefault(name, dict.fromkeys(added, 0.0))
            totals[name] = {key: before[key] + x / setup["gpus"] for key, x in added.items()}
    if "bytes" in totals["whole"]:
        totals["whole"]["bytes"] += ADAMW_BYTES * trained(record, variant)
    return totals


def trained(record: dict, variant: str) -> float:
    """Return the number of parameters that one GPU's optimizer updates."""
    found = record["counted"]["variants"][variant][BASELINE]["parameters"]["trained"]
    return found / (record["setup"]["gpus"] if record["setup"]["sharded"] else 1)


def states(record: dict, variant: str) -> float:
    """Return the bytes of parameters, gradients and AdamW's moments on one GPU, in float32."""
    parameters = record["counted"]["variants"][variant][BASELINE]["parameters"]
    share = record["setup"]["gpus"] if record["setup"]["sharded"] else 1
    return 4 * (parameters["all"] + 3 * parameters["trained"]) / share


def seconds(record: dict, backend: str) -> dict[str, float]:
    """Return the seconds of one GPU's part of the paper's batch on the CPU, by op.

    "whole" is the whole step, which is timed with plain PyTorch only.
    """
    timed, setup = record["timed"], record["setup"]
    samples = timed["samples"][backend]

    def medians(found: list[dict]) -> dict[str, float]:
        out = {op: median(x["ops"][op] for x in found) for op in found[0]["ops"]}
        timed_whole = "whole" in found[0]
        return out | ({"whole": median(x["whole"] for x in found)} if timed_whole else {})

    phases = {key: medians(found) for key, found in samples["encode"].items()}
    totals = dict(phases["1+1"])
    for more, added, layers in zip(("2+1", "1+8"), (1, 7), setup["layers"] or (), strict=False):
        for name in totals:
            if more == "2+1" or name == "whole":  # no op is in the vision tower
                layer = (phases[more][name] - phases["1+1"][name]) / added
                totals[name] += (layers - 1) * layer
    scale = setup["batch"] / setup["gpus"] / timed["batch"]
    totals = {name: scale * spent for name, spent in totals.items()}
    if samples["compare"]:
        for name, spent in medians(samples["compare"]["all"]).items():
            totals[name] = totals.get(name, 0.0) + spent / setup["gpus"]
    if "whole" in totals:
        totals["whole"] += timed["adamw_per_parameter"] * trained(record, "published")
    return totals


def share(totals: Totals, key: str) -> float:
    return sum(x[key] for name, x in totals.items() if name != "whole") / totals["whole"][key]


def share_of_time(spent: dict[str, float]) -> float:
    return sum(x for name, x in spent.items() if name != "whole") / spent["whole"]


def shares(record: dict) -> dict[str, float]:
    """Return the ops' shares of the published step in plain PyTorch."""
    plain = counts(record, "published", BASELINE)
    time = share_of_time(seconds(record, BASELINE))
    return {"flops": share(plain, "flops"), "bytes": share(plain, "bytes"), "time": time}


def most(*found: float) -> float:
    """Return the speed-up if the largest of the shares vanished."""
    return 1 / (1 - max(found))


def memory(record: dict, variant: str) -> dict[str, float]:
    """Return the bytes of one GPU: states, activations with each backend, and the saving."""
    plain = counts(record, variant, BASELINE)
    fused = counts(record, variant, "fused")
    of_ops, ours = (
        sum(found["saved"] for name, found in totals.items() if name != "whole")
        for totals in (plain, fused)
    )
    saving = plain["whole"]["saved"] - fused["whole"]["saved"]
    fixed = states(record, variant)
    total = fixed + plain["whole"]["saved"]
    return {
        "states": fixed,
        "activations": plain["whole"]["saved"],
        "ops": of_ops,
        "ours": ours,
        "saving": saving,
        "share": saving / total,
    }


# ---- formatting ----------------------------------------------------------------------------------


def percent(x: float) -> str:
    if x <= 0:
        return "none"
    if x < 1e-6:
        return "< 0.0001 %"
    return f"{100 * x:.1f} %" if x >= 5e-4 else f"{100 * x:.1g} %"


def memory_size(count: float) -> str:
    if count <= 0:
        return "none"
    value, unit = (count / GIB, "GiB") if count >= 0.1 * GIB else (1024 * count / GIB, "MiB")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.2g} {unit}"


def times(x: float) -> str:
    return f"{x:.2f}×"


def batch_of(record: dict) -> str:
    setup = record["setup"]
    return f"{setup['batch'] // setup['gpus']} of {setup['batch']} {setup['unit']}"


def speed_table(records: list[dict]) -> str:
    head = ["model", "batch of a GPU", "FLOPs", "bytes", "CPU time", "at most", "on this CPU"]
    lines = []
    for record in records:
        found, plain, ours = shares(record), seconds(record, BASELINE), seconds(record, "composed")
        # The rest of the step is the same work. Its time varies more than the ops take.
        change = sum(ours[op] - plain[op] for op in plain if op != "whole")
        gain = plain["whole"] / (plain["whole"] + change)
        cells = [percent(found[key]) for key in ("flops", "bytes", "time")]
        bound = times(most(*found.values()))
        lines.append([record["setup"]["title"], batch_of(record), *cells, bound, times(gain)])
    return tables.markdown(head, lines)


def memory_table(records: list[dict]) -> str:
    head = ["model", "parameters, gradients, AdamW", "activations", "made by the ops"]
    head += ["the same, fused", "saved", "of the whole"]
    lines = []
    for record in records:
        found = memory(record, "published")
        keys = ("states", "activations", "ops", "ours", "saving")
        cells = [memory_size(found[key]) for key in keys]
        lines.append([record["setup"]["title"], *cells, percent(found["share"])])
    return tables.markdown(head, lines)


def ops_table(records: list[dict]) -> str:
    head = ["model", "op", "FLOPs", "bytes", "CPU time", "composed: FLOPs", "bytes", "CPU time"]
    lines = []
    for record in records:
        plain = counts(record, "published", BASELINE)
        ours = counts(record, "published", "composed")
        spent, our_time = seconds(record, BASELINE), seconds(record, "composed")
        for op in (name for name in plain if name != "whole"):
            of_whole = [percent(plain[op][key] / plain["whole"][key]) for key in ("flops", "bytes")]
            ratios = [f"{ours[op][key] / plain[op][key]:.2f}" for key in ("flops", "bytes")]
            cells = [*of_whole, percent(spent[op] / spent["whole"]), *ratios]
            cells.append(f"{our_time[op] / spent[op]:.2f}")
            lines.append([record["setup"]["title"], op, *cells])
    return tables.markdown(head, lines)


VARIANTS = {
    "frozen": "encoders frozen",
    "tokens": "tokens precomputed",
}
PICTURES = "image tokens precomputed"


def variants_table(records: list[dict]) -> str:
    head = ["model", "encoders", "FLOPs", "bytes", "at most"]
    head += ["activations", "saved", "of the whole"]
    lines = []
    for record in records:
        for variant in record["counted"]["variants"]:
            if variant == "published":
                continue
            text = VARIANTS[variant]
            if variant == "tokens" and not record["setup"]["freezable"]:
                text = PICTURES
            plain, kept = counts(record, variant, BASELINE), memory(record, variant)
            found = [share(plain, key) for key in ("flops", "bytes")]
            cells = [*map(percent, found), times(most(*found)), memory_size(kept["activations"])]
            cells += [memory_size(kept["saving"]), percent(kept["share"])]
            lines.append([record["setup"]["title"], text, *cells])
    return tables.markdown(head, lines)


def batches_table(records: list[dict]) -> str:
    """Return the share of FLOPs by batch, for the models with an in-batch loss."""
    shown = [record for record in records if counts_by_batch(record)]
    sizes = sorted(set.intersection(*(set(counts_by_batch(record)) for record in shown)))
    lines = []
    for record in shown:
        found = [counts(record, "published", BASELINE, size) for size in sizes]
        cells = [percent(totals["InfoNCE"]["flops"] / totals["whole"]["flops"]) for totals in found]
        lines.append([record["setup"]["title"], *cells])
    return tables.markdown(["batch on all GPUs", *(f"{size}" for size in sizes)], lines)


def counts_by_batch(record: dict) -> list[int]:
    return [int(size) for size in record["counted"]["variants"]["published"][BASELINE]["compare"]]


def summary(record: dict) -> str:
    found, kept = shares(record), memory(record, "published")
    return (
        f"The ops take {percent(found['flops'])} of the FLOPs, {percent(found['bytes'])} of the "
        f"bytes and {percent(found['time'])} of the time on this CPU: at most "
        f"{times(most(*found.values()))} the speed. {memory_saved(kept)}"
    )


def memory_saved(kept: dict[str, float]) -> str:
    if kept["saving"] <= 0:
        return "The kernels save no memory."
    size, share_of_whole = memory_size(kept["saving"]), percent(kept["share"])
    return f"The kernels save {size} of a GPU's memory, {share_of_whole} of what the step needs."


def how_counted(records: list[dict]) -> str:
    """Return the machine, versions and commits of the results."""
    parts: dict[str, Any] = {}
    for record in records:
        for part in ("counted", "timed"):
            facts = record[part]["environment"]
            versions = facts["versions"]
            parts.setdefault("torch", set()).add(versions["torch"])
            parts.setdefault("mmfused", set()).add(versions["mmfused"])
            parts.setdefault("commit", set()).add(str(facts["commit"])[:7])
        machine = record["timed"]["environment"]
        parts.setdefault("device", set()).add(f"{machine['device']}")
    said = {key: ", ".join(sorted(values)) for key, values in parts.items()}
    return (
        f"{said['device']}, one thread, float32; torch {said['torch']}, mmfused {said['mmfused']}; "
        f"commit {said['commit']}."
    )
