"""Random calls of every public function, compared with the float64 reference.

    # Run one case, and print its inputs and fault.
    python tests/fuzzing.py --function masked_info_nce --seed 123
    # Run new cases in several processes. The exit status is 1 if a case fails.
    python tests/fuzzing.py --minutes 60

A function and a seed determine a case. The seed draws shapes, dtypes, memory layouts and options
(function_inputs.py), and the backend: composed or fused. Values that the function must not read may
be NaN or infinite, and newly allocated memory holds garbage.

There are three kinds of cases. Most check that values and gradients stay within the error budget.
Some write NaN or infinity into one row of an input, and check the other rows of the results.
Some make one argument invalid, and check that the error names the argument.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

# Must be set before triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from drawing import NON_FINITE, Draw
from function_inputs import MAKERS
from fuzz_refusals import refusal_faults
from public_functions import (
    differentiable,
    garbage_in_new_memory,
    has_kernels,
    in_float64,
    leaves,
    replaced,
    run,
)
from strided_views import DEVICE, SAME_VALUES, lay_out
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmfused
from mmfused.random import uniform
from mmfused.testing import over_budget

ROUTERS = ("topk_routing", "topk_routing_from_input")
# The interpreter truncates where hardware rounds to bfloat16, so the kernels are tested with
# bfloat16 only on a GPU.
DTYPES = {
    "composed": [torch.float32] * 4 + [torch.float16, torch.bfloat16, torch.float64],
    "fused": [torch.float32] * 3 + [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"),
}
# function -> the input whose row i (along dimension 0) affects only row i of the outputs
ROWS = {
    "query_pooling": "x",
    "gated_cross_attention": "context",
    "bidirectional_gated_cross_attention": "a",
    "masked_info_nce": "query",
    "topk_routing": "logits",
    "topk_routing_from_input": "x",
    "grouped_mlp": "x",
}
ROW_OUTPUTS = ("out", "lse", "out0", "out1", "indices", "weights")
NEIGHBOURS = (6, 40)  # numbers of neighbouring inputs; 40 only if a fault remains after 6


class Case:
    """A call of one function, drawn from one seed."""

    def __init__(self, function: str, seed: int):
        self.function, self.seed = function, seed
        rng = self.random = random.Random(f"{function} {seed} how")
        self.backend = "fused" if has_kernels(function) and rng.random() < 0.6 else "composed"
        self.dtype = rng.choice(DTYPES[self.backend])
        drawn = rng.random()
        self.kind = (
            "refusal" if drawn < 0.06 else "row" if drawn < 0.14 and function in ROWS else "values"
        )
        fixed = {}
        if self.backend == "fused":
            fixed = dict(form=rng.choice(("auto", "absorbed")), margin=False, norm_of_two=False)
        if self.kind == "row":
            fixed |= dict(
                reduction="none", symmetric=False, dropout=False, jitter=False, packed=False
            )
        self.inputs = MAKERS[function](
            Draw(f"{function} {seed}", self.dtype, fixed=fixed, layouts=self.kind == "values")
        )
        self.wanted = differentiable(function, self.inputs)
        if rng.random() < 0.3:
            self.wanted = [path for path in self.wanted if rng.random() < 0.5]
        self.layout = rng.choice((*SAME_VALUES, "expanded first", "expanded last"))
        self.repeats = rng.random() < 0.15
        self.checkpointed = rng.random() < 0.15
        self.silent = rng.random() < 0.2  # some outputs get no upstream gradient
        attends = self.backend == "composed" and (
            "attention" in function or function == "query_pooling"
        )
        self.attention = rng.choice(("torch's own", "math")) if attends else "none"
        large_logits = function == "query_pooling" and "scale" in self.inputs
        in_16_bits = "attention" in function and self.dtype in (torch.float16, torch.bfloat16)
        self.delta_is_rounded = self.attention == "torch's own" or (
            self.backend == "fused" and (large_logits or in_16_bits)
        )

    def describe(self) -> str:
        how = f"{self.kind} on {self.backend}, {self.dtype}, upstream {self.layout}"
        lines = [f"{self.function}, seed {self.seed}: {how}, attention {self.attention}"]
        for path, x in leaves(self.inputs).items():
            finite = "" if not x.is_floating_point() or x.isfinite().all() else ", not finite"
            name = str(x.dtype).removeprefix("torch.")
            grad = ", wanted" if path in self.wanted else ""
            place = f"strides {x.stride()} at {x.storage_offset()}"
            lines.append(f"  {path}: {name} {tuple(x.shape)}, {place}{finite}{grad}")
        options = {
            name: value
            for name, value in self.inputs.items()
            if not leaves(value) and not isinstance(value, Tensor)
        }
        return "\n".join([*lines, f"  {options}"])

    def upstream(self, name: str, out: Tensor) -> Tensor | None:
        """Draw the upstream gradient of an output, the same in all runs of the case."""
        rng = random.Random(f"{self.function} {self.seed} {name}")
        if self.silent and rng.random() < 0.5:
            return None
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        values = (
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(self.dtype).double()
        )
        return lay_out(values, self.layout)

    def run(self, inputs: dict, backend: str, checkpointed: bool = False, **options) -> dict:
        torch.manual_seed(self.seed)  # for dropout and jitter if no seed tensor is passed
        options = dict(wanted=self.wanted, upstream=self.upstream, layout=self.layout) | options
        with sdpa_kernel(SDPBackend.MATH) if self.attention == "math" else nullcontext():
            return run(self.function, inputs, backend, checkpointed=checkpointed, **options)

    def faults(self) -> list[str]:
        """Run the case and return one sentence per fault."""
        if self.kind == "refusal":
            return refusal_faults(
                self.function,
                self.inputs,
                self.backend if DEVICE == "cpu" else "composed",
                self.random,
            )
        with garbage_in_new_memory(), _small_blocks(self.random):
            actual = self.run(self.inputs, self.backend)
            if self.kind == "row":
                return self._other_rows(actual)
            found = []
            if self.repeats and not _same(actual, self.run(self.inputs, self.backend)):
                found.append("a second run is not bitwise equal.")
            if self.checkpointed and not _same(
                actual, self.run(self.inputs, self.backend, checkpointed=True)
            ):
                found.append("a run with activation checkpointing is not bitwise equal.")
        if self.function in ROUTERS:
            found += _choice_faults(self, actual["indices"])
        return found + self._compare(actual, self._replayed(actual))

    def _replayed(self, actual: dict) -> dict:
        """Return inputs that make the reference use the experts chosen in ``actual``.

        Near a tie, several choices are right. :func:`_choice_faults` checks the choice.
        """
        return (
            self.inputs | dict(indices=actual["indices"])
            if self.function in ROUTERS
            else self.inputs
        )

    def _compare(self, actual: dict, inputs: dict) -> list[str]:
        exact = self.run(in_float64(inputs), "reference")
        plain = self.run(inputs, "reference")
        integers = [name for name, value in exact.items() if not value.is_floating_point()]
        found = [
            f"{name} differs."
            for name in integers
            if not torch.equal(actual[name].cpu(), exact[name].cpu())
        ]
        parts, more = _finite(
            {name: value for name, value in exact.items() if name not in integers}, actual, plain
        )
        found += more
        given = leaves(inputs)
        sizes = {
            f"d {path}": given[path].double().nan_to_num(0, 0, 0).norm().item()
            for path in self.wanted
        }

        def near(generator: torch.Generator) -> tuple[dict, dict, dict]:
            neighbour = _neighbour(inputs, generator)
            plain = self.run(neighbour, "reference")
            # A float64 case has no more exact reference: compare with the unchanged input's result.
            exact_there = (
                exact
                if self.dtype == torch.float64
                else self.run(in_float64(neighbour), "reference")
            )
            return self.run(neighbour, self.backend), exact_there, plain

        return found + judge(*parts, near, sizes, self.dtype, self.delta_is_rounded)

    def _other_rows(self, clean: dict) -> list[str]:
        """Return the faults in the other rows of results and gradients if one row is not finite."""
        path = ROWS[self.function]
        x = leaves(self.inputs)[path]
        if len(x) < 2 or not x[0].numel():
            return []
        row = self.random.randrange(len(x))
        broken = x.clone()
        broken[row].view(-1)[self.random.randrange(x[0].numel())] = self.random.choice(NON_FINITE)
        others = torch.arange(len(x)) != row
        names = [name for name, out in clean.items() if name in ROW_OUTPUTS]
        wanted = [path] if path in self.wanted else []
        inputs, options = self._replayed(clean), dict(wanted=wanted)
        options["upstream"] = lambda name, out: self.upstream(name, out) if name in names else None

        def rows(part: dict, inputs: dict, backend: str) -> dict:
            results = self.run(replaced(inputs, {path: part}), backend, **options)
            kept = [*names, *(f"d {name}" for name in wanted)]
            return {name: results[name][others] for name in kept}

        actual = rows(broken, self.inputs, self.backend)
        exact, plain = (
            rows(x.double(), in_float64(inputs), "reference"),
            rows(x, inputs, "reference"),
        )
        integers = [name for name in names if not exact[name].is_floating_point()]
        found = [
            f"{name} of another row differs."
            for name in integers
            if not torch.equal(actual[name], exact[name])
        ]
        actual, exact, plain = (
            {k: v for k, v in part.items() if k not in integers} for part in (actual, exact, plain)
        )
        parts, more = _finite(exact, actual, plain)

        def near(generator: torch.Generator) -> tuple[dict, dict, dict]:
            neighbour = _neighbour(inputs, generator)
            x = leaves(neighbour)[path]
            plain = rows(x, neighbour, "reference")
            exact_there = (
                exact
                if self.dtype == torch.float64
                else rows(x.double(), in_float64(neighbour), "reference")
            )
            return (
                rows(torch.where(broken.isfinite(), x, broken), neighbour, self.backend),
                exact_there,
                plain,
            )

        sizes = {
            f"d {name}": x[others].double().nan_to_num(0, 0, 0).norm().item() for name in wanted
        }
        found += [*more, *judge(*parts, near, sizes, self.dtype, self.delta_is_rounded)]
        return [f"row {row} is not finite: {fault}" for fault in found]


def judge(
    actual: dict,
    exact: dict,
    plain: dict,
    near: Callable[[torch.Generator], tuple[dict, dict, dict]],
    sizes: dict,
    dtype: torch.dtype,
    delta_is_rounded: bool,
) -> list[str]:
    """Return the faults of :func:`over_budget` that neighbouring inputs confirm.

    At a single input, plain PyTorch's error may happen to be small, especially if a tensor has few
    elements. So all errors are measured at this input and at its neighbours (:func:`_neighbour`).
    ``near`` returns (actual, exact, plain) at a neighbour. Up to a few roundings, two conditions
    must hold:

    - The mean error is at most 3 times plain PyTorch's mean error.
    - The error at this input is at most 12 times plain PyTorch's largest error.

    No formula needs to be more exact than one rounding of its input. So the change of the exact
    result from this input to a neighbour replaces plain PyTorch's error if the change is larger.

    ``sizes``: for each gradient, the norm of its input. The error of a gradient that is 0 up to
    rounding may be a few roundings of ``dtype`` relative to max(effect / size, 1). The effect is
    the largest product of a size and the norm of the exact gradient.

    ``delta_is_rounded``: the backward pass of a fused attention rounds delta = rowsum(dO * O)
    separately, so the gradients of the logits of a query do not sum to exactly 0. Then every
    gradient may also be off by a few roundings relative to effect / size, and the factors are 16
    and 64.
    """
    if not over_budget(actual, exact, plain):
        return []
    points, faults = [(actual, exact, plain)], []
    for number in NEIGHBOURS:
        points += [near(torch.Generator().manual_seed(i)) for i in range(len(points) - 1, number)]
        faults = _over_budget_of_means(points, sizes, dtype, delta_is_rounded)
        if not faults:
            break
    return faults


def _over_budget_of_means(
    points: list[tuple[dict, dict, dict]], sizes: dict, dtype: torch.dtype, delta_is_rounded: bool
) -> list[str]:
    actual, exact, _ = points[0]
    effect = max(
        (exact[name].norm().item() * size for name, size in sizes.items() if name in exact),
        default=0.0,
    )
    faults, few = [], 1024 if dtype == torch.float64 else 32 if delta_is_rounded else 4
    for name, want in exact.items():
        errors = [
            (_distance(got[name], exact_there[name]), _distance(formula[name], exact_there[name]))
            for got, exact_there, formula in points
        ]
        # Plain PyTorch may overflow at a neighbour.
        errors = [pair for pair in errors if math.isfinite(pair[1])]
        ours, theirs = zip(*errors, strict=True)
        moves = [_distance(exact_there[name], want) for _, exact_there, _ in points[1:]]
        scale, rounding = want.norm().item(), torch.finfo(actual[name].dtype).eps
        # Implementations may round more often than plain PyTorch.
        rounding *= 4 if rounding < 1e-3 else 1
        if name in sizes and sizes[name] and scale < max(1e-11 * effect / sizes[name], 1e-9):
            scale = max(effect / sizes[name], 1.0)
            rounding = few * torch.finfo(dtype).eps
        scale = scale or 1.0
        # The float64 reference has rounding errors too.
        if sizes.get(name) and (delta_is_rounded or dtype == torch.float64):
            rounding += few * torch.finfo(dtype).eps * effect / sizes[name] / scale
        factor = 16 if delta_is_rounded else 3
        mean, largest = max(_mean(theirs), _mean(moves)), max(*theirs, *moves)
        for error, allowed, what in (
            (_mean(ours), factor * mean, "mean"),
            (ours[0], 4 * factor * largest, "single"),
        ):
            relative, most = error / scale, allowed / scale + rounding
            if not relative <= most:
                faults.append(f"{name}: {what} relative error {relative:.3e}, allowed {most:.3e}.")
                break
    return faults


def _mean(errors: tuple[float, ...]) -> float:
    return sum(errors) / len(errors)


def _distance(a: Tensor, exact: Tensor) -> float:
    return torch.linalg.vector_norm(
        (a.double() - exact.double()).masked_fill(~exact.isfinite(), 0.0)
    ).item()


def _small_blocks(rng: random.Random):
    """In half of the cases, reduce the block size of ``mmfused.losses``."""
    return (
        mock.patch.object(mmfused.losses, "BLOCK_PAIRS", 20)
        if rng.random() < 0.5
        else nullcontext()
    )


def _same(a: dict, b: dict) -> bool:
    return all(
        torch.equal(x.nan_to_num(7e4), b[name].nan_to_num(7e4)) and x.dtype == b[name].dtype
        for name, x in a.items()
    )


def _neighbour(inputs: dict, generator: torch.Generator) -> dict:
    """Change each floating-point number by at most one rounding, or 64 roundings in float64."""
    new = {}
    for path, x in leaves(inputs).items():
        if x.is_floating_point():
            most = 64 if x.dtype == torch.float64 else 1
            steps = torch.randint(-most, most + 1, x.shape, generator=generator).double()
            new[path] = (x.double() * (1 + steps * torch.finfo(x.dtype).eps)).to(x.dtype)
    return replaced(inputs, new)


def _finite(exact: dict, actual: dict, plain: dict) -> tuple[tuple[dict, dict, dict], list[str]]:
    """Return (actual, exact, plain) with 0 where ``exact`` is not finite, and the faults found.

    Where ``exact`` is not finite, ``actual`` must be equal to ``exact``. A result is dropped if it
    overflows, or nearly overflows, in its dtype. A gradient is also dropped if the exact gradient
    is not finite.
    """
    faults, kept = [], ({}, {}, {})
    for name, want in exact.items():
        got, formula = actual[name], plain[name]
        if got.shape != want.shape:
            faults.append(f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}.")
            continue
        finite = want.isfinite()
        largest = want[finite].abs().max().item() if finite.any() else 0.0
        overflows = largest > torch.finfo(got.dtype).max / 4 or not formula[finite].isfinite().all()
        if overflows or (name.startswith("d ") and not finite.all()):
            continue
        same = torch.where(want.isnan(), got.isnan(), got.double() == want) | finite
        if not same.all():
            faults.append(f"{name}: NaN and infinity differ from those of the float64 reference.")
            continue
        for part, value in zip(kept, (actual, exact, plain), strict=True):
            part[name] = value[name].masked_fill(~finite, 0.0)
    return kept, faults


def _choice_faults(case: Case, indices: Tensor) -> list[str]:
    """Check that the chosen experts have the k largest scores, within rounding.

    If the op ranks the given logits directly, the indices must match exactly.
    """
    given = in_float64(case.inputs)
    if given.get("indices") is not None:
        return (
            []
            if torch.equal(indices, given["indices"])
            else ["indices: differ from the given indices."]
        )
    mask, segments, available = (
        given.get(name) for name in ("token_padding_mask", "segments", "available")
    )
    k, rounding = given["k"], torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    if "logits" in given:
        logits, error = given["logits"], torch.zeros(())
    else:
        x = given["x"] if mask is None else given["x"].masked_fill(mask[:, None], 0.0)
        logits, error = x @ given["router_weight"].T, x.abs() @ given["router_weight"].abs().T
        logits = logits if given.get("router_bias") is None else logits + given["router_bias"]
    tokens, experts = logits.shape
    live = torch.ones(tokens, dtype=torch.bool) if mask is None else ~mask
    if indices.shape != (tokens, k) or not ((indices >= 0) & (indices < experts)).all():
        return [f"indices: got shape {tuple(indices.shape)}, or an index out of range."]
    logits = logits.masked_fill(~live[:, None], 0.0)
    if given.get("jitter"):
        torch.manual_seed(case.seed)
        seed = given.get("jitter_seed")
        seed = mmfused.random.draw_seed(torch.device(DEVICE)).cpu() if seed is None else seed
        logits = logits * (1 + given["jitter"] * (2 * uniform(seed, tokens, experts) - 1).double())
        error = error + logits.abs()
    bias = given.get("selection_bias")
    usable = (
        torch.ones_like(logits, dtype=torch.bool)
        if available is None
        else available[0 if segments is None else segments]
    )
    usable = usable.expand_as(logits)
    logits = logits.masked_fill(~usable, float("-inf"))
    key = logits if bias is None and given["score"] == "softmax" else None
    if key is None:
        scores = logits.softmax(-1) if given["score"] == "softmax" else logits.sigmoid()
        key = scores if bias is None else scores + bias
        error = (
            error
            + (1 if bias is None else 1 + bias.abs()) * torch.ones_like(key)
            + logits.masked_fill(~usable, 0.0).abs()
        )
        key = key.masked_fill(~usable, float("-inf"))
    slack = 16 * rounding * error.amax(1, keepdim=True) if error.dim() else torch.zeros(tokens, 1)
    chosen = key.gather(1, indices)
    rest = key.scatter(1, indices, float("-inf")).amax(1, keepdim=True)
    correct = (
        (chosen[:, 1:] <= chosen[:, :-1] + slack).all(1)
        & (chosen >= rest - slack).all(1)
        & usable.gather(1, indices).all(1)
    )
    correct &= indices.sort(1).values.diff(dim=1).ne(0).all(1)
    if not error.dim():
        correct &= (indices == key.sort(dim=1, descending=True, stable=True).indices[:, :k]).all(1)
    wrong = (~correct & live).nonzero()[:, 0].tolist()
    return [f"indices: tokens {wrong[:5]} have experts of lower scores."] if wrong else []


def attempt(function: str, seed: int) -> tuple[str, str]:
    """Return the faults of a case ("" if it passes) and the kind of the case."""
    case = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = Case(function, seed)
            faults = case.faults()
        return " ".join(faults), case.kind
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})",
            case.kind if case else "making inputs",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--function", choices=sorted(MAKERS), help="default: every function")
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of one case of --function; with --minutes or --cases, the first seed",
    )
    parser.add_argument(
        "--cases", type=int, help="number of cases of each function, run in this process"
    )
    parser.add_argument(
        "--minutes", type=float, help="run cases for this long in several processes"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes for --minutes"
    )
    args = parser.parse_args()
    functions = [args.function] if args.function else list(MAKERS)
    if args.minutes:
        from fuzz_workers import fuzz

        sys.exit(fuzz(functions, args.minutes, args.workers, args.seed))
    if args.cases is None and (args.function is None or args.seed is None):
        parser.error("expected --function and --seed, or --minutes, or --cases")
    failed = 0
    for seed in range(args.seed or 0, (args.seed or 0) + (args.cases or 1)):
        for function in functions:
            if args.cases is None:
                print(Case(function, seed).describe())
            fault, _ = attempt(function, seed)
            failed += bool(fault)
            if fault or args.cases is None:
                print(f"--function {function} --seed {seed}: {fault or 'no fault'}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
