"""Read the machine code of a compiled kernel, SASS, as ``nvdisasm`` prints it.

Instructions are counted as they stand in the code: how often each runs, it does not say. The paths
that only warps with diverged lanes take (``BRA.DIV``) and code that nothing reaches are left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..kernels.jobs import tool
from . import flow

# Opcodes of the printed summary: those that need other units than the arithmetic ones.
SHOWN = (
    "MUFU",
    "SHFL",
    "REDUX",
    "BAR",
    "SYNCS",
    "LDSM",
    "STSM",
    "LDS",
    "STS",
    "LDGSTS",
    "LDG",
    "STG",
    "UTMALDG",
    "UTMASTG",
    "LDL",
    "STL",
)
_HMMA = {"16816": "16x8x16", "1688": "16x8x8", "16832": "16x8x32"}
_LABEL = re.compile(r"\s*([.$][\w$.]+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LINE = re.compile(r'\s*//## File "(.+?)", line (\d+)')
_SMALLEST_SHOWN = 8  # a shorter loop waits for something


@dataclass(frozen=True)
class Part:
    """Instructions of a part of a kernel."""

    instructions: int
    opcodes: dict[str, int]  # without modifiers: {"LDSM": 144}
    products: dict[str, int]  # matrix instructions by shape: {"HGMMA 64x128x16": 16}

    def __str__(self) -> str:
        shown = {name: self.opcodes[name] for name in SHOWN if name in self.opcodes}
        counts = ", ".join(f"{count} {name}" for name, count in (self.products | shown).items())
        return f"{self.instructions} instructions" + (f": {counts}" if counts else "")


@dataclass(frozen=True)
class Loop(Part):
    """A loop, without the loops inside of it."""

    depth: int  # 1 for an outermost loop
    innermost: bool
    shortest: int  # the least that one iteration runs through, as branches differ
    longest: int

    def __str__(self) -> str:
        path = f" ({self.shortest} to {self.longest} run)" if self.shortest < self.longest else ""
        head, *counts = super().__str__().split(": ")
        return ": ".join([head + path, *counts])


@dataclass(frozen=True)
class Sass:
    """The instructions of a kernel, in all and by loop."""

    total: Part
    loops: list[Loop]  # in the order of their first instructions
    rest: Part  # what is in no loop: prologue and epilogue

    @property
    def main_loops(self) -> list[Loop]:
        """The innermost loops with matrix instructions."""
        return [loop for loop in self.loops if loop.innermost and loop.products]

    def rows(self) -> list[str]:
        """Return the lines of the printed summary: one for each loop, and one for the rest."""
        loops = [
            f"{'  ' * loop.depth}loop: {loop}"
            for loop in self.loops
            if loop.instructions >= _SMALLEST_SHOWN or loop.products
        ]
        return [*loops, f"  rest: {self.rest}"]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Sass:
        """Return the Sass of which ``dataclasses.asdict`` gave ``data``."""
        loops = [Loop(**loop) for loop in data["loops"]]
        return cls(total=Part(**data["total"]), loops=loops, rest=Part(**data["rest"]))


@dataclass(frozen=True)
class _Instruction:
    guarded: bool
    opcode: str
    operands: str
    line: tuple[str, int] | None  # file and line, if the listing has lines

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


def read(cubin: bytes) -> Sass:
    """Return the instruction counts of a compiled kernel.

    Args:
        cubin: ``compiled.asm["cubin"]`` of Triton, or the content of any cubin with one kernel.
    """
    return parse(disassemble(cubin))


def read_lines(cubin: bytes) -> dict[tuple[str, int], int]:
    """Return the number of instructions of each source line, (file, line), if the cubin has lines.

    The line of an instruction from a jit function that another one calls is the line inside.
    """
    blocks, successors = _blocks(disassemble(cubin, "-g"))
    instructions = [instruction for k in flow.reachable(successors) for instruction in blocks[k]]
    return dict(Counter(instruction.line for instruction in instructions if instruction.line))


def parse(listing: str) -> Sass:
    """Return the instruction counts of what ``nvdisasm -c`` printed."""
    blocks, successors = _blocks(listing)
    live = flow.reachable(successors)
    loops = flow.natural_loops(successors)
    inside = set().union(*(loop.body for loop in loops))

    def all_of(numbers: Iterable[int]) -> Iterator[_Instruction]:
        return (instruction for k in sorted(numbers) for instruction in blocks[k])

    sizes = [len(block) for block in blocks]
    found = []
    for loop in loops:
        shortest, longest = flow.path_lengths(loop, successors, sizes)
        found.append(
            Loop(
                **_counts(all_of(loop.own)),
                depth=loop.depth,
                innermost=loop.own == loop.body,
                shortest=shortest,
                longest=longest,
            )
        )
    rest = Part(**_counts(all_of(set(live) - inside)))
    return Sass(total=Part(**_counts(all_of(live))), loops=found, rest=rest)


def disassemble(cubin: bytes, *options: str) -> str:
    """Return what ``nvdisasm -c`` prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "-c", *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"nvdisasm cannot read the {len(cubin)} bytes of a cubin: {done.stderr.strip()}"
        )
    return done.stdout


def _counts(instructions: Iterable[_Instruction]) -> dict[str, Any]:
    """Return the fields of a Part."""
    opcodes: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for instruction in instructions:
        opcodes[instruction.base] += 1
        if instruction.base.endswith("MMA"):
            products[_product(instruction)] += 1
    return {
        "instructions": opcodes.total(),
        "opcodes": dict(opcodes.most_common()),
        "products": dict(products),
    }


def _product(instruction: _Instruction) -> str:
    """Return name and shape of a matrix instruction: "HGMMA 64x128x16", "HMMA 16x8x16"."""
    base, *modifiers = instruction.opcode.split(".")
    shape = modifiers[0] if modifiers and modifiers[0][0].isdigit() else ""
    return f"{base} {_HMMA.get(shape, shape)}".strip()


def _blocks(listing: str) -> tuple[list[list[_Instruction]], list[set[int]]]:
    """Return the basic blocks of a listing, and the numbers of those that may follow each."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    line = None
    for text in listing.splitlines():
        if label := _LABEL.match(text):
            labels[label[1]] = len(code)
        elif named := _LINE.match(text):
            line = (named[1], int(named[2]))
        elif found := _INSTRUCTION.match(text):
            code.append(_Instruction(found[1] is not None, found[2], found[3], line))
    if not code:
        raise RuntimeError("nvdisasm printed no instruction")
    jumps = list(_jumps(code, labels))
    starts = {0} | {at for at in labels.values() if at < len(code)}
    starts |= {at + 1 for at, jump in enumerate(jumps[:-1]) if jump is not None}
    first = sorted(starts)
    number = {at: k for k, at in enumerate(first)}
    blocks = [code[a:b] for a, b in zip(first, [*first[1:], len(code)], strict=True)]
    successors = []
    for at, block in zip(first, blocks, strict=True):
        end = at + len(block)
        jump = jumps[end - 1]
        following = {end} if jump is None else jump
        successors.append({number[to] for to in following if to < len(code)})
    return blocks, successors


def _jumps(code: list[_Instruction], labels: dict[str, int]) -> Iterator[set[int] | None]:
    """Yield for each instruction those that may follow; None if only the next one may."""
    joins: dict[str, int] = {}  # barrier register: where lanes that diverged go on together
    for at, instruction in enumerate(code):
        named = re.findall(r"[.$][\w$.]+", instruction.operands)
        targets = {labels[name] for name in named if name in labels}
        register = instruction.operands.split(",")[0]
        conditional = instruction.guarded or re.match(r"!?U?P\w", instruction.operands)
        if instruction.base == "BSSY":
            joins[register] = min(targets)
            yield None
        elif instruction.base == "BSYNC" and register in joins:
            yield {joins[register]}
        elif instruction.base in ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET"):
            if instruction.opcode.startswith("BRA.DIV"):
                targets, conditional = set(), True
            yield targets | {at + 1} if conditional else targets
        elif instruction.base == "CALL":  # it returns; its instructions count outside of loops
            yield targets | {at + 1}
        else:
            yield None
