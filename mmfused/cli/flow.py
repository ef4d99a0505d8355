"""Loops of a control flow graph, whose blocks are numbered from 0, the entry."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NaturalLoop:
    """The blocks from which a jump back to ``header`` can be reached without leaving the loop."""

    header: int
    body: frozenset[int]  # with the header and the blocks of inner loops
    depth: int  # 1 for an outermost loop
    own: frozenset[int]  # the body without the blocks of inner loops


def reachable(successors: Sequence[Collection[int]]) -> list[int]:
    """Return the blocks that can be reached, in reverse postorder.

    A jump from a block to an earlier one of this order, or to itself, closes a loop.
    """
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        new = next((other for other in following if other not in seen), None)
        if new is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(successors[new])))
    return order[::-1]


def natural_loops(successors: Sequence[Collection[int]]) -> list[NaturalLoop]:
    """Return the loops in the order of their headers."""
    before = _predecessors(successors)
    dominators = _dominators(successors, before)
    bodies: dict[int, set[int]] = {}
    for block, over in dominators.items():
        for header in successors[block]:
            if header in over:  # every way to the block leads through the header
                bodies.setdefault(header, {header}).update(_body(header, block, before))
    loops = []
    for header, body in sorted(bodies.items()):
        inner = [other for head, other in bodies.items() if head in body and head != header]
        depth = sum(header in other for other in bodies.values())
        own = body.difference(*inner)
        loops.append(NaturalLoop(header, frozenset(body), depth, frozenset(own)))
    return loops


def path_lengths(
    loop: NaturalLoop,
    successors: Sequence[Collection[int]],
    sizes: Sequence[int],
) -> tuple[int, int]:
    """Return the least and the greatest sum of sizes that one iteration runs through.

    Inner loops count as nothing.
    """
    place = {block: k for k, block in enumerate(reachable(successors))}
    least: dict[int, int] = {loop.header: 0}
    most: dict[int, int] = {loop.header: 0}
    ends = []
    for block in sorted(loop.body, key=place.__getitem__):
        size = sizes[block] if block in loop.own else 0
        for other in successors[block]:
            if other == loop.header:
                ends.append((least[block] + size, most[block] + size))
            elif other in loop.body and place[other] > place[block]:
                least[other] = min(least.get(other, least[block] + size), least[block] + size)
                most[other] = max(most.get(other, 0), most[block] + size)
    return min(end[0] for end in ends), max(end[1] for end in ends)


def _predecessors(successors: Sequence[Collection[int]]) -> list[list[int]]:
    """Return the predecessors of each block, those only that can be reached."""
    before: list[list[int]] = [[] for _ in successors]
    for block in reachable(successors):
        for other in successors[block]:
            before[other].append(block)
    return before


def _dominators(
    successors: Sequence[Collection[int]],
    before: list[list[int]],
) -> dict[int, set[int]]:
    """Return, for each block that can be reached, the blocks that every way to it runs through."""
    order = reachable(successors)
    over = {block: set(order) for block in order}
    over[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(over[other] for other in before[block])) | {block}
            if new != over[block]:
                over[block] = new
                changed = True
    return over


def _body(
    header: int,
    end: int,
    before: list[list[int]],
) -> set[int]:
    """Return the blocks from which ``end`` can be reached without the header."""
    found = {header}
    stack = [end]
    while stack:
        block = stack.pop()
        if block not in found:
            found.add(block)
            stack += before[block]
    return found
