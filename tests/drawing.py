"""Random test inputs from one seed."""

from __future__ import annotations

import random

import torch
from strided_views import EXPANDED, SAME_VALUES, lay_out
from torch import Tensor

NON_FINITE = (float("nan"), float("inf"), float("-inf"))


class Draw:
    """Draw random choices and tensors from one seed.

    ``full``: ``given`` returns True, ``rarely`` returns False, and ``poison`` does nothing.
    ``fixed``: the results of some choices, by name. They take precedence over ``full``.
    ``layouts``: also draw the memory layout of each tensor.
    """

    def __init__(
        self,
        seed: object,
        dtype=torch.float32,
        *,
        full=False,
        fixed: dict | None = None,
        layouts=False,
    ):
        self.random = random.Random(str(seed))
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.full, self.fixed, self.layouts = full, fixed or {}, layouts

    def pick(self, name: str, *choices):
        return self.fixed.get(name, self.random.choice(choices))

    def given(self, name: str, chance: float = 0.5) -> bool:
        happens = self.random.random() < chance
        return self.fixed.get(name, self.full or happens)

    def rarely(self, name: str, chance: float = 0.1) -> bool:
        return self.random.random() < chance and self.fixed.get(name, not self.full)

    def normal(self, *shape: int, std=1.0, mean=0.0, dtype=None, expand=EXPANDED) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std + mean
        return self.place(values.to(dtype or self.dtype), expand)

    def weight(self, *shape: int, std=1.0) -> Tensor:
        """Draw a parameter in ``dtype`` or, like a master copy, in at least float32."""
        return self.normal(
            *shape, std=std, dtype=self.random.choice((self.dtype, self.dtype, self.wide))
        )

    def uniform(self, *shape: int, dtype=None) -> Tensor:
        return self.place(
            torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)
        )

    def integers(self, low: int, high: int, *shape: int, dtype=torch.int64) -> Tensor:
        return self.place(
            torch.randint(low, max(high, low + 1), shape, generator=self.generator, dtype=dtype)
        )

    def flags(self, chance: float, *shape: int) -> Tensor:
        return self.place(torch.rand(shape, generator=self.generator) < chance)

    def seed(self) -> Tensor:
        return torch.tensor(self.random.getrandbits(62))

    def place(self, values: Tensor, expand=EXPANDED) -> Tensor:
        if not self.layouts or self.random.random() < 0.5:
            return values
        layout = self.random.choice((*SAME_VALUES, *expand))
        if layout in EXPANDED and self.random.random() < 0.5:
            layout = "strided"
        return lay_out(values, layout)

    def poison(self, x: Tensor, where: Tensor) -> None:
        """In half of the calls, write NaN or infinity into ``x`` at ``where``.

        The op must not read ``x`` there. An expanded ``x`` stays unchanged.
        """
        if not self.full and self.random.random() < 0.5 and 0 not in x.stride():
            x.masked_fill_(
                where[(...,) + (None,) * (x.dim() - where.dim())], self.random.choice(NON_FINITE)
            )
