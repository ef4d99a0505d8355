"""FLOPs of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

As torch counts: 2 m n k for a product of matrices and nothing for the rest, by shapes alone. Pairs
that keys hide, samples that are skipped and masked tokens count too: only values tell them. What a
backward has to compute again counts, as the scores of torch's attention do.

The counter imports triton, so it is not imported here: it gets the formulas when another does so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder

import torch

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def add_formula(name: str, formula: Callable[..., int]) -> None:
    """``formula`` of ``torch.ops.mmfused.<name>``: FLOPs from its arguments, of tensors the shapes,
    and by name ``out_shape``."""
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _hand_over()


def no_products(*args, out_shape=None) -> int:
    """The formula of an operator that multiplies no matrices."""
    return 0


def _hand_over() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    while _formulas:
        name, formula = _formulas.popitem()
        register_flop_formula(getattr(torch.ops.mmfused, name))(formula)
    # Composed paths run on torch's attention, which on a CPU has no formula of its own.
    for end in ("", "_backward"):
        known = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{end}")
        on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")
        flop_registry.setdefault(on_cpu, flop_registry[known])


class _AtImport:
    """A finder for ``sys.meta_path``: whoever imports the counter finds the formulas in it."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _hand_over()

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AtImport)
