"""Benchmark of the library's five models, against the same models built from torch's modules.

The cases are in model_steps.py and the baseline in torch_modules.py. All providers load the same
weights. The training step with AdamW is timed too, with a learning rate of 0, so that the weights
do not change. UNITE's loss has no parameters, so it has no training step.

In 16 bits on CUDA, all providers run with TF32 for float32 products. cuDNN's SDPA is disabled,
because its gradients with a mask and 64 keys may be NaN (pytorch #196678).

`extras` also records the losses of a few training steps of each provider.
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
RATE = 3e-4  # learning rate of a loss curve
NOISE = 3.0  # largest accepted difference of loss curves, as a multiple of the rounding error
EXPERTS = ("w_gate", "w_up")  # weights of MOON2.0's experts; concatenated in the baseline


@contextmanager
def settings(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run with the settings for 16 bits on CUDA that the module's docstring describes."""
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
class TrainableProvider(Provider):
    """A provider that can also make a training step."""

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
    """Return the names of the problem's parameters of which ``parameter`` consists."""
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
    return TrainableProvider(
        step, layout, backend, within=functools.partial(settings, device, dtype)
    )


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
    """Return the results of the composed path in float64.

    The reference would need far more memory. Tests check that both agree.
    """
    wide = in_dtype(problem, torch.float64)
    return composed(case, problem.device, torch.float64).load(wide.parameters).results(wide)


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """Return the problem in a wider dtype, with the same numbers."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in problem.inputs.items()}
    return Problem(
        inputs,
        {name: p.to(wide) for name, p in problem.parameters.items()},
        problem.upstream.to(wide),
    )


def comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate results into groups, so that each group has a meaningful relative error.

    The gradients of each item form one group:
    * the weight and bias of a layer;
    * all experts of a layer;
    * all learnable scalars, because the error of a single number may be 0 by chance;
    * the projections q, k and v of attention over one token, where the gradients of q and k are 0;
    * FLUID's gate and the LayerNorm of the tokens that it blends, because the gate's gradient is a
      small difference of two large sums;
    * a norm before UniECS's cross-attention, and the value projection after this norm.
    The loss is rounded to the dtype of the inputs, or to float16 if the inputs are float32.
    """
    (_, loss), (_, dx), *_ = results.items()
    loss_dtype = {torch.float32: torch.float16}.get(dx.dtype, dx.dtype)
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(results.items()):  # the order differs between providers
        group = re.sub(r"\.(weight|bias)$|(?<=w_gate|..w_up)\.\d+$", "", name)
        group = re.sub(r"(fusion_blocks\.\d+)\.[qk]_proj$", r"\1.v_proj", group)
        group = re.sub(r"model\.gate\.mlp\.\d+$", "model.image_transform.blocks.0.norm_ffn", group)
        group = re.sub(
            r"cross\.norm_([ab])$",
            lambda side: f"cross.to_{'ba'['ab'.index(side[1])]}.v_proj",
            group,
        )
        scalar = tensor.numel() == 1 and group == name and name != "out"
        groups.setdefault("scalars" if scalar else group, []).append(tensor.flatten())
    combined = {name: torch.cat(pieces) for name, pieces in groups.items()}
    return combined | {"out": loss.to(loss_dtype)}


# ---- work ----------------------------------------------------------------------------------------


def work(case: Case, itemsize: int) -> dict[str, list[dict[str, Any]]]:
    """Count the FLOPs of the baseline's matrix products, and the bytes that it must move.

    Each pass reads the parameters and the inputs once, and the backward writes their gradients;
    activations are not counted. The library may need fewer FLOPs: pooling does not project tokens,
    and masked pairs are skipped.
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
    """Count FLOPs with torch's formulas.

    FlopCounterMode does not support the gradients that UniECS computes within its forward.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet is torch.ops.aten._grouped_mm:
            # (rows, I) by (E, I, O), or for the gradient of the weights (I, rows) by (rows, O).
            self.total += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


# ---- loss curves ---------------------------------------------------------------------------------


def extras(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the loss curves of the library and the baseline: training with AdamW on one batch.

    "curves" has the losses, and for each provider the "difference": the largest relative difference
    from the baseline. "bound" is NOISE times the difference between the baseline in ``dtype`` and
    the baseline in the next wider dtype, plus the machine epsilon of ``dtype``. "faults" has a
    message for each provider whose difference exceeds the bound.
    """
    problem = make(case, device, dtype)
    wider = torch.float32 if dtype.itemsize == 2 else torch.float64
    losses = {
        BASELINE: curve(torch_modules, case, problem),
        f"{BASELINE}, {str(wider).removeprefix('torch.')}": curve(
            torch_modules, case, in_dtype(problem, wider)
        ),
    }
    baseline, wider_baseline = losses.values()
    bound = NOISE * difference(baseline, wider_baseline) + torch.finfo(dtype).eps
    differences, faults = {}, []
    for name in OURS:
        try:
            losses[name] = curve(PROVIDERS[name], case, problem)
        except Unavailable:
            continue
        differences[name] = difference(losses[name], baseline)
        if not differences[name] <= bound:
            faults.append(
                f"{case.name}: {name}: losses: got a relative difference of "
                f"{differences[name]:.3e}, expected at most {bound:.3e}"
            )
    finite = {
        name: [loss if math.isfinite(loss) else None for loss in losses[name]] for name in losses
    }
    differences = {
        name: value if math.isfinite(value) else None for name, value in differences.items()
    }
    curves = {
        "optimizer": f"AdamW, learning rate {RATE:g}",
        "losses": finite,
        "difference": differences,
        "bound": bound,
    }
    return {"curves": curves, "faults": faults}


def curve(builder, case: Case, problem: Problem) -> list[float]:
    """Return the loss before each of ``TRAINED`` training steps.

    The parameters are trained, or the inputs if there are no parameters (UNITE).
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
    """Return the largest relative difference from ``b``, or infinity if any difference is NaN."""
    found = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return math.inf if any(math.isnan(value) for value in found) else max(found)
