"""Launches of which several warps compute the same product (:mod:`.redundancy`), for now.

Each entry names the issue that removes it. The list may only shrink: a launch that is not in it is
a fault, and ``make compile-matrix`` fails if an entry is not needed any more.
"""

from __future__ import annotations

# The issue and, by architectures, the cases of `mmfused inspect`, for an op and a kernel.
KNOWN: dict[tuple[str, str], tuple[str, dict[str, str]]] = {
    ("masked_info_nce", "owner"): (
        "no issue yet",
        {
            "sm_80, sm_86, sm_89, sm_120": "nce smooth",
        },
    ),
    ("topk_routing", "route_x"): (
        "no issue yet",
        {
            "sm_80, sm_86, sm_89, sm_120": "route 64, route 32 all",
            "sm_90": "route 64, route 32 all, route 128 exact",
        },
    ),
    ("topk_routing", "dx"): (
        "no issue yet",
        {
            "sm_80, sm_86, sm_89, sm_90, sm_120": (
                "route 64, route 32 all, route 64 all, route 128, route 128 exact, route 128 "
                "half, route 256, route 512"
            ),
            "sm_100": "route 256, route 512",
        },
    ),
    ("topk_routing", "dw"): (
        "no issue yet",
        {
            "sm_80, sm_86, sm_89, sm_90, sm_120": (
                "route 64, route 32 all, route 64 all, route 128, route 128 exact, route 128 "
                "half, route 256, route 512"
            ),
        },
    ),
}


def issue_of(
    op: str,
    kernel: str,
    arch: str,
    case: str,
) -> str | None:
    """Return the issue that removes the redundant warps of a launch, or None if it is no entry."""
    return entries().get((op, kernel, arch, case))


def entries() -> dict[tuple[str, str, str, str], str]:
    """Return the issue for the op, kernel, architecture and case of each launch in the list."""
    return {
        (op, kernel, arch, case): issue
        for (op, kernel), (issue, lists) in KNOWN.items()
        for archs, cases in lists.items()
        for arch in archs.split(", ")
        for case in cases.split(", ")
    }
