"""``warmup(model, shapes)`` compiles the kernels of a training step before the first step.

    api.py      the function: record, compile, run
    on_meta.py  runs a step on meta tensors as on a GPU, to record its launches
    steps.py    batches, the modules that a step reaches, and one forward and backward pass
    state.py    restores what a step changes
    node.py     the ranks of a node divide the kernels
    report.py   what is returned

:mod:`mmfused.kernels.jobs` compiles.
"""

from .api import warmup
from .report import WarmupReport

__all__ = ["WarmupReport", "warmup"]
