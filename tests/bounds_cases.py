"""Counts and predictions of Triton kernels; test_bounds_kernels.py runs this file as a script.

It prints them as JSON: by case, what `predict` gives, and what the trace counts.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from mmfused.kernels import tiles
from mmfused.kernels.recording import is_descriptor
from mmfused.tools.bounds.cards import A100, H100, Card
from mmfused.tools.bounds.predict import predict
from mmfused.tools.bounds.tracing import Traced, traced
from mmfused.tools.ptx import driver
from mmfused.tools.ptx.machine import merged
from mmfused.tools.ptx.schedules import Argument


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, at < N), at < N)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0) * N
    x = tl.load(x_ptr + row + at, at < N, other=-float("inf")).to(tl.float32)
    e = tl.exp2((x - tl.max(x)) * 1.4426950408889634)
    tl.store(out_ptr + row + at, e / tl.sum(e), at < N)


def _product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Neighbouring blocks share 8 tiles of rows, so that L2 holds what they read."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (8 * tiles_n)
    size = min(tiles_m - 8 * group, 8)
    m = 8 * group + tl.program_id(0) % (8 * tiles_n) % size
    n = tl.program_id(0) % (8 * tiles_n) // size
    rows = m * BM + tl.arange(0, BM)
    columns = n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a_mask = (rows[:, None] < M) & (start + k[None, :] < K)
        b_mask = (columns[None, :] < N) & (start + k[:, None] < K)
        a = tl.load(a_ptr + rows[:, None] * K + start + k[None, :], a_mask, other=0.0)
        b = tl.load(b_ptr + (start + k[:, None]) * N + columns[None, :], b_mask, other=0.0)
        sums = tl.dot(a, b, sums)
    c_mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], sums.to(c_ptr.dtype.element_ty), c_mask)


# A jit function belongs to the first architecture that it is compiled for.
product_kernel, product_kernel_80 = triton.jit(_product_kernel), triton.jit(_product_kernel)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


# ---- kernels of these tests ----------------------------------------------------------------------


def copied(numel: int) -> Callable[[], None]:
    x, out = torch.empty(numel), torch.empty(numel)
    return lambda: copy_kernel[(triton.cdiv(numel, 1024),)](x, out, numel, BLOCK=1024, num_warps=4)


def softmax(rows: int, columns: int) -> Callable[[], None]:
    x, out = half(rows, columns), half(rows, columns)
    block = triton.next_power_of_2(columns)
    return lambda: softmax_kernel[(rows,)](x, out, columns, BLOCK=block, num_warps=4)


def product(kernel: Any, M: int, N: int, K: int, **options: int) -> Callable[[], None]:
    a, b, c = half(M, K), half(K, N), half(M, N)
    grid = (triton.cdiv(M, options["BM"]) * triton.cdiv(N, options["BN"]),)
    return lambda: kernel[grid](a, b, c, M, N, K, **options)


GOOD = dict(BM=128, BN=256, BK=64, num_warps=8, num_stages=3)
SMALL = dict(BM=64, BN=64, BK=32, num_warps=4, num_stages=3)
KERNELS: dict[str, Callable[[], Callable[[], None]]] = {
    "copy": lambda: copied(10 * 1024),
    "copy, odd": lambda: copied(10 * 1024 + 3),
    "copy, large": lambda: copied(1 << 28),
    "softmax": lambda: softmax(12, 1000),
    "product": lambda: product(product_kernel, 256, 192, 128, **SMALL),
    "product, odd": lambda: product(product_kernel, 200, 136, 104, **SMALL),
    "product, large": lambda: product(product_kernel, 8192, 8192, 8192, **GOOD),
}
KERNELS_80: dict[str, Callable[[], Callable[[], None]]] = {
    "product, sm_80": lambda: product(product_kernel_80, 256, 192, 128, **SMALL),
}


def counts(launch: Traced, card: Card) -> dict[str, Any]:
    """Return what a traced launch counts, and its prediction."""
    trace, code = launch.trace, launch.program.code
    found = vars(predict(launch, card))
    for name in ("executed", "wavefronts", "sectors"):
        by_opcode: dict[str, int] = {}
        for instruction, count in zip(code, getattr(trace, name).tolist(), strict=True):
            by_opcode[instruction.opcode] = by_opcode.get(instruction.opcode, 0) + count
        found[name] = by_opcode
    found["distinct"] = trace.distinct.sum(0).tolist()
    found["limiter"] = predict(launch, card).limiter
    return found


# ---- the library's -------------------------------------------------------------------------------


def pooling() -> None:
    from mmfused.kernels import query_pooling

    query_pooling.forward(half(3, 128, 128), half(32, 128), *[None] * 5, 0.0, None)


def info_nce() -> None:
    from mmfused.kernels import masked_info_nce

    masked_info_nce.sweep(
        q=half(256, 128),
        c=half(256, 128),
        bias=None,
        scale=torch.tensor(14.0),
        target=torch.arange(256),
        q_key=None,
        c_key=None,
        q_id=None,
        c_id=None,
        drop=False,
        everything=False,
        columns=True,
    )


def routing() -> None:
    from mmfused.kernels import topk_routing

    topk_routing.forward(
        source=torch.randn(256, 16),
        router_weight=None,
        router_bias=None,
        k=2,
        selection_bias=None,
        indices=None,
        sigmoid=False,
        renormalize=True,
        mask=None,
        segments=None,
        num_segments=1,
        available=None,
        balance="switch",
        jitter=0.0,
        jitter_seed=None,
    )


def experts() -> None:
    from mmfused.kernels import grouped_mlp, topk_routing

    order = topk_routing.order((torch.arange(256) % 4)[:, None], None, 4)
    grouped_mlp.mlp_forward(
        x=half(256, 128),
        w_up=half(4, 256, 128),
        w_gate=None,
        w_down=half(4, 128, 256),
        b_up=half(4, 256),
        b_down=half(4, 128),
        combine_weights=torch.ones(256, 1),
        activation="gelu",
        packed=False,
        **dict(zip(("order", "position", "offsets", "tiles"), order, strict=True)),
    )


def attention() -> None:
    from mmfused.kernels import gated_cross_attention

    tokens = [half(2, 64, 64) for _ in range(2)]
    norms = [half(64) for _ in range(4)]
    nothing = [torch.zeros(0, dtype=torch.bool) for _ in range(2)]
    weights = [half(64, 64) for _ in range(4)] + [half(64, 128)] + [half(64) for _ in range(5)]
    lists = (tokens, norms, nothing, nothing, nothing, 2 * weights)
    gated_cross_attention.forward(*lists, 4, "channel", "none", "attend", True, 1e-5, 0.0, None)


OPS = [pooling, info_nce, routing, experts, attention]


def members(name: str, value: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of an argument by name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if is_descriptor(value):
        return {name: value.base}
    if not isinstance(value, tuple):
        return {}
    fields = getattr(value, "_fields", range(len(value)))
    return {
        k: v
        for f, each in zip(fields, value, strict=True)
        for k, v in members(f"{name}.{f}", each).items()
    }


def touched(launch: Any, made: Traced) -> dict[str, list[int]]:
    """Return sectors of each tensor of a launch: all, those that are read, those written."""
    tensors = {}
    for name, value in launch.args.items():
        tensors |= members(name, value)
    memory = [Argument(name, tensor).memory for name, tensor in tensors.items()]
    found = {}
    for (start, end), size, counts in zip(
        merged(memory), made.sizes.tolist(), made.trace.distinct.tolist(), strict=True
    ):
        names = [m.name for m in memory if start <= m.start < end]
        found["+".join(names)] = [size, *counts]
    return found


def kernels(arch: int, card: Card, cases: dict[str, Callable[[], Callable[[], None]]]) -> dict:
    """Return the counts of each case."""
    driver.install(arch, "plain", 1)
    # A kernel keeps the launcher of its first launch, so one block traces all cases.
    with traced() as launches:
        for make in cases.values():
            make()()
    return {name: counts(made, card) for name, made in zip(cases, launches, strict=True)}


def ops() -> dict[str, dict[str, list[int]]]:
    """Return what each launch of the library touches, by op and kernel."""
    from mmfused.kernels.recording import launches_made

    found: dict[str, dict[str, list[int]]] = {}
    for op in OPS:
        with torch.no_grad(), traced() as made, launches_made() as launches:
            op()
        for launch, each in zip(launches, made, strict=True):
            found.setdefault(f"{op.__name__}, {launch.name}", touched(launch, each))
    return found


if __name__ == "__main__":
    tiles.pretended_arch = 90
    found = kernels(90, H100, KERNELS)
    found["ops"] = ops()
    print(json.dumps(found | kernels(80, A100, KERNELS_80), default=float))
