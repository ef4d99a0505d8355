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
    for rows in (1, 16, 17, 32, 33, 96):
        tiles = plan_for_tma(rows, dim, padded=True)
        for tile in (tiles.forward["hopper"], tiles.backward.get("hopper")):
            if tile is None:
                continue
            assert isinstance(tile, HopperTile)
            height, chunks, slots = tile.BR, tile.CHUNKS, tile.SLOTS
            assert height in (16, 32) and chunks % 2 == 0 and 0 <= chunks * 64 - dim < 128
            assert slots >= chunks, "all chunks of a tile are needed at once"
            queries = height * chunks * 64 * 2  # 16 bits
            logits = 64 * height  # values of a tile
            if tile is tiles.forward["hopper"]:
                rest = queries + 2 * logits * 2 + 4 * logits * 4  # P; parts of S
                barriers = 2 * slots + 4
            else:
                assert rows <= height
                rest = 2 * queries + 2 * logits * 2 + 2 * logits * 4  # q, dZ; dS; S and dP
                rest += 10 * height * 4
                barriers = 2 * slots + 9
            total = slots * 64 * 64 * 2 + rest + (barriers + 10) * 16
            assert total <= SHARED_MEMORY[90]
