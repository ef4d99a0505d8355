"""Record the launches of kernels, for ``mmfused inspect`` and tests.

Arguments of kernels are tensors, numbers and None, tensor descriptors, and NamedTuples of these,
except of descriptors: Triton 3.6 compiles a kernel that takes a descriptor inside of a tuple, but
cannot launch it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from triton import KernelInterface

from . import tiles


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: Any  # the jit function
    args: dict[str, Any]  # by parameter name
    constexprs: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, maxnreg, ...

    @property
    def name(self) -> str:
        """The name of the jit function."""
        return self.kernel.fn.__name__


class Specialization(NamedTuple):
    """What a compiled kernel depends on, besides its source and its options.

    Paths lead to arguments: ``(i,)`` is parameter i, ``(i, j)`` member j of the NamedTuple that
    parameter i takes.
    """

    signature: dict[str, Any]  # types by parameter name: "*bf16", "i32", "constexpr", or a tuple
    constexprs: dict[tuple[int, ...], Any]  # also every argument that is None or 1
    attributes: dict[tuple[int, ...], list[list[Any]]]  # such as "divisible by 16"


def is_descriptor(value: Any) -> bool:
    """Return whether ``value`` is a tensor descriptor of Triton or Gluon."""
    return type(value).__name__.startswith("TensorDescriptor")


def specialize(launch: Launch, arch: int) -> Specialization:
    """Return the types and constants that Triton compiles ``launch`` for.

    Triton's own launcher decides: it makes None and 1 constants, for example, and finds out which
    integers and addresses are divisible by 16. The address of a meta tensor is 0.

    Args:
        launch: a launch with tensors on any device.
        arch: the architecture, such as 90 for sm_90.
    """
    kernel, backend, bind = _binder(launch.kernel, arch)
    given = launch.args | launch.constexprs | launch.options
    bound, types, options = bind(**given)
    _, *found = kernel._pack_args(backend, given, bound, types, options)
    return Specialization(*found)


@functools.cache
def _binder(kernel: Any, arch: int) -> tuple[Any, Any, Callable[..., Any]]:
    """Return the jit function, Triton's backend, and its function from arguments to types."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # the interpreter's function does not specialise
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return kernel, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _launch_of(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    for name, value in given.items():
        _check_descriptors(f"{kernel.fn.__name__}: {name}", value)
    # Triton decides in the same way. Names of types are strings in some modules.
    annotations = kernel.fn.__annotations__.items()
    constexprs = {name for name, annotation in annotations if "constexpr" in str(annotation)}
    parameters = [name for name in kernel.arg_names if name in given]
    return Launch(
        kernel,
        {name: given[name] for name in parameters if name not in constexprs},
        {name: given[name] for name in parameters if name in constexprs},
        {name: given[name] for name in sorted(given) if name not in kernel.arg_names},
    )


def _check_descriptors(name: str, value: Any) -> None:
    """Raise ValueError if ``value`` is a tuple with a tensor descriptor in it."""
    if not isinstance(value, tuple):
        return
    fields = getattr(value, "_fields", range(len(value)))
    for field, member in zip(fields, value, strict=True):
        if is_descriptor(member):
            raise ValueError(
                f"{name}.{field}: got a tensor descriptor inside of a tuple, expected it as a "
                "parameter of its own, because Triton 3.6 cannot launch it otherwise"
            )
        _check_descriptors(f"{name}.{field}", member)


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
