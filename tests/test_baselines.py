"""Counts of the launches of baselines, against what arithmetic gives."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmfused.tools import targets
from mmfused.tools.bounds import baselines, fusion, torch_graph
from mmfused.tools.bounds.cards import H100, H200
from mmfused.tools.bounds.work import GRAPH_GAP, Passes, Work, seconds, total_seconds

BF16, F32 = 2, 4  # bytes
M, K, N = 1000, 256, 512


class Calls(nn.Module):
    """A module that calls a function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def count(
    module,
    *shapes,
    compiled=True,
    dtype=torch.bfloat16,
    setting=torch.enable_grad,
) -> Passes:
    if not isinstance(module, nn.Module):
        module = Calls(module)
    with torch_graph.fake():
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        graphs = torch_graph.trace(module, inputs, compiled, setting)
    launches = fusion.compiled_launches if compiled else fusion.eager_launches
    return Passes(*map(launches, graphs))


def near(*works: tuple[float, float]):
    """Return (FLOPs, bytes) of launches to compare with; a few bytes of scalars do not count."""
    return [(flops, pytest.approx(moved, abs=100)) for flops, moved in works]


def numbers(launches: list[Work]) -> list[tuple[float, float]]:
    return [(work.flops, work.bytes) for work in launches]


# ---- single launches -----------------------------------------------------------------------------


def test_a_linear_layer_is_a_product_forward_and_two_products_and_a_sum_backward():
    forward, backward = count(nn.Linear(K, N, device="meta", dtype=torch.bfloat16), (M, K))
    x, y, weight, flops = M * K * BF16, M * N * BF16, K * N * BF16, 2 * M * K * N
    assert numbers(forward) == near((flops, x + weight + N * BF16 + y))
    products = [(flops, x + weight + y)] * 2
    assert sorted(numbers(backward)) == near((0, y + N * BF16), *products)


def test_attention_has_two_products_forward_and_five_backward_and_moves_no_logits():
    B, H, L, S, d = 2, 4, 96, 160, 32
    shapes = (B, H, L, d), (B, H, S, d), (B, H, S, d)
    forward, backward = count(F.scaled_dot_product_attention, *shapes)
    q, k, sums = B * H * L * d * BF16, B * H * S * d * BF16, B * H * L * F32
    assert numbers(forward) == near((4 * B * H * L * S * d, 2 * q + 2 * k + sums))
    assert numbers(backward) == near((10 * B * H * L * S * d, 4 * q + 4 * k + sums))


def test_masked_attention_reads_the_mask_once_for_all_heads():
    B, H, L, S, d = 2, 4, 96, 160, 32

    def masked(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask.detach())

    shapes = (B, H, L, d), (B, H, S, d), (B, H, S, d)
    plain, _ = count(F.scaled_dot_product_attention, *shapes)
    forward, _ = count(masked, *shapes, (B, 1, 1, S))
    (flops, moved), (_, without) = numbers(forward)[0], numbers(plain)[0]
    assert flops == plain[0].flops
    assert moved == pytest.approx(without + B * S * BF16, rel=0.02)


def test_gelu_between_two_layers_is_an_epilogue_of_the_first():
    first, second = (
        nn.Linear(*sizes, bias=False, device="meta", dtype=torch.bfloat16)
        for sizes in ((K, N), (N, K))
    )
    forward, _ = count(nn.Sequential(first, nn.GELU(), second), (M, K))
    x, hidden, weight, flops = M * K * BF16, M * N * BF16, K * N * BF16, 2 * M * K * N
    # The hidden values before GELU are saved for the backward, and those after it are read.
    assert numbers(forward) == near((flops, x + weight + 2 * hidden), (flops, hidden + weight + x))


def test_a_softmax_cross_entropy_reads_the_logits_once_in_each_pass():
    target = torch.zeros(M, dtype=torch.int64, device="meta")

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("target", target)

        def forward(self, logits):
            return F.cross_entropy(logits, self.target)

    forward, backward = count(Loss(), (M, N), dtype=torch.float32)
    logits, rows = M * N * F32, M * 8
    assert sum(w.bytes for w in forward) == pytest.approx(logits, abs=6 * rows)
    assert sum(w.bytes for w in backward) == pytest.approx(2 * logits, abs=6 * rows)


# ---- fusion --------------------------------------------------------------------------------------


def test_a_chain_counts_only_what_enters_and_leaves_it():
    def chain(x):
        return ((x * 2 + 1).relu() - 3).sigmoid()

    x = M * N * BF16
    compiled, eager = count(chain, (M, N)), count(chain, (M, N), compiled=False)
    assert numbers(compiled.forward)[0][1] <= 3 * x  # x, the result, and what is saved
    assert len(compiled.forward) == 1
    assert len(compiled.backward) == 1
    assert numbers(eager.forward) == near(*[(0, 2 * x)] * 5)


def test_a_norm_is_one_launch_because_it_uses_its_sums_in_the_same_rows():
    forward, backward = count(nn.LayerNorm(N, device="meta", dtype=torch.bfloat16), (M, N))
    x = M * N * BF16
    assert [w.bytes for w in forward] == [pytest.approx(2 * x, rel=0.02)]
    assert sum(w.bytes for w in backward) == pytest.approx(3 * x, rel=0.02)


def test_under_autocast_a_norm_writes_float32_as_on_cuda():
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def norm(x):
        return F.layer_norm(x, (N,))

    forward, _ = count(norm, (M, N), setting=autocast)
    assert sum(w.bytes for w in forward) == pytest.approx(M * N * (BF16 + F32), rel=0.02)


def test_a_sum_of_all_elements_is_complete_before_another_launch_uses_it():
    forward, _ = count(lambda x: x / x.sum(), (M, N), dtype=torch.float32)
    x = M * N * F32
    assert numbers(forward) == near((0, x), (0, 2 * x))


def test_a_tensor_that_is_read_as_two_parts_counts_once():
    def halves(x):
        a, b = x.chunk(2, -1)
        return a * b

    forward, _ = count(halves, (M, N))
    assert numbers(forward) == near((0, 1.5 * M * N * BF16))


def test_memory_that_is_read_twice_counts_once():
    forward, _ = count(lambda x: x * x[:1], (M, N))
    assert numbers(forward) == near((0, 2 * M * N * BF16))


def test_a_column_that_is_repeated_is_read_once():
    forward, _ = count(lambda x, y: x[:, :1].expand(-1, N) + y, (M, N), (M, N))
    assert numbers(forward) == near((0, M * BF16 + 2 * M * N * BF16))


def test_a_cast_is_computed_again_instead_of_stored():
    def share(x):
        wide = x.float()
        return wide / wide.sum()

    forward, _ = count(share, (M, N))
    x = M * N * BF16
    assert numbers(forward) == near((0, x), (0, x + 2 * x))


def test_the_gradient_of_indexing_moves_only_the_rows_that_it_adds():
    index = torch.zeros(10, dtype=torch.int64, device="meta")
    forward, backward = count(lambda x: x[torch.empty_like(index, device="cpu")], (M, N))
    rows = 10 * N * BF16
    assert numbers(forward) == near((0, 2 * rows + 80))
    zeros, added = M * N * BF16, 3 * rows
    assert sum(w.bytes for w in backward) == pytest.approx(zeros + added, abs=200)


# ---- time ----------------------------------------------------------------------------------------


def test_a_launch_takes_the_longer_of_its_two_times_and_a_gap():
    assert seconds(Work("", H200.matrix, 1), H200) == 1
    assert seconds(Work("", H200.matrix, 3 * H200.dram), H200) == 3
    assert seconds(Work("", H200.matrix, 0, "tf32"), H200) == 2
    assert seconds(Work("", H200.float32, 0, "float32"), H200) == 1
    assert total_seconds([Work("", 0, 0)] * 4, H200, GRAPH_GAP) == 4 * GRAPH_GAP


def test_only_small_cases_have_gaps_between_launches():
    assert baselines.graph_gap("query_pooling", "bottleneck", H200) == GRAPH_GAP
    assert baselines.graph_gap("query_pooling", "fluid", H200) == 0


# Microseconds on an H200, from the targets. Their backward of pooling counts bytes of further
# tensors, up to 7 % more than the benchmark's formula.
FLOORS = {
    ("query_pooling", "fluid"): (133, 284),
    ("query_pooling", "fluid-n512"): (248, 514),
    ("query_pooling", "siglip-head"): (82, 162),
    ("query_pooling", "bottleneck"): (16, 33),
    ("gated_cross_attention", "uniecs"): (300, 616),
    ("grouped_mlp", "fluid-512"): (36, 72),
    ("grouped_mlp", "swiglu-e4"): (701, 1403),
    ("grouped_mlp", "swiglu-e128"): (3132, 6263),
    ("masked_info_nce", "clip-65536"): (33400 / 4, 33400 * 3 / 4),
}


@pytest.mark.parametrize(("op", "case"), FLOORS)
def test_floors_are_those_of_the_targets(op, case):
    found = [1e6 * value for value in baselines.floor(op, case, H200)]
    assert found == pytest.approx(FLOORS[op, case], rel=0.07)


# ---- baselines of the targets --------------------------------------------------------------------


def test_cross_attention_is_within_a_tenth_of_the_count_in_the_targets():
    row = baselines.Row("gated_cross_attention", "uniecs", "SDPA")
    forward, backward = baselines.row_seconds(row, H200)
    # The targets count 16 and 28 launches. Fewer are left where the norm's sums are fused.
    assert forward == pytest.approx(0.764e-3, rel=0.1)
    assert backward == pytest.approx(1.703e-3, rel=0.1)
    assert baselines.row_seconds(row, H100) > (forward, backward)


def test_the_composed_pooling_is_traced_in_the_form_that_it_picks_on_cuda():
    forward, _ = baselines.launches("query_pooling", "fluid", "composed")
    assert sum(w.flops for w in forward) < 60e9  # projecting the tokens takes 476e9


def test_float32_logits_of_an_eager_loss_are_products_without_tensor_cores():
    forward, _ = baselines.launches("masked_info_nce", "unite-4096-d1536", "eager")
    assert [w.rate for w in forward if w.flops] == ["float32"]
    assert max(w.flops for w in forward) == 2 * 4096**2 * 1536


def test_liger_computes_the_products_of_the_floor():
    bench, case = baselines.find_case("grouped_mlp", "swiglu-e128")
    work = bench.work(case, BF16)
    for which, launches in (
        baselines.launches("grouped_mlp", "swiglu-e128", "Liger fused_moe")._asdict().items()
    ):
        assert sum(w.flops for w in launches) == sum(stage["flops"] for stage in work[which])


def test_every_baseline_of_a_target_on_cuda_is_counted():
    wanted = set()
    for row in targets.ROWS:
        for condition in row.conditions if row.device == "cuda" else ():
            found = re.fullmatch(
                r".* against (?!ours)(.*?)(, (compiled|eager))?:.*", condition.what
            )
            names = found[1].split(" or ") if found else []
            wanted |= {(row.op, row.case, name) for name in names}
    wanted = {
        (op, case, name.replace("all baselines", "torch modules")) for op, case, name in wanted
    }
    assert wanted == {row[:3] for row in baselines.ROWS}
