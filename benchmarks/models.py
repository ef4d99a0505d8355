"""Train steps of the library's five models, beside the same models in torch's own modules.

The cases are in `model_steps.py`, the baseline in `torch_modules.py`; both models load the same
weights. Besides forward and backward, the whole ``step`` is timed with AdamW at a learning rate of
0: the arithmetic is the same, and the weights stay those of the accuracy check. UNITE's loss has no
parameters, and so no such step.

In 16 bits on CUDA all providers run with two settings: float32 products (mostly of logits) may use
TF32, which users of 16 bits allow; SDPA runs without cuDNN, whose gradients with a mask and 64 keys
may be NaN (pytorch #196678).

`extras` records the losses of a few training steps from the same weights and batch, the library's
and the baseline's.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmfused import models as library

from .measure import Problem, Provider, Unavailable, need_kernels
from .model_steps import STEPS, Case, Step, cases, custom
from .torch_modules import STACKED
from .torch_modules import models as torch_models

__all__ = [
    "OURS",
    "PROVIDERS",
    "Case",
    "cases",
    "comparable",
    "custom",
    "exact",
    "extras",
    "make",
    "reference",
    "work",
]

OURS = ("composed", "fused")
BASELINE = "torch modules"
TRAINED = 20  # steps of a loss curve
RATE = 3e-4  # and their learning rate
NOISE = 3.0  # how many times the dtype's own error a curve may be off
EXPERTS = ("w_gate", "w_up")  # MOON2.0's, which the baseline stacks expert by expert


@contextmanager
def settings(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run with the settings that the module's docstring describes."""
    if device.type != "cuda" or dtype.itemsize > 2:
        yield
        return
    flags = torch.backends.cuda
    before = flags.matmul.allow_tf32, flags.cudnn_sdp_enabled()
    try:
        flags.matmul.allow_tf32 = True
        flags.enable_cudnn_sdp(False)
        yield
    finally:
        flags.matmul.allow_tf32 = before[0]
        flags.enable_cudnn_sdp(before[1])


@dataclass
class Trained(Provider):
    """A provider with its optimiser's step."""

    def step(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        results = self.both(inputs, upstream)
        for name, gradient in zip(self.layout, results[1 + len(inputs) :], strict=True):
            self.module.get_parameter(name).grad = gradient
        self.optimizer.step()
        return results

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(list(self.module.parameters()), 0.0)


def adamw(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    on_cuda = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(
        parameters, lr=rate, weight_decay=0.0, fused=on_cuda, capturable=on_cuda
    )


# ---- the problem ---------------------------------------------------------------------------------


def build(case: Case, device: torch.device, dtype: torch.dtype, models=library) -> Step:
    return STEPS[case.name](models, case.B, case.small, device, dtype)


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        step = build(case, device, torch.promote_types(dtype, torch.float32))
    inputs = {name: x.to(dtype).requires_grad_() for name, x in step.inputs(device).items()}
    parameters = {}
    for name, parameter in step.named_parameters():
        pieces = parts(name, parameter)
        whole = parameter.detach().reshape(-1) if parameter.dim() == 0 else parameter.detach()
        parameters |= zip(pieces, whole if len(pieces) > 1 else [whole], strict=True)
    upstream = torch.full((), 1.7, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return Problem(inputs, parameters, upstream, evicts=case.name != "unite")


def parts(name: str, parameter: Tensor) -> tuple[str, ...]:
    """The problem's parameters that are stacked in one of a module's."""
    owner, _, kind = name.rpartition(".")
    above, _, last = owner.rpartition(".")
    if kind == "w_gate_up":
        return tuple(
            f"{owner}.{part}.{expert}" for expert in range(len(parameter)) for part in EXPERTS
        )
    if kind in EXPERTS:
        return tuple(f"{name}.{expert}" for expert in range(len(parameter)))
    return tuple(f"{above}.{part}.{kind}" for part in STACKED[last]) if last in STACKED else (name,)


# ---- providers -----------------------------------------------------------------------------------


def _provider(
    models,
    backend: str | None,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
) -> Provider:
    step = build(case, device, dtype, models() if callable(models) else models)
    layout = {name: parts(name, parameter) for name, parameter in step.named_parameters()}
    return Trained(step, layout, backend, within=functools.partial(settings, device, dtype))


def torch_modules(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _provider(torch_models, None, case, device, dtype)


def reference(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _provider(library, "reference", case, device, dtype)


def composed(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    return _provider(library, "composed", case, device, dtype)


def fused(case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
    need_kernels(device, dtype)
    return _provider(library, "fused", case, device, dtype)


PROVIDERS = {BASELINE: torch_modules, "composed": composed, "fused": fused}


# ---- accuracy ------------------------------------------------------------------------------------


def exact(case: Case, problem: Problem) -> dict[str, Tensor]:
    """Return the results of the composed path in float64, which the tests compare to the reference.

    The reference itself needs far more memory.
    """
    wide = in_dtype(problem, torch.float64)
    return composed(case, problem.device, torch.float64).load(wide.parameters).results(wide)


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """Return the same numbers for a provider of a wider dtype, so that nothing is rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in problem.inputs.items()}
    return Problem(
        inputs,
        {name: p.to(wide) for name, p in problem.parameters.items()},
        problem.upstream.to(wide),
    )


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Group results so that each group has a meaningful relative error.

    Weight and bias of a layer form one vector, as in the other benchmarks, and so do all experts of
    a layer. Also:
    * the loss, a single number whose error may be 0 by luck, is rounded to half the digits (float64
      is not);
    * learnable scalars form one vector, for the same reason;
    * queries and keys of attention over one token, whose gradients are exactly zero, join the
      values;
    * FLUID's gate, whose gradient is the small difference of two large sums, joins the norm of the
      tokens that it blends; likewise UniECS's norms before cross-attention join the values that
      they scale.
    """
    (_, loss), (_, first), *_ = results.items()
    digits = {torch.float32: torch.float16}.get(first.dtype, first.dtype)
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(results.items()):  # providers have them in orders of their own
        whole = re.sub(r"\.(weight|bias)$|(?<=w_gate|..w_up)\.\d+$", "", name)
        whole = re.sub(r"(fusion_blocks\.\d+)\.[qk]_proj$", r"\1.v_proj", whole)
        whole = re.sub(r"model\.gate\.mlp\.\d+$", "model.image_transform.blocks.0.norm_ffn", whole)
        whole = re.sub(
            r"cross\.norm_([ab])$",
            lambda side: f"cross.to_{'ba'['ab'.index(side[1])]}.v_proj",
            whole,
        )
        scalar = tensor.numel() == 1 and whole == name and name != "out"
        groups.setdefault("scalars" if scalar else whole, []).append(tensor.flatten())
    return {name: torch.cat(pieces) for name, pieces in groups.items()} | {"out": loss.to(digits)}


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Count the FLOPs of the baseline's matrix products and the bytes it must move, in one run.

    Each pass reads the parameters and the inputs once, and the backward writes their gradients. So
    the bound is that of the plain algorithm, not the lowest possible: pooling without projected
    tokens, or skipping masked pairs, may be faster. Activations that pass through memory between
    the products are not counted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    problem = make(case, device, dtype)
    provider = torch_modules(case, device, dtype).load(problem.parameters)
    inputs = tuple(problem.inputs.values())
    counts = []
    for run in (lambda: provider(*inputs), lambda: provider.both(inputs, problem.upstream)):
        with Flops() as counter:
            run()
        counts.append(counter.total)
    read = sum(x.nbytes for x in (*inputs, *problem.parameters.values()))
    return {
        "forward": [{"stage": "all", "flops": counts[0], "bytes": read}],
        "backward": [{"stage": "all", "flops": counts[1] - counts[0], "bytes": 2 * read}],
    }


class Flops(TorchDispatchMode):
    """Count FLOPs by torch's own formulas.

    FlopCounterMode stops at UniECS's gradients within the forward.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if (
            packet is torch.ops.aten._grouped_mm
        ):  # rows by expert times weights, or for their gradient times rows: of all rows
            self.total += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


# ---- the same loss curve -------------------------------------------------------------------------


def extras(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the losses of training steps with AdamW on one batch.

    Returns:
        "curves": the losses, and the largest relative difference from the baseline's. Its "bound"
        is NOISE times the difference between the baseline and itself in the next wider dtype.
        "faults": providers beyond the bound.
    """
    problem = make(case, device, dtype)
    wider = torch.float32 if dtype.itemsize == 2 else torch.float64
    losses = {
        BASELINE: curve(torch_modules, case, problem),
        f"{BASELINE}, {str(wider).removeprefix('torch.')}": curve(
            torch_modules, case, in_dtype(problem, wider)
        ),
    }
    own, exact = losses.values()
    bound = NOISE * difference(own, exact) + torch.finfo(dtype).eps
    differences, faults = {}, []
    for name in OURS:
        try:
            losses[name] = curve(PROVIDERS[name], case, problem)
        except Unavailable:
            continue
        differences[name] = difference(losses[name], own)
        if not differences[name] <= bound:
            faults.append(
                f"{case.name}: {name}: losses: got a difference of {differences[name]:.3e}, "
                f"expected at most {bound:.3e}"
            )
    plain = {
        name: [loss if math.isfinite(loss) else None for loss in losses[name]] for name in losses
    }
    differences = {
        name: value if math.isfinite(value) else None for name, value in differences.items()
    }
    curves = {
        "optimizer": f"AdamW, learning rate {RATE:g}",
        "losses": plain,
        "difference": differences,
        "bound": bound,
    }
    return {"curves": curves, "faults": faults}


def curve(builder, case: Case, problem: Problem) -> list[float]:
    """Return the loss before each of `TRAINED` steps of the parameters.

    UNITE's loss has none; there the float32 rows are trained.
    """
    provider = builder(case, problem.device, problem.dtype).load(problem.parameters)
    tokens = [x.detach().to(problem.upstream.dtype, copy=True) for x in problem.inputs.values()]
    leaves = [*provider.module.parameters()] or tokens
    optimizer, losses = adamw(leaves, RATE), []
    for _ in range(TRAINED):
        inputs = tuple(x.to(problem.dtype, copy=True).requires_grad_() for x in tokens)
        loss, *gradients = provider.both(inputs, torch.ones_like(problem.upstream))
        losses.append(loss)
        for leaf, gradient in zip(leaves, gradients[-len(leaves) :], strict=True):
            leaf.grad = gradient.to(leaf.dtype)
        optimizer.step()
    return torch.stack(losses).tolist()


def difference(a: list[float], b: list[float]) -> float:
    """The largest, relative to ``b``; NaN counts as infinite."""
    found = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return math.inf if any(math.isnan(value) for value in found) else max(found)
