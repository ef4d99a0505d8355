"""Opcodes of Hopper: bulk copies, barriers that count bytes, and what specialised warps use.

Each function turns the words of an opcode and its operands into instructions.
"""

from __future__ import annotations

import re

from .tensor_map import ELEMENTS, FIELDS
from .translate import NONE, Operand, Translator, numbers

# In the order of bulk.cpp's Reduction.
REDUCTIONS = ("store", "add", "min", "max", "and", "or", "xor")
_REFUSED = {
    "multicast::cluster": "copies to several blocks of a cluster",
    "cta_group::1": "is of sm_100",
    "cta_group::2": "is of sm_100",
    "tile::gather4": "gathers rows, which is of sm_100",
    "tile::scatter4": "scatters rows, which is of sm_100",
    "shared::cluster.shared::cta": "copies between blocks of a cluster",
}


def bulk_copy(t: Translator, words: list[str], tokens: list[str]) -> None:
    """cp.async.bulk and cp.reduce.async.bulk, with their commits and waits."""
    if "prefetch" in words:
        t.emit("nothing", [], outputs=0)
    elif "commit_group" in words:
        t.emit("cp.async.bulk.commit_group", [], outputs=0)
    elif "wait_group" in words:
        opcode = "cp.async.bulk.wait_group" + ".read" * ("read" in words)
        t.emit(opcode, numbers(int(tokens[0], 0)), outputs=0)
    else:
        _check_copy(t, words)
        _copy(t, words, tokens)


def _check_copy(t: Translator, words: list[str]) -> None:
    """Refuse copies that the machine does not know."""
    for refused, why in _REFUSED.items():
        if f".{refused}." in f".{'.'.join(words)}.":
            t.unsupported(why)
    if any(word.startswith("im2col") for word in words):
        t.unsupported("copies image columns (im2col)")
    if not {"mbarrier::complete_tx::bytes", "bulk_group"} & set(words):
        t.unsupported("completes in an unknown way")
    if words[1] == "reduce" and not set(REDUCTIONS) & set(words):
        t.unsupported("is a reduction that the machine does not know")


def _copy(t: Translator, words: list[str], tokens: list[str]) -> None:
    t.smallest_access = min(t.smallest_access, 16)
    is_load, is_tensor = "bulk_group" not in words, "tensor" in words
    box = _tensor_box if is_tensor else _bytes_box
    ends = box(t, words, tokens, is_load)
    if is_load:
        last = t.address(tokens[2 if is_tensor else 3], "u32")  # a cache hint may follow
    else:
        reduction = next((word for word in words if word in REDUCTIONS), REDUCTIONS[0])
        last = numbers(REDUCTIONS.index(reduction))
    name = "cp.async.bulk" + ".tensor" * is_tensor
    t.emit(f"{name}.{'load' if is_load else 'store'}", [*ends, *last], outputs=0)


def _tensor_box(
    t: Translator,
    words: list[str],
    tokens: list[str],
    is_load: bool,
) -> list[Operand]:
    """Return the operands for ``[map, {x, y}]`` and an address in shared memory."""
    shared, tensor = tokens[:2] if is_load else tokens[1::-1]
    start, coordinates = re.fullmatch(r"(\[.+?)\s*,\s*\{(.*)\}\s*\]", tensor).groups()
    at = [t.source(token.strip(), "b32") for token in coordinates.split(",")]
    dimensions = next(int(word[0]) for word in words if re.fullmatch(r"[1-5]d", word))
    if len(at) != dimensions:
        t.unsupported(f"has {len(at)} coordinates, expected {dimensions}")
    return [*t.address(shared, "u32"), *t.address(f"{start}]", "u64"), *numbers(len(at)), *at]


def _bytes_box(t: Translator, words: list[str], tokens: list[str], is_load: bool) -> list[Operand]:
    """Return the operands for an address in shared memory, one in global memory, and a size."""
    shared, other = tokens[:2] if is_load else tokens[1::-1]
    kind = next((word for word in words if word in ELEMENTS), "u8")
    ends = [*t.address(shared, "u32"), *t.address(other, "u64"), t.source(tokens[2], "u32")]
    return [*ends, *numbers(ELEMENTS.index(kind))]


def mbarrier(t: Translator, words: list[str], tokens: list[str]) -> None:
    """Barriers in shared memory."""
    if words[1] == "pending_count":
        return t.emit(
            "mbarrier.pending_count",
            [t.destination(tokens[0], "b32"), t.source(tokens[1], "b64")],
        )
    if not any(word.startswith("shared") for word in words):
        t.unsupported("names no address space: shared")
    if words[1] in ("init", "inval", "expect_tx", "complete_tx"):
        operands = t.address(tokens[0], "u32")
        operands += [t.source(token, "u32") for token in tokens[1:]]
        return t.emit(f"mbarrier.{words[1]}", operands, outputs=0)
    if words[1] == "arrive":
        return _arrive(t, words, tokens)
    if words[1] not in ("test_wait", "try_wait"):
        t.unsupported(f"knows no mbarrier.{words[1]}")
    is_parity = "parity" in words
    until = t.source(tokens[2], "b32" if is_parity else "b64")  # a time limit may follow
    operands = [t.destination(tokens[0], "pred"), *t.address(tokens[1], "u32"), until]
    t.emit(f"mbarrier.{words[1]}" + ".parity" * is_parity, operands)


def _arrive(t: Translator, words: list[str], tokens: list[str]) -> None:
    state = t.destination(tokens[0], "b64")
    rest = [t.source(token, "u32") for token in tokens[2:]]
    expects = "expect_tx" in words
    one = Operand("constant", 1)
    counts = [one, *rest] if expects else [*(rest or [one]), NONE]
    t.emit("mbarrier.arrive", [state, *t.address(tokens[1], "u32"), *counts])


def elect(t: Translator, words: list[str], tokens: list[str]) -> None:
    """elect.sync, which chooses one lane."""
    to, _, is_leader = tokens[0].partition("|")
    results = [t.destination(to.strip(), "b32"), t.destination(is_leader.strip(), "pred")]
    t.emit("elect", [*results, t.source(tokens[1], "b32")], outputs=2)


def setmaxnreg(t: Translator, words: list[str], tokens: list[str]) -> None:
    """setmaxnreg, which changes nothing here."""
    count = int(tokens[0], 0)
    if count % 8 or not 24 <= count <= 256:
        t.unsupported(f"sets {count} registers, expected a multiple of 8 from 24 to 256")
    t.emit("setmaxnreg", numbers(count), outputs=0)


def jump_by_index(t: Translator, words: list[str], tokens: list[str]) -> None:
    """brx.idx, a branch to one of the labels of a table."""
    labels = [Operand("label", name) for name in t.kernel.tables[tokens[1]]]
    t.emit("brx.idx", [t.source(tokens[0], "u32"), *labels], outputs=0)


def tensormap(t: Translator, words: list[str], tokens: list[str]) -> None:
    """Tensor maps that a kernel makes: in shared memory, then copied to global memory."""
    if words[1] == "cp_fenceproxy":
        ends = [*t.address(tokens[0], "u64"), *t.address(tokens[1], "u32")]
        return t.emit("tensormap.copy", ends, outputs=0)
    if words[1:3] != ["replace", "tile"] or words[3] not in FIELDS or "shared::cta" not in words:
        t.unsupported("is no tensormap.replace.tile of a map in shared memory")
    t.smallest_access = min(t.smallest_access, 4)
    place = FIELDS[words[3]]
    at = place.offset + (place.size * int(tokens[1], 0) if place.is_array else 0)
    is_wide = words[-1] == "b64"
    value = t.source(tokens[-1], words[-1])
    form = numbers(at, place.size, words[3] == "rank", is_wide)  # PTX counts ranks from 0
    t.emit("tensormap.replace", [*t.address(tokens[0], "u32"), value, *form], outputs=0)


def ignored(t: Translator, words: list[str], tokens: list[str]) -> None:
    """What changes nothing here: prefetches, sleep and the order of launches."""
    t.emit("nothing", [], outputs=0)


FAMILIES = {
    "mbarrier": mbarrier,
    "elect": elect,
    "setmaxnreg": setmaxnreg,
    "tensormap": tensormap,
    "brx": jump_by_index,
    "prefetch": ignored,
    "nanosleep": ignored,
    "griddepcontrol": ignored,
}
