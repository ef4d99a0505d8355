"""FLOPs of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Counted as torch counts: 2 m n k for each matrix product, nothing for anything else, from shapes
alone. Pairs excluded by keys, skipped samples and masked tokens are counted too, since only values
show them. What a backward pass recomputes is counted, as torch does for its attention.

The flop counter imports Triton, so this module does not import it. It registers the formulas when
other code imports the counter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def add_formula(name: str, formula: Callable[..., int]) -> None:
    """Register the FLOP formula of ``torch.ops.mmfused.<name>``.

    Args:
        formula: called with the arguments of the operator, where tensors are replaced by their
            shapes, and with ``out_shape=``; returns the FLOPs.
    """
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _register()


def no_products(*args: Any, out_shape: Any = None) -> int:
    """Return 0: the formula of an operator without matrix products."""
    return 0


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    while _formulas:
        name, formula = _formulas.popitem()
        register_flop_formula(getattr(torch.ops.mmfused, name))(formula)
    # Composed paths use torch's attention, which has no formula on a CPU.
    for end in ("", "_backward"):
        known = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{end}")
        on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")
        flop_registry.setdefault(on_cpu, flop_registry[known])


class _AtImport:
    """A finder for ``sys.meta_path`` that registers the formulas once the counter is imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AtImport)  # type: ignore[arg-type]
