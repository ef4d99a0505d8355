"""What each instruction of a compiled kernel costs on a GPU, in cycles of a scheduler.

Throughputs: CUDA C++ Programming Guide, "Arithmetic Instructions", results per cycle and
multiprocessor, of which each of the four schedulers has a quarter. Latencies: Luo et al. 2024,
"Dissecting the NVIDIA Hopper Architecture", and Abdelkhalik et al. 2022, "Demystifying the Nvidia
Ampere Architecture through Microbenchmarking"; they hide behind other warps, so they need not be
exact. ptxas turns some instructions of PTX into none or several: see _FREE and _ISSUES.
"""

from __future__ import annotations

import re

from mmfused.tools.ptx.machine import Program
from mmfused.tools.ptx.trace import SECTOR, Cost, Rates, Registers
from mmfused.tools.ptx.translate import Instruction

from .cards import Card

SHARED_BYTES_PER_CYCLE, PORT_BYTES_PER_CYCLE = 128, 64
SCHEDULERS = 4
LATENCY_ALU, LATENCY_MUFU, LATENCY_SHARED, LATENCY_SHUFFLE = 4, 18, 23, 21
LATENCY_MATRIX, LATENCY_BARRIER = 33, 20
LATENCY_L2, LATENCY_DRAM = 270, 600
BLOCK_START = 200  # cycles between the end of a block and the first instruction of the next one

# No instruction of the GPU: registers are renamed, parameters are operands, addresses are folded.
_FREE = re.compile(
    r"mov\.|truncate\.|extend\.u|pack\.2x32|unpack|wgmma\.move|ld\.param|not\.pred|nothing|cvta"
)
# Instructions of the GPU for one of PTX, where it is not 1.
_ISSUES = (
    (r"(add|sub|and|or|xor|not|neg|shl|shr|min|max|selp|setp|abs)\S*\.[bsu]64", 2),
    (r"(mul|mad)\S*\.[bsu]64", 4),
    (r"div\.f32", 8),
    (r"ex2\.f32|lg2\.f32", 4),  # with denormals: a comparison and two products more
    (r"rsqrt\.f32|rcp\.f32|sqrt\.f32", 4),
    (r"(rem|div)\.[su]", 20),
)
_MUFU = re.compile(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos|div)\.")
_CONVERSION = re.compile(r"cvt\.(\w+\.)*f\d+\.[su]64|cvt\.(\w+\.)*[su]\d+\.f\d+")


def costs(program: Program, card: Card) -> list[Cost]:
    """Return the cost of each instruction of a program."""
    return [_cost(instruction, card) for instruction in program.code]


def _cost(instruction: Instruction, card: Card) -> Cost:
    opcode = instruction.opcode
    if _FREE.match(opcode):
        return Cost()
    for part, cost in _SPECIAL:
        if opcode.startswith(part):
            return cost(instruction, card) if callable(cost) else cost
    issue = next((number for spelled, number in _ISSUES if re.match(spelled, opcode)), 1)
    if _MUFU.match(opcode) and not opcode.endswith("64") or _CONVERSION.match(opcode):
        return Cost("mufu", issue, 8, LATENCY_MUFU + 4 * (issue - 1))
    if "f64" in opcode:
        return Cost("double", issue, 2 if card.arch == 90 else 4, 8)
    if re.match(r"(add|sub|mul|fma|mad|neg)\S*\.(f32|f16|bf16|f16x2|bf16x2)$", opcode):
        return Cost("fma", issue, 1 if card.arch == 90 else 2, LATENCY_ALU)
    if re.match(r"(mul|mad|fma)", opcode):
        return Cost("fma", issue, 2 * issue, LATENCY_ALU * issue)
    if re.match(r"(add|sub|shl|neg)", opcode):
        return Cost("integer", issue, 2 * issue, LATENCY_ALU * issue)
    return Cost("alu", issue, 2 * issue, LATENCY_ALU * issue)


def flops_of(instruction: Instruction) -> int:
    """Return the FLOPs of a warp in a matrix instruction, else 0."""
    shape = re.match(r"(wgmma\.mma_async|mma)\S*\.m\d+n(\d+)k(\d+)", instruction.opcode)
    return 2 * 16 * int(shape[2]) * int(shape[3]) if shape else 0  # a warp has 16 rows


def _matrix(instruction: Instruction, card: Card) -> Cost:
    rate = card.matrix_per_cycle / SCHEDULERS * card.mma_share
    return Cost("tensor", 1, flops_of(instruction) / rate, LATENCY_MATRIX)


def _wgmma(instruction: Instruction, card: Card) -> Cost:
    """A warp's quarter of an m64nNk16."""
    columns, a_in_registers = (operand.value for operand in instruction.operands[-4:-2])
    read = 32 * int(columns) + (0 if a_in_registers else 2048)
    return Cost(
        "wgmma",
        1,
        flops_of(instruction) / (card.matrix_per_cycle / SCHEDULERS),
        LATENCY_MATRIX,
        shared=read / SHARED_BYTES_PER_CYCLE / 4,
    )


def _remaining(unit: str):
    def cost(instruction: Instruction, card: Card) -> Cost:
        return Cost(unit, 1, remaining=int(instruction.operands[0].value))

    return cost


# By the first letters of the opcode; the first that fits.
_SPECIAL = (
    ("ld.global", Cost("load", 1)),
    ("atom.global", Cost("load", 1)),
    ("st.global", Cost("store", 1)),
    ("red.global", Cost("store", 1)),
    ("ld.shared", Cost("shared", 1, latency=LATENCY_SHARED)),
    ("st.shared", Cost("shared", 1)),
    ("atom.shared", Cost("shared", 1, latency=LATENCY_SHARED)),
    ("red.shared", Cost("shared", 1)),
    ("ldmatrix", Cost("shared", 1, latency=LATENCY_SHARED + 10)),
    ("stmatrix", Cost("shared", 1)),
    ("shfl", Cost("shared", 1, 1, LATENCY_SHUFFLE)),
    ("redux", Cost("shared", 1, 2, LATENCY_SHUFFLE)),
    ("cp.async.commit_group", Cost("commit copies", 1)),
    ("cp.async.wait_group", _remaining("wait copies")),
    ("cp.async.wait_all", Cost("wait copies", 1)),
    ("cp.async.bulk.commit_group", Cost("commit bulk", 1)),
    ("cp.async.bulk.wait_group", _remaining("wait bulk")),
    ("cp.async.bulk.load", Cost("bulk load", 1)),
    ("cp.async.bulk.tensor.load", Cost("bulk load", 1)),
    ("cp.async.bulk", Cost("bulk store", 1)),
    ("cp.async", Cost("copy", 1)),
    ("mbarrier.try_wait", Cost("wait mbarrier", 1)),
    ("mbarrier.test_wait", Cost("wait mbarrier", 1)),
    ("mbarrier.arrive", Cost("mbarrier", 1, latency=LATENCY_BARRIER)),
    ("mbarrier", Cost("shared", 1)),
    ("mma.", _matrix),
    ("wgmma.mma_async", _wgmma),
    ("wgmma.commit_group", Cost("commit wgmma", 1)),
    ("wgmma.wait_group", _remaining("wait wgmma")),
    ("bar.sync", Cost("barrier", 1, latency=LATENCY_BARRIER)),
    ("bar.arrive", Cost("barrier", 1, remaining=1)),
    ("bra", Cost("fma", 1)),
    ("ret", Cost("fma", 1)),
)


def registers(program: Program) -> list[Registers]:
    """Return the registers of each instruction; the sums of a wgmma are written by its wait."""
    numbers: dict[str, int] = {}
    sums: dict[int, None] = {}

    def number(name: str | int) -> int:
        return numbers.setdefault(str(name), len(numbers))

    found = []
    for instruction in program.code:
        names = [
            number(operand.value) if operand.kind in ("register", "predicate") else None
            for operand in instruction.operands
        ]
        reads = [name for name in names[instruction.outputs :] if name is not None]
        writes = [name for name in names[: instruction.outputs] if name is not None]
        if instruction.guard:
            reads.append(number(instruction.guard))
        if instruction.opcode.startswith("wgmma.mma_async"):
            sums |= dict.fromkeys(writes)
            reads, writes = reads + writes, []
        found.append(Registers(reads, writes))
    for instruction, (_, writes) in zip(program.code, found, strict=True):
        if instruction.opcode == "wgmma.wait_group":
            writes.extend(sums)
    return found


def rates(card: Card, l2: float, from_dram: float) -> Rates:
    """Return the share of one multiprocessor in the rates of the memories.

    Args:
        card: the GPU.
        l2: bytes/s from L2 to all multiprocessors.
        from_dram: how much the trace's fresh sectors count: fewer of them come from DRAM than in
            a sample, in which most blocks that share them are missing.
    """
    cycles = card.multiprocessors * card.hertz
    return Rates(
        sector_shared=SECTOR / SHARED_BYTES_PER_CYCLE,
        sector_port=SECTOR / PORT_BYTES_PER_CYCLE,
        sector_l2=SECTOR * cycles / l2,
        sector_dram=from_dram * SECTOR * cycles / card.dram,
        latency_l2=LATENCY_L2,
        latency_dram=LATENCY_DRAM,
        block_start=BLOCK_START,
    )
