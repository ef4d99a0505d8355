"""FLOPs of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

As in torch, an (m, k) by (k, n) matrix product counts as 2 m n k, and all other operations count as
0. The formulas use shapes only, so excluded pairs, skipped samples and masked tokens count too.
Recomputation in the backward pass is included, as in torch's attention.

This module does not import the flop counter, which would import Triton. It registers the formulas
when other code imports the counter.
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
        name: name of the operator.
        formula: called with the arguments of the operator, in which shapes replace tensors, and
            with ``out_shape=``; returns the number of FLOPs.
    """
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _register()


def no_products(*args: Any, out_shape: Any = None) -> int:
    """Return 0, the number of FLOPs of an operator without matrix products."""
    return 0


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    while _formulas:
        name, formula = _formulas.popitem()
        register_flop_formula(getattr(torch.ops.mmfused, name))(formula)
    # The composed backend uses torch's attention, which has no formula for its CPU operator.
    for end in ("", "_backward"):
        on_cuda = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{end}")
        on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")
        flop_registry.setdefault(on_cpu, flop_registry[on_cuda])


class _AtImport:
    """A finder for ``sys.meta_path`` that registers the formulas when the counter is imported."""

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
