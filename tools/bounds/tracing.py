"""Trace the launches of Triton kernels on CPU tensors.

with traced(90) as launches:
    mmfused.query_pooling(x, q)  # on the fused path

Of each launch a sample of the blocks runs, drawn evenly from the grid, so that the tensors may have
the sizes that matter on a GPU. Results are wrong where a block did not run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import triton

from mmfused.tools.ptx import driver
from mmfused.tools.ptx.machine import Memory, Program, merged
from mmfused.tools.ptx.schedules import Argument
from mmfused.tools.ptx.trace import SECTOR, Trace

from .cards import CARDS
from .costs import costs, registers
from .machine_code import MachineCode, machine_code
from .order import order

STEPS = 300_000  # instructions of a warp after which no further block of a launch is traced
# A launch that writes integers may decide what later ones do, such as the order of rows by expert.
# All of its blocks run if they take fewer instructions than this.
DECIDING_STEPS = 100_000_000


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced launch.

    ``sizes``: sectors of each range of memory in ``trace``.
    """

    program: Program
    trace: Trace
    code: MachineCode
    blocks: int
    warps: int
    shared: int
    sizes: np.ndarray

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def scale(self) -> float:
        """How many times what the trace counts the launch does."""
        return self.blocks / self.trace.blocks

    def dram_sectors(self) -> np.ndarray:
        """Return the sectors of each range that are read and written, each once.

        What several blocks touch is not seen in a sample, except where it is more than all of the
        range.
        """
        if self.blocks == self.trace.blocks:
            return self.trace.distinct
        return np.minimum(self.trace.by_blocks * self.scale, self.sizes[:, None])


class _Launcher(driver.Launcher):
    """Traces a kernel's launches in place of running them, inside of :func:`traced`."""

    # Triton keeps a kernel's launcher, so that these are of all of them: the list of the innermost
    # block, and what it has traced.
    launches: list[Traced] | None = None
    known: ClassVar[dict[Any, Traced]] = {}

    def launch(
        self,
        program: Program,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        arguments: list[Argument],
    ) -> None:
        """Trace the launch, or find one that differs in addresses only."""
        if self.launches is None:
            return super().launch(program, grid, parameters, arguments)
        memory = [argument.memory for argument in arguments]
        addresses = {m.start.to_bytes(8, "little") for m in memory}
        values = tuple(None if each in addresses else each for each in parameters)
        key = program, grid, values, tuple(m.end - m.start for m in memory)
        if key not in self.known:
            self.known[key] = self._trace(program, grid, parameters, memory)
        traced = self.known[key]
        self.launches.append(traced)
        steps = traced.trace.executed.sum() * traced.scale
        if steps < DECIDING_STEPS and _writes_integers(traced.trace, arguments):
            super().launch(program, grid, parameters, arguments)

    def _trace(
        self,
        program: Program,
        grid: tuple[int, int, int],
        parameters: list[bytes],
        memory: list[Memory],
    ) -> Traced:
        arch, shared = self.session.arch, self.metadata.shared
        threads = program.kernel.threads or 32 * self.metadata.num_warps
        trace = program.trace(grid, parameters, memory, threads=threads, shared=shared, steps=STEPS)
        card = next(card for card in CARDS.values() if card.arch == arch)
        cycles, names = costs(program, card), registers(program)
        trace.reorder(order(program.code, cycles, names))
        return Traced(
            program,
            trace,
            machine_code(program.text, arch),
            math.prod(grid),
            threads // 32,
            shared + program.kernel.static_shared_bytes,
            np.array([-(-(end - start) // SECTOR) for start, end in merged(memory)]),
        )


def _writes_integers(trace: Trace, arguments: list[Argument]) -> bool:
    written = trace.by_blocks[:, 1] > 0
    for (start, end), is_written in zip(
        merged([argument.memory for argument in arguments]), written, strict=True
    ):
        for argument in arguments:
            is_inside = start <= argument.memory.start < end
            if is_written and is_inside and not argument.tensor.is_floating_point():
                return True
    return False


@contextmanager
def traced() -> Iterator[list[Traced]]:
    """Trace the launches in a block; the driver of ``tools/ptx`` must be installed before.

    Each distinct launch is traced once.
    """
    active = triton.runtime.driver.active
    active.launcher_cls = functools.partial(_Launcher, active.session)
    with mock.patch.multiple(_Launcher, launches=[], known={}):
        yield _Launcher.launches
