"""The launches of a traced graph: one for each operator, or as torch.compile would fuse them.

These rules decide what is fused. Where in doubt they favour the graph: torch.compile would move
more bytes. Its own scheduler (torch 2.14, told that it has an H200) plans launches that move 5 and
12 % more in the passes of cross-attention, and 73 % more in a backward of InfoNCE.

* A matrix product, an attention, a scatter, a sort and a scan are a launch each.
* All other operators between them are fused: an operator joins the launch of those that it reads.
* An operator that needs the result of a reduction joins it only if it goes through the same rows.
  It needs another launch after a sum of all elements, or after sums along two axes.
* Operators that read the same tensor and go through as many elements share a launch.
* A pointwise operator is computed again where it is read, if that moves fewer bytes.
* Pointwise operators after a product are its epilogue if they go through its result. They move
  fewer bytes than with cuBLAS, and the product is as fast, which Triton's is not.

A launch reads what it needs from others once, and writes what others need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import fx

from . import torch_nodes as nodes
from .torch_nodes import Axes, Read
from .work import Work

WHOLE_ROW = 32768  # elements of a row that a program can hold and use after it reduced the row


def eager_launches(graph: fx.Graph, tf32: bool = False) -> list[Work]:
    """Return one launch for each operator that is not a view."""
    return [
        Work(
            nodes.name(node),
            nodes.flops(node),
            nodes.read_bytes(nodes.reads(node)) + nodes.written(node),
            nodes.rate(node, tf32),
        )
        for node in operators(graph)
    ]


def compiled_launches(graph: fx.Graph, tf32: bool = False) -> list[Work]:
    """Return the launches as torch.compile would fuse them, in an order in which they can run."""
    return Fusion(graph, tf32).launches()


def operators(graph: fx.Graph) -> list[fx.Node]:
    """Return the operators that compute something, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and nodes.kind(n) != "view"]


class Fusion:
    """The operators of a graph, the launches that they are in, and what each launch moves."""

    def __init__(self, graph: fx.Graph, tf32: bool) -> None:
        self.tf32 = tf32
        self.order = operators(graph)
        self.results = {nodes.stored(x) for x in graph.output_node().all_input_nodes}
        self.reads = {node: nodes.reads(node) for node in self.order}
        self.users: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            for read in self.reads[node]:
                self.users[read.value].append(node)
        self.level: dict[fx.Node, int] = {}
        self.reduced: dict[fx.Node, set[Axes]] = {}
        for node in self.order:
            self.place(node)
        self.groups = self.grouped()
        self.group_of = {node: group for group in self.groups for node in group}
        self.inlined: set[fx.Node] = set()
        for group in reversed(self.groups):
            self.inline(self.can_inline(group))
        for node in reversed(self.order):
            self.inline(self.can_inline([node]))

    # ---- which operators share a launch ----------------------------------------------------------

    def place(self, node: fx.Node) -> None:
        """Set the level of a node: the number of launches that must come before, at least.

        The fused operators of a level run before its products.
        """
        before = [nodes.operator_of(r.value) for r in self.reads[node]]
        before = [other for other in before if other in self.level]
        levels = [self.level[other] + (is_fused(node) and not is_fused(other)) for other in before]
        level = max(levels, default=0)
        reduced: set[Axes] = set().union(
            *(self.reduced[other] for other in before if self.level[other] == level)
        )
        if is_fused(node) and not can_follow(node, reduced):
            level, reduced = level + 1, set()
        if nodes.kind(node) == "reduction":
            reduced = reduced | {nodes.axes(node)}
        self.level[node], self.reduced[node] = level, reduced if is_fused(node) else set()

    def grouped(self) -> list[tuple[fx.Node, ...]]:
        """Return the operators of each launch."""
        parent = {node: node for node in self.order}

        def root(node: fx.Node) -> fx.Node:
            while parent[node] is not node:
                node = parent[node]
            return node

        readers: dict[tuple[fx.Node, int, int], fx.Node] = {}
        for node in filter(is_fused, self.order):
            for read in self.reads[node]:
                other = nodes.operator_of(read.value)
                if other not in self.level or not is_fused(other):
                    same = (read.value, self.level[node], nodes.iterations(node))
                    other = readers.setdefault(same, node)
                if self.level[other] == self.level[node]:
                    parent[root(node)] = root(other)
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            found[root(node)].append(node)
        return [tuple(group) for group in found.values()]

    # ---- what a launch moves ---------------------------------------------------------------------

    def needed(self, read: Read) -> list[Read]:
        """Return what a launch reads for ``read``: the inputs of operators that are inlined."""
        node = nodes.operator_of(read.value)
        if node not in self.inlined:
            return [read]
        return [each for source in self.reads[node] for each in self.needed(source)]

    def group_reads(self, group: Iterable[fx.Node]) -> list[Read]:
        """Return what a launch reads from others."""
        inside = set(group) - self.inlined
        found = [each for node in inside for read in self.reads[node] for each in self.needed(read)]
        return [read for read in found if nodes.operator_of(read.value) not in inside]

    def is_written(self, value: fx.Node, group: Iterable[fx.Node]) -> bool:
        """Return whether a value of a launch is needed outside of it."""
        inside = set(group)
        return value in self.results or any(user not in inside for user in self.users_of(value))

    def users_of(self, value: fx.Node) -> list[fx.Node]:
        """Return the operators that read a value; an operator that is inlined reads nothing."""
        found = []
        for user in self.users[value]:
            found += self.users_of(user) if user in self.inlined else [user]
        return found

    def values(self, node: fx.Node) -> list[fx.Node]:
        """Return the stored results of an operator."""
        if isinstance(node.meta.get("val"), tuple | list):
            return [user for user in node.users if nodes.stored(user) is user]
        return [node]

    def written(self, group: Iterable[fx.Node]) -> int:
        """Return the bytes that a launch writes."""
        alive = [node for node in group if node not in self.inlined]
        if len(alive) == 1 and nodes.name(alive[0]) in nodes.SCATTERS:
            return nodes.written(alive[0])
        values = [value for node in alive for value in self.values(node)]
        return sum(nodes.nbytes(value) for value in values if self.is_written(value, group))

    def moved(self, group: Iterable[fx.Node]) -> int:
        """Return the bytes that a launch reads and writes."""
        return nodes.read_bytes(self.group_reads(group)) + self.written(group)

    def can_inline(self, group: Iterable[fx.Node]) -> set[fx.Node]:
        """Return the operators of a launch that can be computed where they are read."""
        found: set[fx.Node] = set()
        for node in reversed(list(group)):
            users = self.users[node]
            if (
                nodes.kind(node) == "pointwise"
                and node not in self.results
                and users
                and all(is_fused(u) and (u in found or u not in group) for u in users)
            ):
                found.add(node)
        return found - self.inlined

    def inline(self, chosen: set[fx.Node]) -> None:
        """Compute operators in all launches that read them, if that moves fewer bytes."""
        users = {user for node in chosen for user in self.users_of(node)} | chosen
        groups = {self.group_of[node] for node in users}
        if len(groups) < 2:
            return
        before = sum(map(self.moved, groups))
        self.inlined |= chosen
        if sum(map(self.moved, groups)) > before:
            self.inlined -= chosen

    # ---- launches --------------------------------------------------------------------------------

    def launches(self) -> list[Work]:
        groups = [[n for n in group if n not in self.inlined] for group in self.groups]
        groups = [group for group in groups if group and self.written(group)]
        epilogues: dict[fx.Node, list[fx.Node]] = {}
        for group in groups:
            product = self.product_before(group)
            if product is not None and product not in epilogues:
                epilogues[product] = group
        inside = {node for group in epilogues.values() for node in group}
        return [
            self.work([*group, *epilogues.get(group[0], ())])
            for group in groups
            if group[0] not in inside
        ]

    def product_before(self, group: list[fx.Node]) -> fx.Node | None:
        """Return the product of which a group of pointwise operators is the epilogue, or None."""
        if not all(is_fused(node) and nodes.kind(node) == "pointwise" for node in group):
            return None
        level = self.level[group[0]] - 1
        found = [nodes.operator_of(read.value) for read in self.group_reads(group)]
        found = [
            node
            for node in found
            if nodes.name(node) in nodes.PRODUCTS - {"_grouped_mm"} and self.level[node] == level
        ]
        # The last one: what else the group reads is there before it.
        last = max(found, key=self.order.index, default=None)
        if last is None:
            return None
        return last if all(nodes.iterations(n) <= nodes.numel(last) for n in group) else None

    def work(self, group: list[fx.Node]) -> Work:
        """Return what a launch does; at most its first operator is a product or attention."""
        names = list(dict.fromkeys(map(nodes.name, group)))
        return Work(
            " ".join(names if len(names) < 5 else [names[0], "...", *names[-2:]]),
            nodes.flops(group[0]),
            self.moved(group),
            nodes.rate(group[0], self.tf32),
        )


def is_fused(node: fx.Node) -> bool:
    return nodes.kind(node) in ("pointwise", "reduction")


def can_follow(node: fx.Node, reduced: set[Axes]) -> bool:
    """Return whether an operator can be in the launch of the reductions whose results it needs."""
    if not reduced:
        return True
    first, *others = reduced
    if others:
        return False
    size = nodes.iterations(node)
    if size <= first.kept:
        return nodes.kind(node) == "pointwise"
    return size == first.kept * first.reduced and first.reduced <= WHOLE_ROW
