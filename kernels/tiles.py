"""Code shared by the kernels: limits of each architecture, padding, tiles and jit helpers."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)

# Shared memory that one block may use, in bytes, by compute capability.
SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
    121: 101_376,
}

# Multiprocessors of A100, A10, Jetson AGX Orin, L40, H200, B200, B300, RTX 5090 and DGX Spark.
MULTIPROCESSORS = {80: 108, 86: 72, 87: 16, 89: 142, 90: 132, 100: 148, 103: 148, 120: 170, 121: 48}

# Options of every launch. The default of enable_fp_fusion differs by Triton version.
OPTIONS = {"enable_fp_fusion": True}

# The architecture that plans are chosen for, in place of the GPU's; also set by
# recording.launches_for. Tests set the variable to run the compiled kernels on a CPU (tools/ptx).
pretended_arch: int | None = int(os.environ.get("MMFUSED_PTX_ARCH", 0)) or None


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up, without the wrapper around triton.cdiv."""
    return -(-a // b)


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor in contiguous form; None stays None."""
    return None if tensor is None else tensor.contiguous()


def arch_of(tensor: torch.Tensor) -> int:
    """Return the compute capability that plans are chosen for, as one number: 90 for sm_90."""
    if pretended_arch is not None:
        return pretended_arch
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def multiprocessors(tensor: torch.Tensor) -> int:
    """Return the number of multiprocessors, for kernels whose programs walk over many tiles."""
    if INTERPRETED and pretended_arch is None:
        return 4  # several tiles for each program, so that tests see the walk
    if pretended_arch is not None:
        return MULTIPROCESSORS[pretended_arch]
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def upcasts(dtype: torch.dtype) -> bool:
    """Return whether ``dot`` must convert its operands to float32.

    Triton's interpreter multiplies the bit patterns of bfloat16 operands instead of their values.
    """
    return INTERPRETED and dtype == torch.bfloat16


def pack_padding(
    mask: torch.Tensor | None, lengths: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, str]:
    """Pack a padding mask (B, N) bool or lengths (B,) for the kernels.

    Return words of bits (B, W), spans of the valid tokens (B, 2), W, and the kind of padding:
    "none", "padding" or "lengths". If lengths are given, they are returned in place of the spans.
    """
    if mask is None:
        return None, lengths, 0, "none" if lengths is None else "lengths"
    batch, length = mask.shape
    num_words = triton.cdiv(length, 64)
    words = torch.empty(batch, num_words, dtype=torch.int64, device=mask.device)
    span = torch.empty(batch, 2, dtype=torch.int32, device=mask.device)
    pack_mask_kernel[(batch,)](
        mask_ptr=mask.view(torch.uint8),
        words_ptr=words,
        span_ptr=span,
        N=length,
        W=num_words,
        stride_b=mask.stride(0),
        stride_n=mask.stride(1),
        num_warps=1,
        num_stages=1,
        **OPTIONS,
    )
    return words, span, num_words, "padding"


def tile_rows(rows: int, num_experts: int) -> int:
    """Return the number of rows of a tile.

    It is the largest of 32, 64 and 128 that does not exceed the mean number of rows per expert, or
    16 if that mean is below 32.
    """
    return max((height for height in (32, 64, 128) if height * num_experts <= rows), default=16)


def tile_map(offsets: torch.Tensor, rows: int, num_experts: int) -> torch.Tensor:
    """Return the tiles (rows // 16 + E, 2) int32 for offsets (E + 1,) int32.

    Each tile is (expert, first row). Tiles are sorted by expert. Unused tiles, (-1, 0), come last.
    """
    tiles = offsets.new_empty(rows // 16 + num_experts, 2, dtype=torch.int32)
    block = tile_block(num_experts)
    tile_map_kernel[(triton.cdiv(len(tiles), block),)](
        offsets_ptr=offsets,
        tiles_ptr=tiles,
        N=len(tiles),
        H=tile_rows(rows, num_experts),
        E=num_experts,
        BE=triton.next_power_of_2(num_experts),
        BI=block,
        num_warps=4,
        num_stages=1,
        **OPTIONS,
    )
    return tiles


def tile_block(num_experts: int) -> int:
    """Return the number of entries of tile_map that one program writes."""
    return max(16, 2048 // triton.next_power_of_2(num_experts))


@triton.jit
def dot(
    a,
    b,
    acc,
    UPCAST: tl.constexpr,
):
    """Return acc + a @ b in float32; float32 operands are not rounded to tf32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def split_dot(
    a,
    b,
    parts,
    UPCAST: tl.constexpr,
):
    """Return ``parts`` (splits, rows, columns) plus the products of the parts of the inner axis.

    The sum of the parts over the first axis is a @ b. It is for products with too few rows for all
    warps: with as many parts as warps, each warp computes one. Without parts, several warps would
    compute the same.
    """
    SPLITS: tl.constexpr = parts.shape[0]
    DEPTH: tl.constexpr = a.shape[1] // SPLITS
    a = tl.permute(tl.reshape(a, [a.shape[0], SPLITS, DEPTH]), [1, 0, 2])
    return dot(a, tl.reshape(b, [SPLITS, DEPTH, b.shape[1]]), parts, UPCAST)


@triton.jit
def rounded_product(
    a,
    b,
):
    """Return a * b, rounded before it is added to anything.

    For sums of products over lanes. The compiler may fuse a product with an addition, which then
    uses the product of its own lane exactly and the product from another lane rounded. Two lanes
    that hold the same sum would get different bits. A product that is an fma cannot be fused again.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def philox_keep(
    seed,
    rows,
    first,
    p,
    stream,
    BN: tl.constexpr,
):
    """Return the given rows and the columns first .. first + BN - 1 of mmfused.random.keep_mask.

    ``first`` and BN are multiples of 4, because one call of Philox serves four columns. ``seed`` is
    an int64 value, not a pointer.
    """
    quads = first // 4 + tl.arange(0, BN // 4)
    zero = tl.zeros([rows.shape[0], BN // 4], tl.uint32)
    words = tl.philox(
        seed,
        zero + rows[:, None].to(tl.uint32),
        zero + quads[None, :].to(tl.uint32),
        zero + stream,
        zero,
    )
    kept = ()
    for i in tl.static_range(4):
        kept += ((tl.uint_to_uniform_float(words[i]) >= p).to(tl.int8),)
    return tl.interleave(tl.interleave(kept[0], kept[2]), tl.interleave(kept[1], kept[3])) != 0


@triton.jit
def pack_mask_kernel(
    mask_ptr,  # (B, N) uint8, 1 = ignore
    words_ptr,  # (B, W) int64
    span_ptr,  # (B, 2) int32
    N,
    W,
    stride_b,
    stride_n,
):
    """Pack a padding mask into words of 64 bits; the bits of valid tokens are set.

    Grid (B,). Also write the span of each sample: (first valid token, last valid token + 1).
    """
    b = tl.program_id(0).to(tl.int64)
    first = N
    end = 0
    for word in range(0, W):
        n = word * 64 + tl.arange(0, 64)
        keep = tl.load(mask_ptr + b * stride_b + n * stride_n, mask=n < N, other=1) == 0
        tl.store(words_ptr + b * W + word, tl.sum(keep.to(tl.int64) << (n % 64).to(tl.int64), 0))
        first = tl.minimum(first, tl.min(tl.where(keep, n, N), 0))
        end = tl.maximum(end, tl.max(tl.where(keep, n + 1, 0), 0))
    tl.store(span_ptr + 2 * b, tl.minimum(first, end))
    tl.store(span_ptr + 2 * b + 1, end)


@triton.jit
def token_span(
    b,
    span_ptr,
    N,
    MASK: tl.constexpr,
):
    """Return lo and hi: all valid tokens of sample b are in [lo, hi).

    The range is empty if no token is valid. ``span_ptr`` holds lengths (B,), spans (B, 2), or the
    offsets (B + 1,) of packed tokens.
    """
    lo = 0
    hi = N
    if MASK == "lengths":
        # Clamped, so that a wrong length never makes the kernel read out of bounds.
        hi = tl.maximum(tl.minimum(tl.load(span_ptr + b), N), 0).to(tl.int32)
    if MASK == "packed":
        length = tl.load(span_ptr + b + 1) - tl.load(span_ptr + b)
        hi = tl.maximum(tl.minimum(length, N), 0).to(tl.int32)
    if MASK == "padding":
        lo = tl.load(span_ptr + 2 * b)
        hi = tl.load(span_ptr + 2 * b + 1)
    return lo, hi


@triton.jit
def tokens_kept(
    b,
    start,
    BN: tl.constexpr,
    hi,
    words_ptr,
    W,
    MASK: tl.constexpr,
):
    """Return the tokens start .. start + BN - 1, and which of these tokens are valid.

    BN is at most 64, and ``start`` is a multiple of BN. The mask of a tile is loaded as one scalar,
    because Triton does not prefetch loads whose mask is a loaded tensor.
    """
    n = start + tl.arange(0, BN)
    keep = n < hi
    if MASK == "padding":
        word = tl.load(words_ptr + b * W + start // 64)
        keep = keep & (((word >> (n % 64).to(tl.int64)) & 1) != 0)
    return n, keep


@triton.jit
def load_tokens(
    x_ptr,
    n,
    cols,
    keep,
    stride_n,
    D,
):
    """Load (tokens, columns) of one sample; 0 for tokens that are not kept, which may hold NaN."""
    at = n[:, None].to(tl.int64) * stride_n + cols[None, :]
    return tl.load(x_ptr + at, mask=keep[:, None] & (cols[None, :] < D), other=0.0)


@triton.jit
def load_tokens_t(
    x_ptr,
    n,
    cols,
    keep,
    stride_n,
    D: tl.constexpr,
):
    """Load (columns, tokens) of one sample."""
    at = n[None, :].to(tl.int64) * stride_n + cols[:, None]
    return tl.load(x_ptr + at, mask=keep[None, :] & (cols[:, None] < D), other=0.0)


@triton.jit
def load_rows_t(
    ptr,
    rows,
    cols,
    R,
    D: tl.constexpr,
):
    """Load (columns, rows) of a contiguous (R, D) matrix."""
    return tl.load(
        ptr + rows[None, :] * D + cols[:, None],
        mask=(rows[None, :] < R) & (cols[:, None] < D),
        other=0.0,
    )


@triton.jit
def store_rows_t(
    ptr,
    value,
    rows,
    cols,
    R,
    D: tl.constexpr,
):
    """Store (columns, rows) into a contiguous (R, D) matrix."""
    tl.store(
        ptr + rows[None, :] * D + cols[:, None],
        value,
        mask=(rows[None, :] < R) & (cols[:, None] < D),
    )


@triton.jit
def tile_entries(
    i,
    begin,
    end,
    H,
):
    """Return expert and first row of the tiles with indices i; -1 and 0 beyond the last tile.

    ``begin`` and ``end`` hold the range of sorted rows of each expert, and are padded to a power of
    two with empty ranges.
    """
    height = (end - begin + H - 1) // H
    last = tl.cumsum(height, 0)
    past = last[None, :] <= i[:, None]
    there = i < tl.max(last, 0)
    expert = tl.sum(past.to(tl.int32), 1)
    before = tl.sum(tl.where(past, height[None, :], 0), 1)
    # Rows are sorted, so the rows of an expert begin where those of the previous expert end.
    row = tl.max(tl.where(past, end[None, :], 0), 1) + (i - before) * H
    return tl.where(there, expert, -1), tl.where(there, row, 0)


@triton.jit
def tile_map_kernel(
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (N, 2) int32
    N,
    H,
    E: tl.constexpr,
    BE: tl.constexpr,
    BI: tl.constexpr,
):
    """Write the N tiles of H rows for the offsets of E experts. Grid (N / BI,)."""
    experts = tl.arange(0, BE)
    begin = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    expert, row = tile_entries(i, begin, end, H)
    tl.store(tiles_ptr + 2 * i, expert, mask=i < N)
    tl.store(tiles_ptr + 2 * i + 1, row, mask=i < N)
