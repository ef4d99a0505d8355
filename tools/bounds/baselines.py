"""Count the launches of the baselines of all targets, and the time that they need at least.

    python tools/bounds/baselines.py

These are counts, not measurements. The baseline's own code is traced without computing. Each
launch takes the time of its FLOPs or of its bytes, whichever is longer. See fusion.py for what
counts as one launch; where in doubt, the rules favour the baseline. Rows whose floor is under
100 us are judged by replay of a CUDA graph, where each launch takes GRAPH_GAP more.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from mmfused.benchmarks import measure, tables
from mmfused.benchmarks.measure import Provider
from mmfused.tools.bounds import fusion, liger, torch_graph
from mmfused.tools.bounds.cards import CARDS, Card
from mmfused.tools.bounds.work import GRAPH_GAP, Passes, Work, seconds, total_seconds
from mmfused.tools.conditions import SMALL_SECONDS

__all__ = ["ROWS", "Row", "Work", "floor", "launches", "row_seconds", "seconds"]

CPU, META, DTYPE = torch.device("cpu"), torch.device("meta"), torch.bfloat16


class Row(NamedTuple):
    """A baseline of a target. ``compiled``: with torch.compile, else eager."""

    op: str
    case: str
    provider: str
    compiled: bool = True


ROWS = [
    Row("query_pooling", "fluid", "projected KV + SDPA"),
    Row("query_pooling", "fluid", "composed"),
    Row("query_pooling", "fluid-n512", "projected KV + SDPA"),
    Row("query_pooling", "fluid-h8-b128", "nn.MultiheadAttention"),
    Row("query_pooling", "fluid-h8-b1024", "nn.MultiheadAttention"),
    Row("query_pooling", "siglip-head", "timm AttentionPoolLatent"),
    Row("query_pooling", "bottleneck", "projected KV + SDPA"),
    Row("gated_cross_attention", "uniecs", "SDPA"),
    Row("gated_cross_attention", "uniecs-missing", "SDPA"),
    Row("gated_cross_attention", "wide", "SDPA"),
    Row("topk_routing", "logits-16384", "eager", compiled=False),
    Row("topk_routing", "logits-16384", "eager"),
    Row("grouped_mlp", "fluid-256", "grouped_mm pattern"),
    Row("grouped_mlp", "fluid-512", "grouped_mm pattern"),
    Row("grouped_mlp", "swiglu-e4", "Liger fused_moe", compiled=False),
    Row("grouped_mlp", "swiglu-e128", "Liger fused_moe", compiled=False),
    Row("masked_info_nce", "unite-4096-d1536", "eager"),
    Row("masked_info_nce", "unite-4096-d1536", "eager, autocast"),
    Row("masked_info_nce", "unite-4096-d3584", "eager"),
    Row("masked_info_nce", "unite-4096-d3584", "eager, autocast"),
    Row("models", "fluid", "torch modules"),
    Row("models", "uniecs", "torch modules"),
    Row("models", "unite", "torch modules"),
]


# ---- the code of a baseline ----------------------------------------------------------------------


def find_case(op: str, case: str) -> tuple[Any, Any]:
    """Return the benchmark of an op, and one of its cases on CUDA."""
    bench = importlib.import_module(f"mmfused.benchmarks.{op}")
    return bench, next(c for c in bench.cases("cuda", quick=False) if c.name == case)


def provider_of(bench: Any, case: Any, name: str) -> Provider:
    """Build a provider without memory for its parameters."""
    # The order of the rows by expert depends on values, which tensors without memory lack.
    device = CPU if hasattr(bench, "choices") else META
    provider = bench.PROVIDERS[name](case, device, DTYPE)
    if getattr(provider.module, "autocast", None):
        provider.module.autocast = {"device_type": "cpu", "dtype": DTYPE}
    return provider


def inputs_of(bench: Any, case: Any, module: nn.Module) -> list[Tensor]:
    """Return the inputs of a case; call it in the mode of torch_graph.fake."""
    shapes = getattr(module, "shapes", None)
    if shapes is not None:  # a model
        return [torch.empty(s, dtype=DTYPE, requires_grad=True) for s in shapes().values()]
    if hasattr(bench, "MARGIN"):  # routing, whose inputs are drawn again until they are far apart
        shape, dtype = ((case.T, case.D), DTYPE) if case.D else ((case.T, case.E), torch.float32)
        return [torch.empty(shape, dtype=dtype, requires_grad=True)]
    return list(bench.make(case, CPU, DTYPE).inputs.values())


@functools.cache
def launches(op: str, case: str, provider: str, *, compiled: bool = True) -> Passes:
    """Return the launches of a baseline: forward, then the gradients of inputs and parameters."""
    bench, sizes = find_case(op, case)
    if provider == "Liger fused_moe":
        return liger.fused_moe(sizes)
    built = provider_of(bench, sizes, provider)
    with torch_graph.fake():
        inputs = inputs_of(bench, sizes, built.module)
        graphs = torch_graph.trace(built.module, inputs, compiled, built.setting)
    count = fusion.compiled_launches if compiled else fusion.eager_launches
    return Passes(*(count(graph, tf32=op == "models") for graph in graphs))


# ---- times ---------------------------------------------------------------------------------------


@functools.cache
def model_work(case: str) -> dict[str, list[dict[str, Any]]]:
    """Return what the benchmark of models counts as work, without running the model."""
    bench, sizes = find_case("models", case)
    built = provider_of(bench, sizes, "torch modules")
    with torch_graph.fake():
        inputs = inputs_of(bench, sizes, built.module)
    read = sum(x.nbytes for x in (*inputs, *built.module.parameters()))
    passes = launches("models", case, "torch modules", compiled=False)
    return {
        which: [{"flops": sum(w.flops for w in found), "bytes": moved}]
        for which, found, moved in zip(passes._fields, passes, (read, 2 * read), strict=True)
    }


def floor(op: str, case: str, card: Card) -> tuple[float, float]:
    """Return the least seconds of the forward and of the backward, by the benchmark's formulas."""
    bench, sizes = find_case(op, case)
    work = model_work(case) if op == "models" else bench.work(sizes, DTYPE.itemsize)
    rates = {"flops_per_second": card.matrix, "bytes_per_second": card.dram}
    found = measure.floor_seconds(work, rates)
    return found["forward"], found["backward"]


def graph_gap(op: str, case: str, card: Card) -> float:
    """Return the seconds between launches of a case: of a CUDA graph if the case is small."""
    return GRAPH_GAP if min(floor(op, case, card)) < SMALL_SECONDS else 0.0


def row_seconds(row: Row, card: Card) -> tuple[float, float]:
    """Return the seconds of a baseline's forward and backward, with gaps in small cases."""
    gap = graph_gap(row.op, row.case, card)
    forward, backward = launches(row.op, row.case, row.provider, compiled=row.compiled)
    return total_seconds(forward, card, gap), total_seconds(backward, card, gap)


def table(rows: list[Row], cards: list[Card]) -> str:
    """Return a table of the rows: launches, and microseconds of forward / backward by card."""

    def pair(found: tuple[float, float]) -> str:
        return " / ".join(f"{1e6 * value:.4g}" for value in found)

    names = [text for card in cards for text in (f"{card.name} us", f"{card.name} floor us")]
    lines = []
    for row in rows:
        passes = launches(row.op, row.case, row.provider, compiled=row.compiled)
        times = [
            text
            for card in cards
            for text in (pair(row_seconds(row, card)), pair(floor(row.op, row.case, card)))
        ]
        name = f"{row.provider}, {'compiled' if row.compiled else 'eager'}"
        counts = " + ".join(str(len(found)) for found in passes)
        lines.append([row.op, row.case, name, counts, *times])
    return tables.markdown(["op", "case", "baseline", "launches", *names], lines)


def main() -> None:
    print("Counted, not measured: forward / backward.\n")
    print(table(ROWS, [CARDS["H100"], CARDS["H200"]]))


if __name__ == "__main__":
    main()
