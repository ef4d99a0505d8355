"""List the performance targets of each op, and whether the results files meet them.

    python tools/targets.py [--results DIR]

conditions.py decides which times are compared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import mmfused from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmfused.benchmarks import tables
from mmfused.benchmarks.run import RESULTS
from mmfused.tools.conditions import (
    SIGNS,
    Bench,
    Condition,
    Failed,
    NotMeasured,
    captured_in_graph,
    device_type,
    faster_than,
    faster_than_case,
    folders,
    launches,
    memory,
    of_floor,
    read,
    share_of_floor,
)

DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # the dtype of the records that are judged


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The conditions that the provider ``ours`` must meet on one case of an op's benchmark."""

    op: str
    case: str
    conditions: tuple[Condition, ...]
    device: str = "cuda"
    ours: str = "fused"


def pooling_rows() -> list[Row]:
    near_floor = of_floor("forward", 1.6), of_floor("backward", 1.6)
    mha, projected = "nn.MultiheadAttention", "projected KV + SDPA"

    def row(case, *conditions, **options):
        return Row("query_pooling", case, conditions, **options)

    composed = faster_than("composed", at_least=1.3, form="both")
    return [
        row("fluid", *near_floor, faster_than(projected, at_least=5, form="both"), composed),
        row("fluid-n512", *near_floor, faster_than(projected, at_least=6)),
        row("fluid-h8-b128", faster_than(mha, at_least=1.8, form="both")),
        row("fluid-h8-b1024", faster_than(mha, at_least=1.8, form="both")),
        row(
            "siglip-head",
            *near_floor,
            faster_than("timm AttentionPoolLatent", at_least=6, form="both"),
        ),
        row("bottleneck", faster_than(projected, at_least=4)),
        row(
            "custom-B32-N197-D768-L32-H1",
            faster_than(mha, at_least=5),
            device="cpu",
            ours="composed",
        ),
    ]


def attention_rows() -> list[Row]:
    def row(case, *conditions):
        return Row("gated_cross_attention", case, conditions)

    def sdpa(at_least, **options):
        return faster_than("SDPA", at_least=at_least, form="both", **options)

    return [
        # The extra kernel concatenates the outputs of both sides.
        row("uniecs", sdpa(1.5), launches("forward", 5, extra=1)),
        row("uniecs-missing", sdpa(3)),
        row("wide", sdpa(1.25)),
    ]


def mixture_rows() -> list[Row]:
    from_logits = (
        launches("forward", 3, extra=1),  # the extra kernel concatenates the results
        launches("backward", 1),
        captured_in_graph(),
        faster_than("eager", at_least=5, which="forward", form="eager"),
        faster_than("eager", at_least=2, which="forward", form="compiled"),
    )
    pattern = faster_than("grouped_mm pattern", at_least=1.5, form="both")
    fluid = of_floor("forward", 1.8), of_floor("backward", 1.8), pattern
    swiglu = (
        share_of_floor("forward", 0.65),
        share_of_floor("backward", 0.65),
        faster_than("Liger fused_moe", at_least=1),
    )
    return [
        Row("topk_routing", "logits-16384", from_logits),
        Row("topk_routing", "x-32768-e128", (of_floor("forward", 2),)),
        Row("grouped_mlp", "fluid-256", fluid),
        Row("grouped_mlp", "fluid-512", fluid),
        Row("grouped_mlp", "swiglu-e4", swiglu),
        Row("grouped_mlp", "swiglu-e128", swiglu),
    ]


def contrastive_rows() -> list[Row]:
    def row(case, *conditions):
        return Row("masked_info_nce", case, conditions)

    eager = faster_than("eager", "eager, autocast", at_least=1.5, form="both")
    no_matrix = memory("saved", "<", 4096**2 / 1e9)  # less than 1 byte per logit
    return [
        row("clip-65536", share_of_floor("both", 0.7), memory("peak", "<=", 1)),
        row("clip-65536-k4", faster_than_case("clip-65536", 3)),
        row("unite-4096-d1536", eager, no_matrix),
        row("unite-4096-d3584", eager, no_matrix),
        row("clip-262144", memory("peak", "<", 4)),
    ]


def model_rows() -> list[Row]:
    torch_modules = faster_than("*", at_least=1.5, which="step", form="both")
    return [Row("models", case, (torch_modules,)) for case in ("fluid", "uniecs", "unite")]


ROWS = pooling_rows() + attention_rows() + mixture_rows() + contrastive_rows() + model_rows()


# ---- verdicts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether a record meets a condition.

    ``met``: None if the condition was not measured. ``file``: the file of the record.
    """

    row: Row
    condition: Condition
    measured: str
    met: bool | None
    file: str | None


def judge(records: list[dict]) -> list[Verdict]:
    """Judge each condition of each row by ``records``, which are those of one GPU and of CPUs."""
    found = []
    for row in ROWS:
        op_records = [
            r
            for r in records
            if (r["op"], device_type(r), r["dtype"]) == (row.op, row.device, DTYPES[row.device])
        ]
        record = next((record for record in op_records if record["case"]["name"] == row.case), None)
        found += [verdict(row, condition, record, op_records) for condition in row.conditions]
    return found


def verdict(row: Row, condition: Condition, record: dict | None, op_records: list[dict]) -> Verdict:
    if record is None:
        return Verdict(row, condition, "not measured", None, None)
    try:
        value, remark = condition.measure(Bench(record, row.ours, op_records))
    except NotMeasured as why:
        return Verdict(row, condition, f"not measured: {why}", None, record["file"])
    except Failed as why:
        return Verdict(row, condition, f"failed the accuracy check: {why}", False, record["file"])
    met = SIGNS[condition.sign](value, condition.bound)
    return Verdict(row, condition, condition.shown(value, remark), met, record["file"])


def count(verdicts: list[Verdict]) -> str:
    met = [verdict.met for verdict in verdicts]
    return (
        f"{met.count(True)} of {len(met)} targets met, {met.count(False)} missed, "
        f"{met.count(None)} not measured"
    )


def markdown(verdicts: list[Verdict]) -> str:
    words = {True: "yes", False: "**no**", None: "-"}
    lines = [
        [
            v.row.op,
            v.row.case,
            v.condition.what,
            v.condition.wanted,
            v.measured,
            words[v.met],
            v.file or "-",
        ]
        for v in verdicts
    ]
    return tables.markdown(["op", "case", "condition", "wanted", "measured", "met", "file"], lines)


def by_card(results: Path) -> list[tuple[str | None, list[dict]]]:
    """Return each GPU's name with the records of the GPU and of all CPUs.

    If there are no records of a GPU, the only entry is (None, records of all CPUs).
    """
    by_folder = [read(folder) for folder in folders(results)]
    on_cpu = [record for records in by_folder for record in records if device_type(record) == "cpu"]
    on_gpu = [
        [record for record in records if device_type(record) == "cuda"] for records in by_folder
    ]
    found = [
        (records[0]["environment"]["device"], records + on_cpu) for records in on_gpu if records
    ]
    return found or [(None, on_cpu)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/targets.py",
        description="List the performance targets, and whether the results files meet them.",
    )
    where = "benchmarks/results"
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help=f"folder with a folder of results for each device (default: {where})",
    )
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        fault = f"results: got {str(args.results)!r}, expected a folder that exists"
        print(f"tools/targets.py: error: {fault}", file=sys.stderr)
        return 2
    for card, records in by_card(args.results):
        verdicts = judge(records)
        print(f"{card or 'No GPU has been timed'}: {count(verdicts)}.\n\n{markdown(verdicts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
