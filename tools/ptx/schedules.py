"""Run each launch under several schedules, and compare the results bit by bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .machine import IN_ORDER, Fault, Memory, Schedule

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
        return (Schedule(checks=False),)
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

    Results that differ between schedules are a fault too.
    """
    memory = [argument.memory for argument in arguments]
    if len(schedules) == 1:
        return [str(fault) for fault in run(schedules[0])]
    before = [_read(span) for span in memory]
    reports = [str(fault) for fault in run(schedules[0])]
    first = [_read(span) for span in memory]
    for schedule in schedules[1:]:
        for span, content in zip(memory, before, strict=True):
            ctypes.memmove(span.start, content, len(content))
        reports += map(str, run(schedule))
        for argument, expected in zip(arguments, first, strict=True):
            found = _read(argument.memory)
            if found != expected:
                reports.append(f"{kernel}: {_difference(argument, expected, found, schedule)}")
    return list(dict.fromkeys(reports))


def _read(span: Memory) -> bytes:
    return ctypes.string_at(span.start, span.end - span.start)


def _difference(argument: Argument, expected: bytes, found: bytes, schedule: Schedule) -> str:
    """Describe the first element that differs."""
    tensor = argument.tensor
    size = tensor.element_size()
    byte = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    place = byte // size

    def value(content: bytes) -> object:
        element = bytearray(content[place * size : place * size + size])
        return torch.frombuffer(element, dtype=tensor.dtype).item()

    element = f"{argument.name}{_index(tensor, place)} ({tensor.dtype})"
    values = f"{value(expected)} in order and {value(found)} under {schedule}"
    return f"results differ: {element} is {values}"


def _index(tensor: torch.Tensor, place: int) -> list[int]:
    """Return the index of the element that is ``place`` elements after the first one."""
    index = [0] * tensor.ndim
    for axis in sorted(range(tensor.ndim), key=tensor.stride, reverse=True):
        if tensor.stride(axis) and tensor.shape[axis] > 1:
            index[axis], place = divmod(place, tensor.stride(axis))
    return index
