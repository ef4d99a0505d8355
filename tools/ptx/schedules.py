"""Run each launch under several schedules, and compare the results bit by bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .machine import IN_ORDER, Fault, Memory, Schedule

PLAIN = Schedule(checks=False)
_LARGE = 1 << 30  # bytes of a tensor
MODES = ("plain", "adversarial", "all")


class Argument(NamedTuple):
    """A tensor that a kernel gets."""

    name: str
    tensor: torch.Tensor

    @property
    def memory(self) -> Memory:
        """The bytes from the tensor's first element to its last one."""
        tensor = self.tensor
        start, last = tensor.data_ptr(), -1
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return Memory(start, start + (last + 1) * tensor.element_size(), self.name)


def schedules_of(mode: str, arch: int, seed: int) -> tuple[Schedule, ...]:
    """Return the schedules of each launch in a mode.

    Args:
        mode: "plain": in order, without checks. "adversarial": in order, then at random with the
            asynchronous work of ``arch`` against the barriers. "all": in order, then at random with
            copies and, if ``arch`` has it, wgmma both at once and late.
        arch: 80 or 90.
        seed: of the random order; not 0.
    """
    if mode == "plain":
        return (PLAIN,)
    wgmma = arch >= 90
    if mode == "adversarial":
        return IN_ORDER, Schedule(seed, late_copies=not wgmma, late_wgmma=wgmma)
    mixed = [
        Schedule(seed, late_copies, late_wgmma)
        for late_copies in (False, True)
        for late_wgmma in ((False, True) if wgmma else (False,))
    ]
    return IN_ORDER, *mixed


def run_all(
    kernel: str,
    run: Callable[[Schedule], list[Fault]],
    arguments: Sequence[Argument],
    schedules: Sequence[Schedule],
) -> list[str]:
    """Run a launch under each schedule, always with the same inputs, and return all reports.

    Results that differ between schedules are a fault too. A launch with a tensor of more than 1 GB,
    most of which are pages that are never touched, runs only once and without checks.
    """
    if any(a.memory.end - a.memory.start > _LARGE for a in arguments):
        schedules = (PLAIN,)
    if len(schedules) == 1:
        return [str(fault) for fault in run(schedules[0])]
    elements = [_elements(argument) for argument in arguments]
    before = [each.copy() for each in elements]
    reports = [str(fault) for fault in run(schedules[0])]
    first = [each.copy() for each in elements]
    for schedule in schedules[1:]:
        for each, values in zip(elements, before, strict=True):
            each[...] = values
        reports += map(str, run(schedule))
        for argument, found, expected in zip(arguments, elements, first, strict=True):
            if not np.array_equal(found, expected):
                reports.append(f"{kernel}: {_difference(argument, expected, found, schedule)}")
    return list(dict.fromkeys(reports))


def _elements(argument: Argument) -> np.ndarray:
    """Return the bits of a tensor's elements; they share its memory, unknown to autograd."""
    tensor, (start, end, _) = argument.tensor, argument.memory
    size = tensor.element_size()
    return np.ndarray(
        tuple(tensor.shape),
        f"u{size}",
        (ctypes.c_char * (end - start)).from_address(start),
        strides=[size * stride for stride in tensor.stride()],
    )


def _difference(
    argument: Argument,
    expected: np.ndarray,
    found: np.ndarray,
    schedule: Schedule,
) -> str:
    """Describe the first element that differs."""
    index = tuple(map(int, np.argwhere(expected != found)[0]))
    dtype = argument.tensor.dtype
    values = [
        torch.frombuffer(bytearray(each[index].tobytes()), dtype=dtype).item()
        for each in (expected, found)
    ]
    element = f"{argument.name}{list(index)} ({dtype})"
    return f"results differ: {element} is {values[0]} in order and {values[1]} under {schedule}"
