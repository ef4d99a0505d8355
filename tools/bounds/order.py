"""The order in which ptxas would put the instructions of a basic block.

PTX keeps the order of the source: a value is loaded just before it is used. ptxas moves loads up,
so that other instructions hide their latency. This is a list scheduler, as ptxas's is: of the
instructions whose operands are ready, the one on the longest path to the end of the block is next.
An instruction moves up by at most WINDOW others, because registers are scarce.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

from mmfused.tools.ptx.trace import Cost, Order, Registers
from mmfused.tools.ptx.translate import Instruction

WINDOW = 64
_LOAD_CYCLES = 300  # that a load of global memory is expected to take
_JUMPS = ("bra", "ret", "brx.idx")
# No access to memory moves across these.
_FENCES = ("commit copies", "wait copies", "wgmma", "commit wgmma", "wait wgmma", "barrier")
_FENCES += ("mbarrier", "wait mbarrier", "bulk load", "bulk store", "commit bulk", "wait bulk")
_LOADS, _STORES = ("ld.", "ldmatrix"), ("st.", "stmatrix", "atom", "red.")


def order(code: list[Instruction], costs: list[Cost], registers: list[Registers]) -> Order:
    """Return the order of a program's instructions."""
    begins = _begins(code)
    found = Order([0] * len(code), [0] * len(code))
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(code)], strict=True)):
        after = _Dependencies(code, costs, registers).successors(begin, end)
        for rank, pc in enumerate(_schedule(after, costs)):
            found.blocks[pc], found.ranks[pc] = number, rank
    return found


def _begins(code: list[Instruction]) -> list[int]:
    """Return the first instruction of each basic block."""
    jumps = [pc for pc, i in enumerate(code) if i.opcode in _JUMPS]
    targets = [int(op.value) for pc in jumps for op in code[pc].operands if op.kind == "integer"]
    return sorted({0, *targets, *(pc + 1 for pc in jumps)} - {len(code)})


class _Dependencies:
    """Which instructions of a basic block must come after which."""

    def __init__(
        self,
        code: list[Instruction],
        costs: list[Cost],
        registers: list[Registers],
    ) -> None:
        self.code, self.costs, self.registers = code, costs, registers
        self.after: dict[int, set[int]] = {}
        self.writer: dict[int, int] = {}  # of each register
        self.readers: defaultdict[int, list[int]] = defaultdict(list)  # since it was written
        self.fence: list[int] = []
        self.loads: list[int] = []  # since the last store or fence
        self.stores: list[int] = []  # the last one

    def successors(self, begin: int, end: int) -> dict[int, set[int]]:
        """Return the successors of each instruction from ``begin`` to ``end``."""
        for pc in range(begin, end):
            self.after[pc] = set()
            if self.code[pc].opcode in _JUMPS:
                self._follow(range(begin, pc), pc)
            self._order_registers(pc)
            self._order_memory(pc)
        return self.after

    def _follow(self, earlier, later: int) -> None:
        for pc in earlier:
            self.after[pc].add(later)

    def _order_registers(self, pc: int) -> None:
        reads, writes = self.registers[pc]
        for name in reads:
            self._follow([self.writer[name]] if name in self.writer else [], pc)
        for name in writes:
            self._follow([self.writer[name]] if name in self.writer else [], pc)
            self._follow(self.readers.pop(name, []), pc)
            self.writer[name] = pc
        for name in reads:
            if self.writer.get(name) != pc:
                self.readers[name].append(pc)

    def _order_memory(self, pc: int) -> None:
        opcode, unit = self.code[pc].opcode, self.costs[pc].unit
        is_fence = unit in _FENCES or opcode.startswith(("fence", "mbarrier"))
        if is_fence or unit in ("store", "copy") or opcode.startswith(_STORES):
            self._follow([*self.fence, *self.loads, *self.stores], pc)
            self.loads, self.stores = [], [pc]
            self.fence = [pc] if is_fence else self.fence
        elif opcode.startswith(_LOADS) and unit != "free":
            self._follow([*self.fence, *self.stores], pc)
            self.loads.append(pc)


def _schedule(after: dict[int, set[int]], costs: list[Cost]) -> list[int]:
    """Return the instructions of a basic block in their order."""
    cycles = {pc: _LOAD_CYCLES if costs[pc].unit == "load" else costs[pc].latency for pc in after}
    missing, path = dict.fromkeys(after, 0), dict.fromkeys(after, 0.0)
    for pc in reversed(after):
        path[pc] = cycles[pc] + max((path[later] for later in after[pc]), default=0.0)
        for later in after[pc]:
            missing[later] += 1
    earliest = dict.fromkeys(after, 0.0)
    waiting = [(0.0, pc) for pc in after if missing[pc] == 0]  # until their operands are ready
    ready: list[tuple[float, int]] = []
    found: list[int] = []
    pending, now = sorted(after), 0.0
    done: set[int] = set()
    lowest = 0  # in pending: the first instruction that is not in found
    while len(found) < len(after):
        while waiting and waiting[0][0] <= now:
            pc = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-path[pc], pc))
        while pending[lowest] in done:
            lowest += 1
        pc = _take(ready, pending[lowest] + WINDOW)
        if pc is None:
            now = waiting[0][0] if waiting else now
            continue
        found.append(pc)
        done.add(pc)
        now += costs[pc].issue
        for later in after[pc]:
            earliest[later] = max(earliest[later], now + cycles[pc])
            missing[later] -= 1
            if missing[later] == 0:
                heapq.heappush(waiting, (earliest[later], later))
    return found


def _take(ready: list[tuple[float, int]], end: int) -> int | None:
    """Remove and return the first instruction that is before ``end``."""
    later = []
    found = None
    while ready and found is None:
        entry = heapq.heappop(ready)
        if entry[1] < end:
            found = entry[1]
        else:
            later.append(entry)
    for entry in later:
        heapq.heappush(ready, entry)
    return found
