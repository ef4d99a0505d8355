"""Write results: for each case a JSON record with all samples, for each op a CSV of all cases."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mmfused
from mmfused import tuned_file

from .sources import source_facts

PASSES = ("forward", "backward", "both", "step")
PACKAGES = ("torch", "triton", "timm", "transformers", "liger-kernel", "numpy")


# ---- the environment -----------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device and commit; values that cannot be read are None."""
    versions: dict[str, str | None] = {
        "mmfused": mmfused.__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    machine = {
        "device": device_name(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions} | machine | cuda_facts(device) | source_facts()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # on Linux, where platform.processor() is often empty
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"model name\s*:\s*(.+)", text):
            return f"CPU {found[1].strip()}"
    return f"CPU {platform.processor() or platform.machine()}"


def cuda_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    try:
        clock = torch.cuda.clock_rate(device)
    except (ImportError, RuntimeError):  # torch needs pynvml to read the clock
        clock = None
    capability = torch.cuda.get_device_capability(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    return {
        "cuda": torch.version.cuda,
        "cuda_driver": driver,
        "capability": capability,
        "sm_clock_mhz": clock,
        "tuned": tuned_facts(device),
    }


def tuned_facts(device: torch.device) -> str | None:
    """Return the name and a hash of the file whose plans run, or None for the library's plans."""
    found = tuned_file.of_device(device.index or 0)
    if found is None or found.path is None:
        return None
    return f"{found.path.name}, {hashlib.sha256(found.path.read_bytes()).hexdigest()[:16]}"


def slug(name: str) -> str:
    """Return the folder name for a device name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


# ---- files ---------------------------------------------------------------------------------------


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace the file ``path`` atomically; ``fill`` writes a temporary file in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stem(record: dict[str, Any]) -> str:
    """Return the name of the record's files, without a suffix."""
    return f"{record['op']}-{record['case']['name']}-{record['dtype']}"


def write_record(record: dict[str, Any], folder: Path) -> None:
    write_json(record, folder / f"{stem(record)}.json")


def write_json(record: dict[str, Any], path: Path) -> None:
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    # Write each list of numbers on one line, because there are many samples.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    write(path, lambda path: path.write_text(text, encoding="utf-8"))


def read_records(op: str, folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"{op}-*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [record for record in records if record["op"] == op]


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median and the 10th and 90th percentiles."""
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place % 1)

    return {"median": statistics.median(ordered), "p10": quantile(0.1), "p90": quantile(0.9)}


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row of the CSV for each provider, launch and pass that was timed."""
    facts = record["environment"]
    common = {
        "op": record["op"],
        "case": record["case"]["name"],
        "dtype": record["dtype"],
        "device": facts["device"],
    }
    source = {"commit": facts["commit"], "dirty": facts["dirty"]}
    found = []
    for name, provider in record["providers"].items():
        memory = {key: provider.get(key) for key in ("peak_bytes", "saved_bytes", "kernels")}
        for launch, passes in provider.get("seconds", {}).items():
            for which in (which for which in PASSES if which in passes):
                labels = {
                    "provider": name,
                    "compiled": provider["compiled"],
                    "launch": launch,
                    "pass": which,
                }
                times = statistics_of(record, which, passes[which])
                found.append(common | labels | times | memory | source)
    return found


def statistics_of(record: dict[str, Any], which: str, samples: list[float]) -> dict[str, float]:
    times = summary(samples)
    floor = record["floor_seconds"]["both" if which == "step" else which]
    return {f"{key}_seconds": value for key, value in times.items()} | {
        "samples": len(samples),
        "floor_seconds": floor,
        "fraction_of_floor": floor / times["median"],
    }


def write_csv(op: str, records: list[dict[str, Any]], folder: Path) -> None:
    table = [row for record in records for row in rows(record)]

    def fill(path):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)

    if table:
        write(folder / f"{op}.csv", fill)


# ---- names ---------------------------------------------------------------------------------------


def eager_name(label: str) -> str:
    """Return the name of a provider from the label of its eager or compiled variant."""
    return label.removesuffix(", compiled")


def longest_pass(record: dict[str, Any]) -> str:
    """Return "both", or "forward" if no backward was timed."""
    return "both" if record["backward"] else "forward"


def headline(record: dict[str, Any]) -> str:
    return f"{record['op']} {record['case']['name']}: {sizes(record)} {record['dtype']}"


def sizes(record: dict[str, Any]) -> str:
    """Return the integer fields of a case that have one-letter names, such as "B=2 N=16 D=32"."""
    return " ".join(
        f"{key}={value}"
        for key, value in record["case"].items()
        if type(value) is int and len(key) == 1
    )
