"""Find, in the TTGIR of kernels for sm_90, a race that Triton's software pipeliner causes.

The pipeliner loads tiles through ring buffers in shared memory, which asynchronous copies fill
ahead of use. A tile that an asynchronous ``warp_group_dot`` reads needs one slot more than a tile
that is loaded into registers, because the dot of the previous iteration may still be reading. If a
tile is used in both ways, Triton omits the additional slot, so a copy overwrites data that the
tensor cores still read. Triton's interpreter does not show the race, and on a GPU the race rarely
has an effect. To avoid the race, use the tile in one way only, or set ``num_stages=1``.
"""

from __future__ import annotations

import re

_NAME = r"%[\w-]+(?:#\d+)?"


def find_races(ttgir: str) -> list[str]:
    """Return one sentence for each ring buffer that a copy refills while a dot may still read it.

    Only ring buffers that are also loaded into registers are reported. For architectures other than
    sm_90, the list is always empty.

    Args:
        ttgir: ``compiled.asm["ttgir"]`` of Triton 3.6 to 3.9.
    """
    lines = ttgir.splitlines()
    rings, slots = _rings(lines)
    faults = {}
    for loop in _loops(lines):
        loaded = set().union(*(_used(line, rings) for line in loop if "ttg.local_load " in line))
        running: list[set[str]] = []  # for each unfinished dot, the rings that it reads
        for line in loop * 2:  # twice, because a dot may still run in the next iteration
            wait = re.search(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", line)
            if wait:
                running = running[max(0, len(running) - int(wait[1])) :]
            elif "ttng.warp_group_dot " in line and "isAsync = true" in line:
                running.append(_used(line, rings))
            elif "ttg.async_copy_global_to_local " in line:
                for ring in sorted(_used(line, rings) & loaded & set().union(*running)):
                    faults[ring] = (
                        f"{ring} with {slots[ring]} slots is refilled while a dot reads it, "
                        "because it is also loaded into registers"
                    )
    return list(faults.values())


def _rings(lines: list[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the ring of each value in shared memory, and the number of slots of each ring.

    Values are followed through indices, views, waits and loops.
    """
    rings: dict[str, str] = {}
    slots: dict[str, int] = {}

    def follow(name: str, source: str) -> None:
        if source in rings:
            rings[name] = rings[source]

    for line in lines:
        made = re.match(rf"\s*({_NAME})(?::\d+)? = (\S+)", line)
        if not made:
            continue
        name, op, rest = made[1], made[2], line[made.end() :]
        if op == "ttg.local_alloc":
            count = re.search(r"memdesc<(\d+)x\d+x\d+x", rest)
            if count and int(count[1]) > 1:
                rings[name], slots[name] = name, int(count[1])
        elif op == "scf.for":
            for inner, outer in re.findall(rf"({_NAME}) = ({_NAME})", rest):
                follow(inner, outer)
        elif op == "ttng.warp_group_dot_wait":  # returns its operands, in order
            for i, operand in enumerate(re.findall(_NAME, rest.split("{")[0])):
                follow(f"{name}#{i}", operand)
        elif op.startswith("ttg.memdesc_"):
            source = re.search(_NAME, rest)
            if source:
                follow(name, source[0])
    return rings, slots


def _used(line: str, rings: dict[str, str]) -> set[str]:
    """Return the rings to which the operands of an operation belong."""
    return {rings[name] for name in re.findall(_NAME, line.split(" = ", 1)[-1]) if name in rings}


def _loops(lines: list[str]) -> list[list[str]]:
    """Return the lines of each scf.for, including nested loops."""
    loops = []
    for i, line in enumerate(lines):
        if "scf.for " in line:
            # The closing brace has the indentation of the scf.for.
            close = line[: len(line) - len(line.lstrip())] + "}"
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(close))
            loops.append(lines[i + 1 : end])
    return loops
