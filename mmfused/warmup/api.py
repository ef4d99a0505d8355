"""Compile the kernels of a training step before the first step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import extension
from ..kernels import jobs
from ..kernels.jobs import Job, Outcome
from ..library import HAS_TRITON, INTERPRETED, current_router
from . import state, steps
from .node import all_ranks, cores, own_part
from .on_meta import as_on_gpu, known_twin_of
from .report import WarmedKernel, WarmupReport
from .steps import Batch

NO_BACKWARD = (
    "no backward pass followed, because nothing that the step returned requires a gradient; "
    "see input_gradients and backward"
)
NO_KERNELS = (
    "the step launches no kernel of this library: it uses none of its ops, or a backend without "
    "kernels; a model of another library needs mmfused.fuse first"
)
# What to do about errors that do not say it, by a part of their message.
_HINTS = {
    "backward through the graph a second time": "return the loss; warmup runs the backward pass",
    "cannot be called on meta tensors": "the step reads a value that is not known while recording; "
    "see https://mmfused.github.io/mmfused/tuning.html#warmup",
    ", expected meta": "pass this tensor as an argument of the step, or keep it in a module",
    "must be Tensor, not": "a tuple of ints, or (shape, torch.dtype), stands for a tensor",
}
_KERNELS = "mmfused.kernels."  # start of the names of the modules with this library's kernels


def warmup(
    model: nn.Module | Callable[..., Any],
    shapes: Any,
    *,
    dtype: torch.dtype | None = None,
    backward: bool = True,
    input_gradients: bool = False,
    arch: str | None = None,
    workers: int | None = None,
) -> WarmupReport:
    """Compile every kernel of this library that a training step of ``model`` launches.

    The launches of a step are recorded on meta tensors, which takes no memory and changes nothing
    of the model. The kernels are compiled in parallel, into the cache of Triton, where each launch
    will look. On a GPU the step then runs once for each batch, so that everything is loaded before
    the first step, or before a CUDA graph is captured. Without a GPU, or with the ``arch`` of
    another GPU, it does not run: a login node or the build of an image can fill the cache.

    Call it under the autocast, the backend and the training mode of the training. Where autocast is
    around the call on a machine without a GPU, write ``torch.autocast("cpu", torch.bfloat16)``,
    which stands for that of a GPU. With torch.distributed, call it on all ranks: those of a node
    divide the kernels among themselves, and each waits for the others.

    Args:
        model: a module, or a function that computes a loss with modules: any that it reaches as
            closure variables, globals or what it is bound to, or attributes of these, at most two
            deep. It runs without the wrappers of DistributedDataParallel and, while recording, of
            torch.compile. The backward pass starts at the ``loss`` of what it returns, or without
            one at all tensors in it that need a gradient. It must not run an optimizer, and must
            return nothing if it runs the backward pass itself. Code that reads values of tensors,
            such as ``mask.all()``, gets those of the integer and bool tensors in ``shapes``, and of
            what follows from them alone. Other threads must not run a model meanwhile.
        shapes: a batch, or a list of batches. A batch is a tuple of positional arguments or a dict
            of keyword arguments, where

            * a tuple of ints stands for a random tensor of this shape in ``dtype``,
            * a (shape, dtype) pair stands for one of this dtype: zeros if it is not floating,
            * a tensor stands for itself, and a meta tensor for one of its shape and dtype,
            * a dict, list or other tuple stands for one with these in it,
            * any other value is passed as it is.
        dtype: dtype of shapes without one; by default that of the model's first floating parameter,
            or torch's default dtype.
        backward: whether to run the backward pass too.
        input_gradients: whether floating inputs made from shapes require a gradient, as they do for
            one layer or one loss of a larger model. Tensors keep their ``requires_grad``.
        arch: architecture to compile for, such as "sm_90"; by default that of the current GPU.
        workers: the most processes that compile for this one; by default one for each core, of
            which ranks of a node have equal shares, but at most 16. 0: only record the launches.

    Returns:
        a :class:`WarmupReport`. Kernels that spill registers or need too much shared memory, and
        what could not be recorded, are reported there.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``arch`` is None without a GPU, or unknown; ``shapes`` is not as above.
        RuntimeError: Triton is missing, or a step can be neither recorded nor run.

    Examples:
        The launches of a pooling layer, without compiling them:

        >>> import torch, mmfused
        >>> pool = mmfused.QueryPooling(64, num_queries=4).bfloat16()
        >>> report = mmfused.warmup(pool, ((8, 197, 64),), arch="sm_90", workers=0)
        >>> {kernel.op for kernel in report.kernels}
        {'query_pooling'}

        A step with a loss, for batches of two lengths, one with a padding mask:

        >>> def step(tokens, labels, mask=None):
        ...     logits = pool(tokens, mask).flatten(1)
        ...     return torch.nn.functional.cross_entropy(logits.float(), labels)
        >>> labels = ((8,), torch.int64)
        >>> batches = [((8, 197, 64), labels), ((8, 50, 64), labels, ((8, 50), torch.bool))]
        >>> report = mmfused.warmup(step, batches, arch="sm_90", workers=0)
        >>> report.compiled, report.notes
        (0, ['workers=0: nothing was compiled'])
    """
    start = time.perf_counter()
    call = _Call(model, shapes, dtype, backward, input_gradients, arch, workers)
    report = WarmupReport(call.arch)
    found: dict[str, Job] = {}
    all_ranks(lambda: found.update(call.record(report)))
    if not found and not report.notes:
        report.notes.append(NO_KERNELS)
    if workers == 0:
        report.notes.append("workers=0: nothing was compiled")
    outcomes = {} if workers == 0 else _outcomes_of(found, workers)
    report.kernels = [_warmed(job, outcomes.get(key)) for key, job in found.items()]
    if call.runs:
        call.rehearse(report)
    report.seconds = time.perf_counter() - start
    return report


class _Call:
    """The checked arguments of a call of :func:`warmup`, and its steps."""

    def __init__(
        self,
        model: Any,
        shapes: Any,
        dtype: torch.dtype | None,
        backward: bool,
        input_gradients: bool,
        arch: str | None,
        workers: int | None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: got a {type(model).__name__}, expected a module or a function")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: got {dtype!r}, expected a torch.dtype or None")
        if workers is not None and (not isinstance(workers, int) or workers < 0):
            raise ValueError(f"workers: got {workers!r}, expected an int of 0 or more, or None")
        if INTERPRETED and workers != 0:
            raise ValueError(
                "TRITON_INTERPRET: got '1', expected it unset, because it disables compilation"
            )
        self.batches: list[Batch] = steps.batches_of(shapes)
        self.arch: str = _arch_of(arch)
        self.number: int = int(self.arch.removeprefix("sm_"))
        self.runs: bool = self.arch == _gpu_arch() and workers != 0
        self.step: Any = steps.unwrapped(model)
        self.reached: steps.Reached = steps.reached_by(model)
        self.modules: list[nn.Module] = self.reached.modules
        if any(map(is_lazy, (p for m in self.modules for p in m.parameters(recurse=False)))):
            raise ValueError("model: got a lazy module, expected one that has run once")
        self.written: set[state.Place] = set()  # parameters that the recorded step writes
        self.dtype: torch.dtype = dtype or steps.dtype_of(self.modules)
        self.backward, self.input_gradients = backward, input_gradients

    # ---- recording -------------------------------------------------------------------------------

    def record(self, report: WarmupReport) -> dict[str, Job]:
        """Return the distinct jobs of all batches, by what the compiler gets."""
        from ..kernels.recording import launches_for

        found: dict[str, Job] = {}
        for number, batch in enumerate(self.batches):
            with launches_for(self.number) as launches, self._replaced():
                note = self._record_batch(batch)
            if note and note != NO_BACKWARD and not self.runs:
                raise RuntimeError(f"shapes: batch {number}: {note}")
            if note:
                report.notes.append(f"batch {number}: {note}")
            for launch in launches:
                _, ours, name = launch.kernel.fn.__module__.partition(_KERNELS)
                if not ours:  # of another library, whose options may not be in the job
                    continue
                job = jobs.as_launched(jobs.job_of(name.split(".")[0], "", self.arch, launch))
                found[repr(job)] = job
        return found

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Replace what the step meets by what it would meet on the GPU, without memory."""
        from ..kernels import tiles, tuned

        units = dict(tiles.MULTIPROCESSORS)
        if self.arch == _gpu_arch():
            units[self.number] = torch.cuda.get_device_properties().multi_processor_count
        with (
            tuned.from_file(),
            mock.patch.object(tiles, "MULTIPROCESSORS", units),
            state.kept(self.reached),
        ):
            yield

    def _record_batch(self, batch: Batch) -> str:
        """Run the step on meta tensors, and return why that is impossible, or an empty string."""
        if any(map(steps.is_sharded, self.modules)):
            return "a model under FSDP cannot be recorded; pass it before it is wrapped"
        arguments = steps.arguments_of(batch, self._on_meta)
        state.replace_tensors(self.modules, known_twin_of)
        try:
            with as_on_gpu(self.number), torch.compiler.set_stance("force_eager"):
                ran = steps.run(self.step, arguments, self.modules, self.backward)
            self.written |= state.written_parameters(self.modules)
        except Exception as error:  # of any code of the model
            line = next(iter(str(error).strip().splitlines()), "")
            hint = next((hint for text, hint in _HINTS.items() if text in line), "")
            reason = f"{type(error).__name__}: {line}{hint and f' ({hint})'}"
            return f"the step cannot run on meta tensors: {reason}"
        return "" if ran else NO_BACKWARD

    def _on_meta(self, shape: Any, dtype: torch.dtype | None) -> Tensor:
        if isinstance(shape, Tensor):
            return known_twin_of(shape)
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            return known_twin_of(torch.zeros(shape, dtype=dtype))
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.requires_grad_(self.input_gradients)

    # ---- running ---------------------------------------------------------------------------------

    def rehearse(self, report: WarmupReport) -> None:
        """Run the step once for each batch, and count what is still compiled."""
        from triton import knobs

        device = steps.device_of(self.modules)
        if device.type != "cuda":
            report.notes.append(f"the model is on {device}, so the step did not run on the GPU")
            return
        if current_router() == "cuda":
            extension.load()
        before = knobs.compilation.listener

        def count(*, src: Any, cache_hit: bool, **others: Any) -> None:
            module = getattr(getattr(src, "fn", None), "__module__", "")  # none: of torch.compile
            report.late += not cache_hit and module.startswith(_KERNELS)
            if before is not None:
                before(src=src, cache_hit=cache_hit, **others)

        knobs.compilation.listener = count
        try:
            for batch in self.batches:
                self.run_once(batch, device)
        finally:
            knobs.compilation.listener = before
        torch.cuda.synchronize()
        report.ran = True

    def run_once(self, batch: Batch, device: torch.device) -> None:
        """Run the step with random tensors on ``device``; nothing of the model stays changed."""

        def on_device(shape: Any, dtype: torch.dtype | None) -> Tensor:
            if isinstance(shape, Tensor) and not shape.is_meta:
                return shape.detach().to(device).requires_grad_(shape.requires_grad)
            dtype = dtype or self.dtype
            fill = torch.randn if dtype.is_floating_point else torch.zeros
            given = isinstance(shape, Tensor)
            x = fill(shape.shape if given else shape, dtype=dtype, device=device)
            needs = shape.requires_grad if given else self.input_gradients
            return x.requires_grad_(needs and dtype.is_floating_point)

        with state.kept(self.reached, self.written):
            arguments = steps.arguments_of(batch, on_device)
            steps.run(self.step, arguments, self.modules, self.backward)


def _gpu_arch() -> str | None:
    """Return the architecture of the current GPU, or None if no GPU is visible."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _arch_of(arch: str | None) -> str:
    """Return the architecture to compile for."""
    if not HAS_TRITON:
        raise RuntimeError("warmup: triton is not installed, and the kernels need it")
    from ..kernels.tiles import SHARED_MEMORY

    known = [f"sm_{number}" for number in SHARED_MEMORY]
    arch = arch or _gpu_arch()
    if arch not in known:
        got = "None on a machine without a GPU" if arch is None else repr(arch)
        raise ValueError(f"arch: got {got}, expected one of {', '.join(known)}")
    return arch


def _outcomes_of(found: dict[str, Job], workers: int | None) -> dict[str, Outcome]:
    """Compile what is not in Triton's cache, and return the outcomes.

    Kernels that another rank of the node failed to compile have none.
    """
    outcomes: dict[str, Outcome] = {}

    def read_cache() -> set[str]:
        """Note the outcomes of what is in the cache, and return the rest."""
        for key in set(found) - set(outcomes):
            if jobs.is_cached(found[key]):
                outcomes[key] = jobs.outcome_of(found[key])
        return set(found) - set(outcomes)

    own = own_part(read_cache)
    part = {key: job for key, job in found.items() if key in own}
    all_ranks(lambda: outcomes.update(jobs.outcomes_of(part, workers or min(16, cores()))))
    read_cache()
    return outcomes


def _warmed(job: Job, outcome: Outcome | None) -> WarmedKernel:
    from ..kernels.tiles import SHARED_MEMORY

    limit = SHARED_MEMORY[int(job.arch.removeprefix("sm_"))]
    return WarmedKernel(job.op, job.kernel.removesuffix("_kernel"), outcome, limit)
