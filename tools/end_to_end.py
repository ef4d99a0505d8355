"""Count and time how much of a whole training step the ops take, for docs/end-to-end.md.

    python tools/end_to_end.py [MODEL ...] [--only count|time] [--repeats N] [--out FOLDER]

A model's results are written to OUT/MODEL.json, and `make results` writes the page. Counting runs
on fake tensors, which need no memory. Timing runs on this machine's CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

import mmfused
from mmfused import library
from mmfused import models as our_models
from mmfused.benchmarks import report, torch_functions, torch_modules
from mmfused.models import MOON2Config, UNITEConfig
from mmfused.models.weights import on_meta
from mmfused.ops.gated_cross_attention import functional
from mmfused.ops.grouped_mlp.composed import segment_linear
from mmfused.tools.end_to_end_count import OPS, counted, recording, with_upstream
from mmfused.tools.end_to_end_steps import (
    HOSTED,
    SETUPS,
    Step,
    Variant,
    enlarged,
    windows_of,
    without_data_dependence,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "end_to_end"
BASELINE = "torch modules"
BATCHES = (256, 1024, 4096, 16384)  # at which the compare phase is counted beside the paper's
STATES = 1 << 22  # elements of each of 8 tensors on which AdamW is timed
SHORT = 0.2  # seconds
DEPTHS = ((1, 1), (2, 1), (1, 8))  # layers of a host's language model and vision tower


def namespace(backend: str) -> Any:
    return torch_modules.models() if backend == BASELINE else our_models


def using(backend: str) -> Any:
    return nullcontext() if backend == BASELINE else mmfused.backend(backend)


# ---- counting ------------------------------------------------------------------------------------


@contextmanager
def fake() -> Iterator[None]:
    """Run on fake CPU tensors, on which ``fused`` is accepted, since no kernel runs.

    Values of integer tensors are kept, because Qwen2-VL's vision tower needs the sizes of pictures.
    torch's fake grouped_mm rejects float32, so an operator of the same shapes replaces it. The
    cross-attention of ``composed`` need not look which samples lack a modality, since none does.
    """

    def product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return segment_linear(rows, weight, None, offsets)

    with (
        mock.patch.object(library, "KERNELS_ON_CPU", True),
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 1 << 16),
        mock.patch.object(torch_functions, "grouped_product", product),
        mock.patch.object(torch_modules, "grouped_product", product),
        mock.patch.object(functional, "samples_to_compute", lambda *_: None),
        fake_tensor.FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def count(
    name: str,
    backend: str,
    variant: Variant,
    preset: str = "paper",
) -> dict[str, Any]:
    """Count the encode phase at two batch sizes, and the compare phase at the paper's and others.

    Each phase has the counts of the whole phase, and of each op in it with its backward.
    """
    with on_meta():
        step = Step(name, namespace(backend), variant, preset)
    tower = variant != "tokens"
    windows = {size: windows_of(step, size) if tower else None for size in step.setup.counted}
    out: dict[str, Any] = {"encode": {}, "compare": {}}
    with fake(), using(backend):
        step.model.to_empty(device="cpu")
        held = step.parameters
        out["parameters"] = {
            "all": sum(p.numel() for p in held),
            "trained": sum(p.numel() for p in held if p.requires_grad),
        }
        encoded: Any = None
        for size in step.setup.counted:
            batch = step.batch(size)

            def encode(batch=batch, size=size):
                nonlocal encoded
                with without_data_dependence(step, windows[size]):
                    encoded = step.encode(batch)
                return encoded

            inputs = [x for part in batch.values() for x in part.values()]
            out["encode"][size] = phase(step, encode, inputs)
        sizes = BATCHES if (backend, variant) == (BASELINE, "published") else ()
        for size in sorted({step.setup.batch, *sizes}):
            leaves = enlarged(encoded, size)
            inputs = [x for part in leaves.values() for x in part.values()]
            out["compare"][size] = phase(step, functools.partial(step.compare, leaves), inputs)
    return out


def phase(step: Step, run: Callable[[], Any], inputs: list[Tensor]) -> dict[str, Any]:
    """Return the counts of a phase and of its ops."""
    with recording(step.model) as calls:
        whole = counted(run, [*step.parameters, *inputs], step.live)
    step.model.zero_grad()
    ops = {op: dict.fromkeys(whole, 0.0) for op in OPS}
    for call in calls:
        found = counted(call, [*call.parameters, *call.inputs], step.live)
        ops[call.op] = {key: value + found[key] for key, value in ops[call.op].items()}
        step.model.zero_grad()
    return {"whole": whole, "ops": {op: found for op, found in ops.items() if any(found.values())}}


# ---- timing --------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], parameters: list[Tensor]) -> float:
    """Return the CPU time of ``run()`` and its backward; making the upstream gradient is excluded.

    Other processes affect CPU time less than they affect the time on the clock.
    """
    for parameter in parameters:
        parameter.grad = None
    start = time.process_time()
    out = run()
    forward = time.process_time() - start
    leaves, upstream = with_upstream(out)
    start = time.process_time()
    if leaves:
        torch.autograd.backward(leaves, upstream)
    return forward + time.process_time() - start


def timed(name: str, repeats: int, preset: str = "paper") -> dict[str, Any]:
    """Time both phases with plain PyTorch, and the ops in them with ``composed`` too.

    The encode phase of a hosted model is timed with few layers (``DEPTHS``). One model at a time is
    in memory.
    """
    setup, depth = SETUPS[name], (2, 8) if name in HOSTED else None
    depths = DEPTHS if depth else DEPTHS[:1]
    samples: dict[str, Any] = {}
    for backend in (BASELINE, "composed"):
        torch.manual_seed(0)
        found: dict[str, Any] = {"encode": {}, "compare": {}}
        step = Step(name, namespace(backend), preset=preset, depth=depth)
        batch, whole = step.batch(setup.timed), backend == BASELINE
        with using(backend):
            leaves = enlarged(step.encode(batch), setup.batch)
            for repeat in range(repeats):
                for layers in depths if whole else depths[:2]:  # no op is in the vision tower
                    with step.layers(*layers):
                        spent = times_of(step, functools.partial(step.encode, batch), whole)
                    found["encode"].setdefault("{}+{}".format(*layers), []).append(spent)
                spent = times_of(step, functools.partial(step.compare, leaves), whole)
                found["compare"].setdefault("all", []).append(spent)
                print(f"{name}: {backend}: timed {repeat + 1} of {repeats}", flush=True)
        samples[backend] = found
        del step, leaves
        gc.collect()
    return {"batch": setup.timed, "adamw_per_parameter": adamw_seconds(), "samples": samples}


def times_of(step: Step, run: Callable[[], Any], whole: bool) -> dict[str, Any]:
    """Return the seconds of a phase if ``whole``, and of the ops in it when they run alone.

    Short ops run again, so that no time contains the work of a first call.
    """
    found: dict[str, Any] = {"ops": {}}
    with recording(step.model) as calls:
        if whole:
            found["whole"] = seconds(run, step.parameters)
        else:
            run()
    step.model.zero_grad()
    for call in calls:
        parameters = [*call.parameters, *(x for x in call.inputs if x.is_leaf)]
        spent = seconds(call, parameters)
        if spent < SHORT:
            spent = statistics.median(seconds(call, parameters) for _ in range(5))
        found["ops"][call.op] = found["ops"].get(call.op, 0.0) + spent
        step.model.zero_grad()
    return found


def adamw_seconds() -> float:
    """Return the seconds of torch's AdamW for each parameter, timed on 32 million parameters."""
    weights = [torch.randn(STATES, requires_grad=True) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer, spent = torch.optim.AdamW(weights), []
    for _ in range(4):
        start = time.process_time()
        optimizer.step()
        spent.append(time.process_time() - start)
    return statistics.median(spent[1:]) / (8 * STATES)


# ---- results -------------------------------------------------------------------------------------


def variants_of(name: str) -> dict[Variant, tuple[str, ...]]:
    """Return the backends that are counted for each variant."""
    found: dict[Variant, tuple[str, ...]] = {"published": (BASELINE, "composed", "fused")}
    if SETUPS[name].freezable:
        found["frozen"] = (BASELINE, "fused")
    return found | {"tokens": (BASELINE, "fused")}


def keep_saved(found: dict[str, Any]) -> None:
    """Drop the FLOPs and bytes of ``fused``, whose kernels move more than their operators show."""
    for sizes in (found["encode"], found["compare"]):
        for phase_found in sizes.values():
            for counts in (phase_found["whole"], *phase_found["ops"].values()):
                del counts["flops"], counts["bytes"]


def facts_of(name: str) -> dict[str, Any]:
    """Return the model's setup, and the layers of its host's language model and vision tower."""
    found, layers = dataclasses.asdict(SETUPS[name]), None
    if name in HOSTED:
        host = (MOON2Config if name == "moon2" else UNITEConfig).PRESETS["paper"]["host"]
        layers = (host["text_config"]["num_hidden_layers"], host["vision_config"]["depth"])
    return found | {"layers": layers}


def update(path: Path, **values: Any) -> None:
    record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    text = json.dumps(record | values, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write(path, lambda part: part.write_text(text, "utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/end_to_end.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SETUPS)}; default: all")
    parser.add_argument("--only", choices=("count", "time"), help="run only this part")
    parser.add_argument("--repeats", type=int, default=2, help="samples of each time")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # waiting threads would add to the CPU time
    unknown = set(args.models) - set(SETUPS)
    if unknown:
        parser.error(f"models: got {', '.join(sorted(unknown))}, expected {', '.join(SETUPS)}")
    for name in args.models or SETUPS:
        path, facts = args.out / f"{name}.json", report.environment(torch.device("cpu"))
        update(path, model=name, setup=facts_of(name))
        if args.only != "time":
            start, found = time.perf_counter(), {}
            for variant, backends in variants_of(name).items():
                found[variant] = {backend: count(name, backend, variant) for backend in backends}
                if "fused" in found[variant]:
                    keep_saved(found[variant]["fused"])
                gc.collect()
            update(path, counted={"environment": facts, "variants": found})
            print(f"{name}: counted in {time.perf_counter() - start:.0f} s", flush=True)
        if args.only != "count":
            update(path, timed={"environment": facts, **timed(name, args.repeats)})
            gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
