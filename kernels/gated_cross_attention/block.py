"""The form "block": attention and its epilogue in one kernel.

For a block of queries, each head adds its part of the output projection in float32. The result, A,
is stored and read back by the gate, as in blend.py. The backward pass is that of the form
"epilogue".
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot
from .attend import attend_head, place, spans
from .blend import blend_tokens, has_keys, store_kept
from .tokens import changed, pick


@triton.jit
def block_kernel(
    projected0_ptr,
    projected1_ptr,
    x0_ptr,
    x1_ptr,
    attended0_ptr,
    attended1_ptr,
    attn_out0_ptr,
    attn_out1_ptr,
    out0_ptr,
    out1_ptr,
    lse0_ptr,
    lse1_ptr,
    wo0_ptr,
    wo1_ptr,
    bo0_ptr,
    bo1_ptr,
    wg0_ptr,
    wg1_ptr,
    whole0_ptr,
    whole1_ptr,
    bg0_ptr,
    bg1_ptr,
    flag0_ptr,
    flag1_ptr,
    gamma0_ptr,
    gamma1_ptr,
    beta0_ptr,
    beta1_ptr,
    moments0_ptr,
    moments1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    seed_ptr,
    B,
    N0,
    N1,
    sb0,
    sb1,
    sn0,
    sn1,
    tiles,
    scale,
    eps,
    p,
    H: tl.constexpr,
    DH: tl.constexpr,
    D: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BIAS_O: tl.constexpr,
    BIAS_G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the output for BM queries of one sample; grid (directions * B * tiles,).

    The attention reads BN keys at a time, the epilogue writes BN columns at a time.
    """
    direction, b, _, tile = place(tiles, 1, B)
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    reverse = direction == 1
    N = pick(reverse, N0, N1)
    M = pick(reverse, N1, N0)
    R = B * N
    n = tile * BM + tl.arange(0, BM)
    if tile * BM < N:
        lse_ptr = pick(reverse, lse0_ptr, lse1_ptr)
        lo, hi = spans(direction, b, tile * BM, N, M, masks, BM, IGNORE, ABSENT, MISSING, COLLAPSE)
        cols = tl.arange(0, BD)
        acc = tl.zeros([BM, BD], tl.float32)
        # Without loop-invariant code motion (licm), the addresses of W_o are computed for each
        # head. Kept in registers for all heads, they would spill on sm_100 and sm_120.
        for head in tl.range(0, H, disable_licm=True):
            attended = attend_head(
                pick(reverse, projected0_ptr, projected1_ptr),
                pick(reverse, projected1_ptr, projected0_ptr),
                pick(reverse, attended0_ptr, attended1_ptr),
                lse_ptr,
                seed_ptr,
                direction,
                b,
                head,
                n,
                N,
                M,
                lo,
                hi,
                scale,
                p,
                masks,
                H,
                DH,
                WQ,
                WK,
                FIRST_KEY,
                BM,
                BN,
                BH,
                IGNORE,
                DROPOUT,
                UPCAST,
            )
            if lo < hi:
                k = tl.arange(0, BH)
                at = cols[None, :] * D + head * DH + k[:, None]
                w = tl.load(
                    pick(reverse, wo0_ptr, wo1_ptr) + at,
                    mask=(k[:, None] < DH) & (cols[None, :] < D),
                    other=0.0,
                )
                acc = dot(attended, w, acc, UPCAST)
        tl.debug_barrier()  # other threads of this program wrote lse
        # Rows beyond this sample become R, which is beyond all samples.
        r = tl.where(n < N, b * N + n, R).to(tl.int32)
        ok = changed(direction, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
        attn_out_ptr = pick(reverse, attn_out0_ptr, attn_out1_ptr)
        store_kept(
            acc,
            has_keys(lse_ptr, r, N, ok, H),
            attn_out_ptr,
            pick(reverse, bo0_ptr, bo1_ptr),
            (BIAS_O >> direction) & 1,
            seed_ptr,
            r,
            R,
            0,
            p,
            direction,
            D,
            BD,
            DROPOUT,
        )
        tl.debug_barrier()  # other threads of this program wrote A
        x_at = (r // N).to(tl.int64) * pick(reverse, sb0, sb1) + (r % N).to(tl.int64) * pick(
            reverse, sn0, sn1
        )
        blend_tokens(
            pick(reverse, x0_ptr, x1_ptr),
            x_at,
            attn_out_ptr,
            pick(reverse, out0_ptr, out1_ptr),
            pick(reverse, wg0_ptr, wg1_ptr),
            pick(reverse, whole0_ptr, whole1_ptr),
            pick(reverse, bg0_ptr, bg1_ptr),
            (BIAS_G >> direction) & 1,
            pick(reverse, flag0_ptr, flag1_ptr),
            pick(reverse, gamma0_ptr, gamma1_ptr),
            pick(reverse, beta0_ptr, beta1_ptr),
            pick(reverse, moments0_ptr, moments1_ptr),
            r,
            R,
            N,
            ok,
            0,
            D,
            eps,
            D,
            BM,
            BN,
            BK,
            GATE,
            INDICATOR,
            POSTNORM,
            UPCAST,
        )
