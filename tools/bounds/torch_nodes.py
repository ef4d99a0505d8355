"""What a node of a traced graph computes, reads and writes."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

Kind = Literal["view", "product", "attention", "index", "reduction", "pointwise"]

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
REDUCTIONS = set(
    "sum mean amax amin max min var var_mean std prod any all argmax argmin logsumexp norm "
    "linalg_vector_norm _softmax _log_softmax native_layer_norm".split()
)
# These write where an index says.
SCATTERS = set(
    "scatter scatter_add scatter_reduce index_put _unsafe_index_put index_add index_copy "
    "embedding_dense_backward".split()
)
INDEXING = SCATTERS | set(
    "sort topk cumsum searchsorted bincount nonzero histc logcumsumexp".split()
)
# These read only the rows of their first tensor that an index chooses.
GATHERS = {"index", "_unsafe_index", "gather", "index_select", "embedding"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def name(node: fx.Node) -> str:
    """Return the name of a node's operator without its overload, such as "addmm"."""
    if node.op != "call_function" or node.target is operator.getitem:
        return "getitem" if node.op == "call_function" else node.op
    return node.target._schema.name.split("::")[1]


def kind(node: fx.Node) -> Kind:
    found = name(node)
    if is_view(node):
        return "view"
    if found in PRODUCTS:
        return "product"
    if found.startswith("_scaled_dot_product"):
        return "attention"
    if found in INDEXING and not sets_one_of_a_row(node):
        return "index"
    return "reduction" if found in REDUCTIONS else "pointwise"


def sets_one_of_a_row(node: fx.Node) -> bool:
    """Return whether an operator writes a number to one place of each row of a constant.

    torch.compile makes a comparison of indices of it, as for the gradient of F.cross_entropy.
    """
    if name(node) != "scatter" or name(stored(node.all_input_nodes[0])) != "full":
        return False
    _, dim, index, *_ = node.args
    found = tensor(index) if isinstance(index, fx.Node) else None
    return found is not None and isinstance(dim, int) and found.shape[dim] == 1


def is_view(node: fx.Node) -> bool:
    """Return whether a node moves no data: views, parts of tuples, and empty tensors."""
    if node.op != "call_function" or node.target is operator.getitem or name(node) in EMPTY:
        return True
    aliases = [result.alias_info for result in node.target._schema.returns]
    return name(node) == "_unsafe_view" or any(a is not None and not a.is_write for a in aliases)


def stored(node: fx.Node) -> fx.Node:
    """Return the node whose result is the memory that ``node`` is a view of.

    This is an operator, one result of an operator with several (a getitem), or an input.
    """
    while node.op == "call_function" and is_view(node) and name(node) not in EMPTY:
        source: fx.Node = node.all_input_nodes[0]
        if node.target is operator.getitem and not is_view(source):
            return node
        node = source
    return node


def operator_of(value: fx.Node) -> fx.Node:
    """Return the node that computes a stored value."""
    return value.args[0] if value.target is operator.getitem else value  # type: ignore[return-value]


def tensor(node: fx.Node) -> Tensor | None:
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def tensors(node: fx.Node) -> list[Tensor]:
    """Return the results of an operator."""
    found = node.meta.get("val")
    return [
        x for x in (found if isinstance(found, tuple | list) else [found]) if torch.is_tensor(x)
    ]


def nbytes(node: fx.Node) -> int:
    """Return the bytes that a view covers; a dimension that is expanded counts once."""
    found = tensor(node)
    if found is None:
        return 0
    sizes = [n for n, stride in zip(found.shape, found.stride(), strict=True) if stride or n < 2]
    return math.prod(sizes) * found.dtype.itemsize


def numel(node: fx.Node) -> int:
    """Return the number of elements of a node's largest result."""
    return max((x.numel() for x in tensors(node)), default=0)


def iterations(node: fx.Node) -> int:
    """Return the number of elements that a kernel for this operator goes through."""
    inputs = () if name(node) in GATHERS else node.all_input_nodes
    return max([numel(node), *(numel(source) for source in inputs)])


class Read(NamedTuple):
    """A view of stored memory that an operator reads."""

    value: fx.Node
    offset: int
    bytes: int


def reads(node: fx.Node) -> list[Read]:
    """Return what an operator reads."""
    found = []
    sources = node.all_input_nodes
    for source in sources:
        value, view = stored(source), tensor(source)
        if view is None or name(value) in EMPTY:
            continue
        count = min(nbytes(source), nbytes(value))
        if name(node) in GATHERS and source is sources[0]:
            count = min(count, numel(node) * view.dtype.itemsize)
        found.append(Read(value, int(view.storage_offset()), count))
    if kind(node) == "index" and name(node) in SCATTERS and found:
        found[0] = found[0]._replace(bytes=0)  # it is changed in place, see `written`
    return found


def written(node: fx.Node) -> int:
    """Return the bytes that an operator writes, if all its results are used.

    An operator that scatters reads and writes the elements that it changes.
    """
    if name(node) not in SCATTERS:
        return sum(x.numel() * x.dtype.itemsize for x in tensors(node))
    source = max((read.bytes for read in reads(node)), default=0)
    return 2 * min(source, nbytes(node))


def read_bytes(found: list[Read]) -> int:
    """Return the bytes of reads, where memory that is read twice counts once."""
    views: dict[fx.Node, set[tuple[int, int]]] = {}
    for read in found:
        views.setdefault(read.value, set()).add((read.offset, read.bytes))
    return sum(
        min(sum(count for _, count in parts), nbytes(value)) for value, parts in views.items()
    )


class Axes(NamedTuple):
    """What a reduction keeps and sums: numbers of elements, and whether it sums along rows."""

    kept: int
    reduced: int
    rows: bool


def axes(node: fx.Node) -> Axes:
    """Return the axes of a reduction."""
    source = tensor(node.all_input_nodes[0])
    assert source is not None
    kept = min(x.numel() for x in tensors(node))
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims or range(source.dim())
    dims = {dim % source.dim() for dim in dims} if source.dim() else set()
    fastest = min(
        (d for d in range(source.dim()) if source.shape[d] > 1), key=source.stride, default=0
    )
    return Axes(kept, source.numel() // max(kept, 1), fastest in dims)


def flops(node: fx.Node) -> int:
    """Return the FLOPs of a matrix product or of attention, else 0; a multiply-add is 2.

    Attention has 2 products in the forward and 5 in the backward, which computes the logits again.
    """
    if kind(node) not in ("product", "attention"):
        return 0
    found, shapes = name(node), [tuple(x.shape) for x in node_tensors(node)]
    if "attention" in found:
        backward = "backward" in found
        query, key, value = shapes[1:4] if backward else shapes[:3]
        logits = math.prod(query[:-1]) * key[-2]
        logit_products, value_products = (3, 2) if backward else (1, 1)
        return 2 * logits * (logit_products * query[-1] + value_products * value[-1])
    if found in ("addmm", "baddbmm"):
        shapes = shapes[1:]
    if found == "_grouped_mm" and len(shapes[0]) == len(shapes[1]) == 2:
        return 2 * shapes[0][0] * shapes[0][1] * shapes[1][1]  # each group has some of the columns
    return 2 * math.prod(shapes[0]) * shapes[1][-1]


def node_tensors(node: fx.Node) -> list[Tensor]:
    """Return the tensors that are arguments, in order; an argument may occur twice."""
    found = [tensor(arg) for arg in node.args if isinstance(arg, fx.Node)]
    return [x for x in found if x is not None]


def rate(node: fx.Node, tf32: bool) -> str:
    """Return what multiplies in a product; ``tf32``: in float32, tensor cores are allowed."""
    if kind(node) != "product" or node_tensors(node)[0].dtype.itemsize == 2:
        return "matrix"
    return "tf32" if tf32 else "float32"
