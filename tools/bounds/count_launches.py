"""Count the launches of one step of each op and each model, as on a GPU, without a GPU.

python -m mmfused.tools.bounds.count_launches [query-pooling ...]  # prints tables
python -m mmfused.tools.bounds.count_launches --write              # writes all of them
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

import mmfused

from .launch_cases import OPS, Call
from .launch_models import TITLES, step_launches
from .launches import Launch, recorded
from .torch_work import untouched

PAGE = Path(mmfused.__file__).parent.parent / "benchmarks" / "launches.md"
INTRODUCTION = """\
# Launches

What one step launches on a GPU: Triton kernels, and torch's own operators around and between them.
Views, allocations and what only a CPU does are left out. These are counts, made without a GPU, by
`python -m mmfused.tools.bounds.count_launches --write` with torch {torch}.

An operator of torch counts as one launch. Some run several kernels: `sort`, `index_put_` that adds,
`select_backward`, the backward of attention, `_foreach` operators over many tensors. The host waits
for names with a star. The dtype is bfloat16 and all gradients are needed, unless a line says
otherwise. Shapes are those of the targets; of InfoNCE, 4096 rows of width 1536.

`tests/test_launches.py` fails if a count has changed and its line has not.
"""
MODELS = """\
## Models

Training steps of the models in benchmarks/model_steps.py: the papers' sizes, from the encoders'
tokens to the loss, in float32, with two layers of BERT (UniCA) or Qwen (MOON2.0), and of UNITE the
loss only. The update clips the gradients and makes AdamW's step.
"""
NAMES = "Triton kernels and operators of torch"


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*map(slug, OPS), "models"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--write", action="store_true", help="write benchmarks/launches.md")
    given = parser.parse_args()
    if unknown := set(given.names) - set(names):
        parser.error(f"got {', '.join(sorted(unknown))}, expected {', '.join(names)}")
    if given.write:
        PAGE.write_text(page())
    else:
        print(*sections(given.names or names), sep="\n")


def slug(op: str) -> str:
    """Return an op's name on the command line."""
    return op.lower().replace(" ", "-")


def page() -> str:
    """Return the text of benchmarks/launches.md."""
    introduction = INTRODUCTION.format(torch=torch.__version__.split("+")[0])
    return "\n".join([introduction, *sections([*map(slug, OPS), "models"])])


def sections(names: Sequence[str]) -> Iterator[str]:
    """Yield the sections with these names."""
    for op, cases in OPS.items():
        if slug(op) in names:
            rows = [row for name, make in cases.items() for row in op_rows(name, make())]
            head = ["case", "pass", "all", "Triton", "torch", NAMES]
            yield f"## {op[0].upper()}{op[1:]}\n\n{table(head, rows)}"
    if "models" in names:
        rows = [row for name in TITLES for row in model_rows(name)]
        head = ["model", "part", "all", "Triton", "torch", "by op, and by the model's own code"]
        yield f"{MODELS}\n{table(head, rows)}"


def table(head: list[str], rows: Iterable[str]) -> str:
    """Return a table in Markdown."""
    return "\n".join([line(head), line(["---"] * len(head)), *rows]) + "\n"


def line(cells: Iterable[object]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def op_rows(name: str, call: Call) -> list[str]:
    """Return the lines of a case: its forward and its backward."""
    passes = op_launches(call)
    return [
        line([name, part, *totals(launches), names_of(launches)])
        for part, launches in zip(("forward", "backward"), passes, strict=True)
    ]


def op_launches(call: Call) -> tuple[list[Launch], list[Launch]]:
    """Return what the forward and the backward of a call launch."""
    with recorded() as forward:
        out = call.run()
    outs = [x for x in (out if isinstance(out, list | tuple) else [out]) if x.requires_grad]
    upstream = [untouched(x.shape, dtype=x.dtype) for x in outs]
    with recorded() as backward:
        torch.autograd.grad(outs, call.leaves, upstream, allow_unused=True)
    return forward, backward


def model_rows(name: str) -> list[str]:
    """Return the lines of a model: the parts of its training step."""
    launches = step_launches(name)
    return [
        line([TITLES[name], part, *totals(part_launches), shares(part_launches)])
        for part, part_launches in launches._asdict().items()
        if part_launches
    ]


def totals(launches: list[Launch]) -> tuple[int, int, int]:
    """Return the number of all launches, of Triton kernels, and of others."""
    kernels = sum(launch.kind == "triton" for launch in launches)
    return len(launches), kernels, len(launches) - kernels


def names_of(launches: list[Launch]) -> str:
    """Return how often each name was launched, in the order of the first time; kernels first."""
    ordered = sorted(launches, key=lambda launch: launch.kind != "triton")
    return counted(launch.name + r"\*" * launch.waits for launch in ordered)


def shares(launches: list[Launch]) -> str:
    """Return how many launches each op has, and which ones make the host wait."""
    ops = sorted(launch.op for launch in launches if launch.op)
    waits = sorted(f"{x.name}\\* in {x.source.split(':')[0]}" for x in launches if x.waits)
    own = len(launches) - len(ops)
    return "; ".join(filter(None, [counted(ops), f"own {own}", counted(waits)]))


def counted(names: Iterable[str]) -> str:
    """Return names with their number, unless it is 1."""
    return ", ".join(f"{name} {n}" if n > 1 else name for name, n in Counter(names).items())


if __name__ == "__main__":
    main()
