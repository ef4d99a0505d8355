"""What an operator of torch does on a GPU: launch, wait for the host, FLOPs and bytes.

One operator counts as one launch. Some run several kernels: a sort, an accumulating ``index_put_``,
the backward of attention, a matrix product that is split along its inner dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from mmfused.tools.end_to_end_count import ALLOCATIONS, moved

from .pretend import is_on_host, put_on_gpu

_ALIGNMENT = 64  # of torch's own allocations on a CPU
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put")
# Each copies first, then writes into the copy.
_COMPOSED = ("index_put", "masked_fill")
_MASKS = (torch.bool, torch.uint8)


def name_of(function: Any) -> str:
    """Return the name of an operator, as on a GPU: ``mm``, ``index_select``."""
    return function._overloadpacket.__name__.replace("_for_cpu", "")


def is_view(function: Any) -> bool:
    """Return whether an operator only returns another view of its argument."""
    if name_of(function) == "_unsafe_view":
        return True
    schema = function._schema
    return not schema.is_mutable and any(out.alias_info is not None for out in schema.returns)


def is_composed(function: Any) -> bool:
    """Return whether an operator has no kernel of its own, but runs several others."""
    return name_of(function) in _COMPOSED


def is_allocation(function: Any) -> bool:
    """Return whether an operator only allocates memory."""
    return name_of(function) in ALLOCATIONS


def waits(function: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the host must wait for values on the GPU, such as the size of the output."""
    if name_of(function) in _INDEXING:
        given = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in _MASKS]
        return bool(masks) or any(map(is_on_host, given))  # what is on the host is copied
    tags = function.tags
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def flops_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the FLOPs of an operator's matrix products."""
    formula = flop_registry.get(function._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def bytes_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes of the tensors that an operator reads and writes, each once."""
    return moved(function, function._overloadpacket.__name__, args, kwargs, out)


# ---- outputs without computing -------------------------------------------------------------------


def on_meta(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operator returns for tensors without values."""
    args, kwargs = tree_map(_to_meta, (args, kwargs))
    if any(argument.name == "device" for argument in function._schema.arguments):
        kwargs["device"] = torch.device("meta")
    return function(*args, **kwargs)


def _to_meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


def zeros_like_meta(out: Any) -> Any:
    """Return zeros in place of tensors on the device "meta"."""
    return tree_map(lambda x: _zeros(x) if isinstance(x, Tensor) else x, out)


def _zeros(x: Tensor) -> Tensor:
    return untouched(x.shape, x.stride(), dtype=x.dtype)


def untouched(
    size: tuple[int, ...] | torch.Size,
    stride: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return zeros whose memory is taken only where something is written."""
    if stride is None:
        stride = torch.empty(size, device="meta").stride()
    extent = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    num_bytes = (extent if 0 not in size else 0) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(num_bytes + _ALIGNMENT, np.uint8))  # calloc
    memory = memory[-memory.data_ptr() % _ALIGNMENT :][:num_bytes]
    return put_on_gpu(memory.view(dtype).as_strided(size, stride))


def mutated(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operator that writes into its arguments returns."""
    schema = function._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    written = {
        alias: given[argument.name]
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for alias in argument.alias_info.before_set
    }
    returned = [written[next(iter(out.alias_info.before_set))] for out in schema.returns]
    return returned[0] if len(returned) == 1 else tuple(returned) or None


def elements(values: Any) -> int:
    """Return the number of elements of all tensors in ``values``."""
    return sum(x.numel() for x in _tensors(values))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, Tensor))
