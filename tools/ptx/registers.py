"""Place registers in the register file of a warp.

A kernel names thousands of registers of 128 or 256 bytes. Registers whose values are never needed
at the same time share a place, so that the registers of a warp fit into the caches.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .translate import Instruction, Operand

_JUMPS = ("bra", "brx.idx", "ret")
# Begin and end of a basic block, and the numbers of the blocks that may follow it.
Block = tuple[int, int, list[int]]


def place_registers(
    instructions: list[Instruction],
    wide: dict[str, bool],
    start: int,
) -> tuple[dict[str, int], int]:
    """Return the byte offset of each register, and the end.

    Args:
        instructions: the kernel's code.
        wide: whether a register has 64 bits.
        start: the first free byte.
    """
    names = sorted({op.value for i in instructions for op in i.operands if op.kind == "register"})
    bit = {name: 1 << k for k, name in enumerate(names)}
    reads = [_bits(i.operands[i.outputs :], bit) for i in instructions]
    writes = [_bits(i.operands[: i.outputs], bit) for i in instructions]
    blocks = basic_blocks(instructions)
    live_in, live_out = _liveness(instructions, blocks, reads, writes)
    first, last = [len(instructions)] * len(names), [-1] * len(names)
    for (begin, end, _), entering, leaving in zip(blocks, live_in, live_out, strict=True):
        spans = [(entering, begin), (leaving, end - 1)]
        spans += [(reads[pc] | writes[pc], pc) for pc in range(begin, end)]
        for bits, pc in spans:
            for k in _indices(bits):
                first[k], last[k] = min(first[k], pc), max(last[k], pc)
    for k in _indices(_bits(_written_late(instructions), bit)):
        first[k], last[k] = 0, len(instructions)
    return _place(names, [wide[name] for name in names], first, last, start)


def _written_late(instructions: list[Instruction]) -> list[Operand]:
    """Return the registers that an asynchronous wgmma writes, at any time until its wait."""
    return [
        operand
        for instruction in instructions
        for operand in instruction.operands[: instruction.outputs]
        if instruction.opcode.startswith(("wgmma.mma_async", "wgmma.move"))
    ]


def _bits(operands: list[Operand], bit: dict[str, int]) -> int:
    bits = 0
    for operand in operands:
        if operand.kind == "register":
            bits |= bit[operand.value]
    return bits


def basic_blocks(instructions: list[Instruction]) -> list[Block]:
    """Return begin, end and the numbers of the following blocks of each basic block."""
    count = len(instructions)
    jumps = [pc for pc, i in enumerate(instructions) if i.opcode in _JUMPS]
    targets = {
        pc: [int(op.value) for op in instructions[pc].operands if op.kind == "integer"]
        for pc in jumps
    }
    starts = {target for all_targets in targets.values() for target in all_targets}
    begins = sorted({0, *starts, *(pc + 1 for pc in jumps)} - {count})
    number = {begin: k for k, begin in enumerate(begins)}
    blocks = []
    for begin, end in zip(begins, [*begins[1:], count], strict=True):
        last = instructions[end - 1]
        following = list(targets.get(end - 1, []))
        if last.opcode not in _JUMPS or last.guard:
            following.append(end)
        blocks.append((begin, end, [number[pc] for pc in following if pc < count]))
    return blocks


def _liveness(
    instructions: list[Instruction],
    blocks: list[Block],
    reads: list[int],
    writes: list[int],
) -> tuple[list[int], list[int]]:
    """Return the registers that are live at the begin and at the end of each block."""
    needed, replaced = [], []
    for begin, end, _ in blocks:
        read = written = 0
        for pc in range(begin, end):
            read |= reads[pc] & ~written
            if not instructions[pc].guard:  # under a guard some lanes keep the old value
                written |= writes[pc]
        needed.append(read)
        replaced.append(written)
    live_in, live_out = list(needed), [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for k in reversed(range(len(blocks))):
            out = 0
            for following in blocks[k][2]:
                out |= live_in[following]
            if out != live_out[k]:
                live_out[k], changed = out, True
                live_in[k] = needed[k] | (out & ~replaced[k])
    return live_in, live_out


def _indices(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _place(
    names: list[str],
    wide: list[bool],
    first: list[int],
    last: list[int],
    end: int,
) -> tuple[dict[str, int], int]:
    """Give each register a place that is free from its first use to its last use."""
    free: dict[bool, list[int]] = {False: [], True: []}
    busy: list[tuple[int, int, bool]] = []
    offsets = {}
    for k in sorted(range(len(names)), key=first.__getitem__):
        while busy and busy[0][0] < first[k]:
            _, offset, width = heapq.heappop(busy)
            free[width].append(offset)
        if free[wide[k]]:
            offset = free[wide[k]].pop()
        else:
            offset, end = end, end + (256 if wide[k] else 128)
        offsets[names[k]] = offset
        heapq.heappush(busy, (last[k], offset, wide[k]))
    return offsets, end
