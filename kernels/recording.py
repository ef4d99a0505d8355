"""Record the launches of kernels, for ``mmfused inspect`` and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from triton import KernelInterface

from . import tiles


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: Any  # the jit function
    args: dict[str, Any]  # tensors, numbers and None by parameter name
    constexprs: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, maxnreg, ...

    @property
    def name(self) -> str:
        """The name of the jit function."""
        return self.kernel.fn.__name__


def _launch_of(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    constexprs = kernel.fn.__annotations__  # a jit function annotates only its constexprs
    return Launch(
        kernel,
        {name: given[name] for name in kernel.arg_names if name not in constexprs},
        {name: given[name] for name in kernel.arg_names if name in constexprs},
        {name: given[name] for name in sorted(given) if name not in kernel.arg_names},
    )


@contextmanager
def launches_for(arch: int) -> Iterator[list[Launch]]:
    """Record launches without running kernels, so that launchers accept meta tensors.

    Args:
        arch: the architecture that plans are chosen for, such as 90 for sm_90.
    """
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: launches.append(_launch_of(kernel, args, named))

    with (
        mock.patch.object(tiles, "pretended_arch", arch),
        mock.patch.object(KernelInterface, "__getitem__", record),
    ):
        yield launches


@contextmanager
def launches_made() -> Iterator[list[Launch]]:
    """Record launches, and run the kernels."""
    launches: list[Launch] = []
    original = KernelInterface.__getitem__

    def record(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            launches.append(_launch_of(kernel, args, named))
            original(kernel, grid)(*args, **named)

        return launch

    with mock.patch.object(KernelInterface, "__getitem__", record):
        yield launches
