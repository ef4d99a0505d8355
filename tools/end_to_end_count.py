"""Count the FLOPs, the moved bytes and the saved bytes of a training step and of the ops in it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

# Classes and functions that do an op's work, in the library and in benchmarks/torch_modules.py.
MODULES = {
    "QueryPooling": "query pooling",
    "Pooling": "query pooling",
    "BidirectionalGatedCrossAttention": "cross-attention",
    "Experts": "experts",
    "MaskedInfoNCE": "InfoNCE",
}
FUNCTIONS = {
    "topk_routing": "experts",
    "grouped_linear": "experts",
    "masked_info_nce": "InfoNCE",
}
OPS = ("query pooling", "cross-attention", "experts", "InfoNCE")

# The first argument is read only where an index points, or not at all.
GATHERS = {"embedding", "index_select", "gather", "index"}
OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
GROUPED = {"segment_linear", "segment_linear_bwd"}


# ---- counting ------------------------------------------------------------------------------------


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def size(x: Tensor) -> int:
    """Return the bytes of a tensor's elements; an expanded element counts once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Counter(TorchDispatchMode):
    """Count FLOPs of matrix products with torch's formulas, and the bytes that each op moves.

    The bytes of an op are the sizes of its tensor inputs and outputs. Views and allocations move
    nothing.

    Args:
        live: share of the rows that grouped products read; the other rows are padding.
    """

    def __init__(self, live: float = 1.0) -> None:
        super().__init__()
        self.live, self.flops, self.bytes = live, 0.0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet in flop_registry:
            share = self.live if packet.__name__ in GROUPED else 1
            self.flops += share * flop_registry[packet](*args, **kwargs, out_val=out)
        self.bytes += moved(function, packet.__name__, args, kwargs, out)
        return out


def moved(
    function: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> int:
    given = args, {key: value for key, value in kwargs.items() if key != "out"}  # only written
    inputs = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    known = {storage(x) for x in inputs}
    if not function._schema.is_mutable and all(storage(x) in known for x in outputs):
        return 0
    if name in ALLOCATIONS:
        return 0
    if name in GATHERS:
        return 2 * sum(map(size, outputs)) + sum(map(size, inputs[1:]))
    read = inputs[1:] if name in OVERWRITES else inputs
    return sum(map(size, read)) + sum(map(size, outputs))


@contextmanager
def saving(ignored: list[Tensor]) -> Iterator[dict[int, tuple[StorageWeakRef, int]]]:
    """Collect the storages that are saved for the backward, except those of ``ignored``."""
    known, found = {storage(x) for x in ignored}, {}

    def pack(x: Tensor) -> Tensor:
        if storage(x) not in known:
            kept = x.untyped_storage()
            found[storage(x)] = (StorageWeakRef(kept), kept.nbytes())
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def counted(
    run: Callable[[], Any],
    ignored: list[Tensor],
    live: float = 1.0,
) -> dict[str, float]:
    """Count ``run()`` and its backward; "saved" is what remains for the backward after ``run()``.

    ``ignored``: parameters and inputs, which are not counted as saved.
    """
    counter = Counter(live)
    with counter, saving(ignored) as found:
        out = run()
    saved = sum(count for alive, count in found.values() if not alive.expired())
    leaves, upstream = with_upstream(out)
    if leaves:
        with counter:
            torch.autograd.backward(leaves, upstream)
    return {"flops": counter.flops, "bytes": counter.bytes, "saved": saved}


def with_upstream(out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs that need a gradient, and a gradient for each."""
    leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    return leaves, [torch.ones_like(x) for x in leaves]


# ---- the ops of a step ---------------------------------------------------------------------------


@dataclass
class Call:
    """A call of an op with its arguments, detached from the graph."""

    op: str
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    parameters: list[nn.Parameter] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        if self.attributes:  # see Experts in mmfused/models/moon2.py
            owner: Any = self.function.__self__  # type: ignore[attr-defined]
            vars(owner).update(self.attributes, reports=[])
        return self.function(*self.args, **self.kwargs)

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]


def leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of ops that ``model`` makes."""
    calls: list[Call] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        values = {"padding": module.padding} if type(module).__name__ == "Experts" else {}
        inputs = tree_map(leaf, (args, kwargs))
        op = MODULES[type(module).__name__]
        calls.append(Call(op, module.forward, *inputs, list(module.parameters()), values))

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call(FUNCTIONS[name], function, *tree_map(leaf, (args, kwargs))))
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ in MODULES:
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
        file = type(model).__module__  # mmfused.models.x, or its copy mmfused.benchmarks.torch_x
        files = [sys.modules[name] for name in (file, f"{file}_losses") if name in sys.modules]
        for module, name in itertools.product(files, FUNCTIONS):
            if hasattr(module, name):
                replaced = wrapped(name, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, replaced))
        yield calls
