"""Cases and inputs of the benchmark of gated cross-attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .measure import Problem


@dataclass(frozen=True)
class Case:
    """``B`` samples; ``N`` tokens of modality a, ``M`` of b; width ``D``, ``H`` heads.

    The default is the layer of UniECS: pre-norm, a gate for each channel, and a presence flag.

    ``post_norm``: the layer of UniCA instead, LayerNorm(x + attention output) without a gate.
    ``missing``: a third of the samples lacks a, and another third lacks b.
    ``p``: dropout probability, for the attention probabilities and for the attention output.
    """

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
    cpu_B: int | None = None  # batch size on a CPU; None: not measured on a CPU


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
    """Return the cases for a device; ``quick``: at most 3 samples (63 on CUDA)."""
    chosen = list(CASES)
    if device_type != "cuda":
        chosen = [replace(case, B=case.cpu_B) for case in CASES if case.cpu_B]
    limit = 63 if device_type == "cuda" else 3
    return [replace(case, B=min(case.B, limit)) for case in chosen] if quick else chosen


def custom(shape: dict[str, int]) -> Case:
    """Return a case of UniECS's layer; sizes that are not in ``shape`` are UniECS's, with B = 8."""
    defaults = {"B": 8, "N": 197, "M": 64, "D": 256, "H": 8}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"gated_cross_attention: shape: got {', '.join(unknown)}, "
            f"expected {', '.join(defaults)}"
        )
    sizes: dict[str, Any] = defaults | shape
    if min(sizes.values()) < 1 or sizes["D"] % sizes["H"]:
        raise ValueError(
            f"gated_cross_attention: shape: got {sizes}, expected positive sizes where H divides D"
        )
    name = "-".join(f"{name}{size}" for name, size in sizes.items())
    return Case(f"custom-{name}", **sizes)


def present(case: Case, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return two masks (B,): the samples that have a, and the samples that have b.

    In turn, samples have both modalities, only b, and only a. Without ``case.missing``, both masks
    are None.
    """
    if not case.missing:
        return None, None
    kind = torch.arange(case.B, device=device) % 3
    return kind != 1, kind != 2


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Draw tokens, parameters and upstream gradient; attention logits have a variance of about 1.

    The gate's weight w_g is also split into its columns for x, for the attention output and for
    the presence flag: w_gx, w_ga and w_ge.
    """
    generator, dim = torch.Generator(device).manual_seed(0), case.D

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    parameters: dict[str, Tensor] = {}
    for side in "ab":
        parameters |= {f"{side}.w_n": 1 + randn(dim, std=0.1), f"{side}.b_n": randn(dim, std=0.1)}
        for part in "qkvo":
            parameters |= {
                f"{side}.w_{part}": randn(dim, dim, std=dim**-0.5),
                f"{side}.b_{part}": randn(dim, std=0.1),
            }
        if not case.post_norm:
            w_g = randn(dim, 2 * dim + 1, std=(2 * dim) ** -0.5)
            parameters |= {f"{side}.w_g": w_g, f"{side}.b_g": randn(dim, std=0.1)}
            pieces = w_g.split([dim, dim, 1], 1)
            for part, piece in zip("xae", pieces, strict=True):
                parameters[f"{side}.w_g{part}"] = piece
    inputs = {
        "a": randn(case.B, case.N, dim).requires_grad_(),
        "b": randn(case.B, case.M, dim).requires_grad_(),
    }
    return Problem(inputs, parameters, randn(case.B, case.N + case.M, dim))
