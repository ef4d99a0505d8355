"""The shapes of gated cross-attention's benchmark, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .measure import Problem


@dataclass(frozen=True)
class Case:
    """``B`` pairs of ``N`` and ``M`` tokens of width ``D``, ``H`` heads: UniECS's layer (norms
    first, a gate a channel, a flag).

    ``post_norm``: UniCA's, without a gate, LN(x + A).  ``missing``: a third of the samples lacks a,
    another third b.  ``p``: of the probabilities and of what is read, dropped."""

    name: str
    B: int
    N: int
    M: int
    D: int
    H: int
    post_norm: bool = False
    missing: bool = False
    p: float = 0.0
    headline: bool = False  # compiled with autotuning on CUDA
    cpu_B: int | None = None  # None: nothing new on a CPU


CASES = (
    Case("uniecs", 1024, 197, 64, 256, 8, headline=True, cpu_B=16),
    Case("uniecs-missing", 1024, 197, 64, 256, 8, missing=True, cpu_B=18),
    Case("wide", 512, 197, 128, 768, 12, cpu_B=4),
    Case("uniecs-dropout", 1024, 197, 64, 256, 8, p=0.1, cpu_B=16),
    Case("uniecs-n50", 1024, 50, 64, 256, 8),
    Case("uniecs-n512", 1024, 197, 512, 256, 8, cpu_B=4),
    Case("unica", 320, 196, 64, 768, 12, post_norm=True, cpu_B=4),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """The cases for a device: its batch sizes; a ``quick`` run keeps the shapes and at most 3
    samples (63 on CUDA).
    """
    chosen = (
        CASES
        if device_type == "cuda"
        else [replace(case, B=case.cpu_B) for case in CASES if case.cpu_B]
    )
    limit = 63 if device_type == "cuda" else 3
    return [replace(case, B=min(case.B, limit)) for case in chosen] if quick else list(chosen)


def custom(shape: dict[str, int]) -> Case:
    """UniECS's layer at the user's own sizes; what is left out is as there."""
    defaults = {"B": 8, "N": 197, "M": 64, "D": 256, "H": 8}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"shape has {', '.join(unknown)}; gated_cross_attention takes {', '.join(defaults)}."
        )
    sizes = defaults | shape
    if min(sizes.values()) < 1 or sizes["D"] % sizes["H"]:
        raise ValueError(f"shape is {sizes}; all sizes must be positive and H must divide D.")
    return Case("custom-" + "-".join(f"{name}{size}" for name, size in sizes.items()), **sizes)


def present(case: Case, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Who has a, who has b: both, b alone, a alone, in turn."""
    if not case.missing:
        return None, None
    kind = torch.arange(case.B, device=device) % 3
    return kind != 1, kind != 2


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random tokens, parameters and upstream gradient: logits and gates of variance 1 or so, as at
    initialisation.

    The gate's weight is there whole and by its columns: those of x, of what was read and of the
    flag."""
    generator, dim = torch.Generator(device).manual_seed(0), case.D

    def randn(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    parameters = {}
    for side in "ab":
        parameters |= {f"{side}.w_n": 1 + randn(dim, std=0.1), f"{side}.b_n": randn(dim, std=0.1)}
        for part in "qkvo":
            parameters |= {
                f"{side}.w_{part}": randn(dim, dim, std=dim**-0.5),
                f"{side}.b_{part}": randn(dim, std=0.1),
            }
        if not case.post_norm:
            gate = randn(dim, 2 * dim + 1, std=(2 * dim) ** -0.5)
            parameters |= {f"{side}.w_g": gate, f"{side}.b_g": randn(dim, std=0.1)}
            parameters |= {
                f"{side}.w_g{part}": piece
                for part, piece in zip("xae", gate.split([dim, dim, 1], 1), strict=True)
            }
    inputs = {
        "a": randn(case.B, case.N, dim).requires_grad_(),
        "b": randn(case.B, case.M, dim).requires_grad_(),
    }
    return Problem(inputs, parameters, randn(case.B, case.N + case.M, dim))
