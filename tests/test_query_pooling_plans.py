"""Which query pooling the kernels for sm_90 take, and their tiles. Launches nothing."""

import itertools

import pytest
import torch
from query_pooling_cases import CUDA, DEVICE

from mmfused.kernels.query_pooling import plan
from mmfused.kernels.query_pooling.hopper_tokens import can_describe
from mmfused.kernels.query_pooling.plans import HopperTile
from mmfused.kernels.tiles import SHARED_MEMORY, pretended_arch

HALVES = (torch.float16, torch.bfloat16)


def plan_for_tma(rows, dim, dtype=torch.bfloat16, arch=90, **options):
    return plan(rows, dim, dtype, arch, options.pop("norm", False), **({"tma": True} | options))


def test_which_shapes_the_kernels_for_sm_90_take():
    for dtype in HALVES:
        for rows, dim in [(1, 8), (16, 1024), (17, 1024), (32, 768), (33, 768), (600, 1000)]:
            assert "hopper" in plan_for_tma(rows, dim, dtype, padded=True).forward
        for rows, dim in [(1, 8), (16, 1024), (17, 768), (32, 768)]:
            assert set(plan_for_tma(rows, dim, dtype).backward) == {"hopper"}
        for rows, dim in [(17, 1024), (33, 768)]:
            tiles = plan_for_tma(rows, dim, dtype, padded=True)
            assert set(tiles.backward) == {"dlogits", "dx", "dq"}
        for norm, dropout, per_sample, dlse in itertools.product((False, True), repeat=4):
            options = dict(norm=norm, dropout=dropout, per_sample=per_sample, dlse=dlse)
            tiles = plan_for_tma(16, 1024, dtype, **options)
            assert set(tiles.forward) == {"hopper"} | ({"moments"} if norm else set())
            assert set(tiles.backward) == {"hopper"}
    assert "hopper" not in plan_for_tma(32, 768, norm=True).backward


@pytest.mark.parametrize(
    "options",
    [
        *(dict(arch=arch) for arch in (80, 86, 89, 100, 103, 120)),
        dict(dtype=torch.float32),
        dict(tma=False),
        dict(dim=1032),
    ],
    ids=str,
)
def test_what_the_kernels_for_sm_90_do_not_take(options):
    for rows in (1, 16, 17, 32, 33):
        tiles = plan_for_tma(**({"rows": rows, "dim": 64} | options))
        assert "hopper" not in tiles.forward and "hopper" not in tiles.backward


def test_the_interpreter_has_no_kernels_for_sm_90():
    x = torch.zeros(2, 3, 64, dtype=torch.float16, device=DEVICE)
    assert can_describe(x) == (CUDA or pretended_arch is not None)
    unaligned = torch.zeros(2 * 3 * 64 + 4, dtype=torch.float16, device=DEVICE)[4:].view(2, 3, 64)
    assert not any(map(can_describe, (unaligned, x[..., :60], x[:1].expand(2, 3, 64), x[:, :0])))


@pytest.mark.parametrize("dim", range(8, 1025, 8))
def test_tiles_for_sm_90_fit_into_shared_memory(dim):
    """Count the bytes that the kernels allocate, and 16 more for each to be aligned."""
    for rows, length in itertools.product((1, 16, 17, 32, 33, 96), (32, 33)):
        tiles = plan_for_tma(rows, dim, padded=True, length=length)
        short = length == 32 and dim <= 768
        assert ("short" in tiles.forward) == short
        assert ("pairs" in tiles.backward) == (short and rows <= 16)
        if not short:
            tile = tiles.forward["hopper"]
            queries, logits = sizes_of(tile, dim)
            parts = 2 * logits * 2 + 4 * logits * 4  # two tiles of P, four of S
            assert used(tile, queries + parts, barriers=4) <= SHARED_MEMORY[90]
        for kind, copies in (("pairs", 3), ("hopper", 2)):  # the queries, and dZ of each sample
            if kind in tiles.backward:
                tile = tiles.backward[kind]
                queries, logits = sizes_of(tile, dim)
                assert rows <= tile.BR
                parts = 2 * logits * 2 + 2 * logits * 4  # two tiles of dS; S and dP
                rest = copies * queries + parts + 10 * tile.BR * 4
                assert used(tile, rest, barriers=9) <= SHARED_MEMORY[90]


def sizes_of(tile, dim):
    """Return the bytes of the queries in 16 bits, and the number of logits of a tile."""
    assert isinstance(tile, HopperTile)
    assert tile.BR in (16, 32) and tile.CHUNKS % 2 == 0 and 0 <= tile.CHUNKS * 64 - dim < 128
    return tile.BR * tile.CHUNKS * 64 * 2, 64 * tile.BR


def used(tile, rest, barriers):
    """Return the bytes of shared memory that a kernel allocates."""
    assert tile.SLOTS >= tile.CHUNKS, "all chunks of a tile are needed at once"
    return tile.SLOTS * 64 * 64 * 2 + rest + (2 * tile.SLOTS + barriers + 10) * 16


@pytest.mark.parametrize("length", [1, 16, 17, 63, 64, 65, 256, 257, 1000])
def test_a_softmax_tile_holds_all_tokens_if_it_can(length):
    tiles = plan(33, 768, torch.float16, 80, False, length=length)
    tile = tiles.forward["softmax"]
    if length <= 256:
        assert tile.BN // 2 < max(length, 9) <= tile.BN
    else:
        assert tile.BN == 64


def test_torch_does_not_return_float32_if_sums_are_float16(monkeypatch):
    class Settings:
        allow_fp16_accumulation = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Settings)
    assert "softmax" not in plan(33, 768, torch.float16, 90, False).forward
    assert "softmax" in plan(33, 768, torch.bfloat16, 90, False).forward


def test_which_calls_with_many_rows_take_the_products():
    def kernels(rows=33, dtype=torch.bfloat16, norm=False, **options):
        return set(plan(rows, 768, dtype, 90, norm, **options).backward)

    assert kernels() == kernels(per_sample=True, dropout=True, dlse=True) == {"softmax"}
    for options in (dict(rows=32), dict(dtype=torch.float32), dict(norm=True), dict(padded=True)):
        assert kernels(**options) == {"dlogits", "dx", "dq"}
