"""The order in which the machine runs the lanes of a warp that a branch divided.

Lanes at the earliest instruction run first, so that divided lanes meet again where their paths do.
The order of the text is not enough: the compiler may place the end of a loop before its start.
"""

from __future__ import annotations

from collections.abc import Iterator

from .registers import Block, basic_blocks
from .translate import Instruction


def order_of(instructions: list[Instruction]) -> list[int]:
    """Return each instruction's place: after its predecessors, except along back edges of loops."""
    blocks = basic_blocks(instructions)
    pcs = [pc for k in _reverse_postorder(blocks) for pc in range(*blocks[k][:2])]
    places = [0] * len(pcs)
    for place, pc in enumerate(pcs):
        places[pc] = place
    return places


def _reverse_postorder(blocks: list[Block]) -> list[int]:
    """Return the numbers of all blocks; what follows a loop comes after all of the loop."""
    reached = _reached(blocks)
    visits: dict[int, Iterator[int]] = {}
    done, stack = [], [0]
    while stack:
        k = stack[-1]
        if k not in visits:
            # What leaves the loop of k is visited first, and so comes last.
            visits[k] = iter(sorted(blocks[k][2], key=lambda f: (reached[f] >> k & 1, -f)))
        following = next(visits[k], None)
        if following is None:
            done.append(stack.pop())
        elif following not in visits:
            stack.append(following)
    return done[::-1] + [k for k in range(len(blocks)) if k not in visits]


def _reached(blocks: list[Block]) -> list[int]:
    """Return for each block a bit for each block that may run after it began."""
    reached = [1 << k for k in range(len(blocks))]
    changed = True
    while changed:
        changed = False
        for k in reversed(range(len(blocks))):
            bits = reached[k]
            for following in blocks[k][2]:
                bits |= reached[following]
            changed = changed or bits != reached[k]
            reached[k] = bits
    return reached
