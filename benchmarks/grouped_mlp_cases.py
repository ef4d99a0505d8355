"""Cases and inputs of the benchmark of experts: FLUID's small layers and SwiGLU layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .measure import Problem

ROUTED = ("uniform", "zipf", "hot", "one-hot", "half")


@dataclass(frozen=True)
class Case:
    """``T`` tokens of width ``D``, each routed to ``k`` of ``E`` experts of hidden width ``I``.

    ``gated``: SwiGLU experts without biases, instead of GELU experts with biases.
    ``routed``: the distribution of the experts. "uniform"; "zipf": the probability of expert e is
    proportional to (e + 1)**-1.2; "hot": at least about 90 % of the tokens have expert 0 among
    their k experts; "one-hot": all tokens do; "half": the last E // 2 experts get no tokens.
    """

    name: str
    T: int
    D: int
    I: int  # noqa: E741
    E: int
    k: int
    gated: bool = False
    routed: str = "uniform"
    headline: bool = False  # compiled with autotuning on CUDA
    cpu_T: int | None = None  # number of tokens on a CPU; None: not measured on a CPU


CASES = (
    Case("fluid-256", 256, 768, 3072, 16, 2, cpu_T=256),
    Case("fluid-512", 512, 768, 3072, 16, 2, headline=True),
    Case("fluid-2048", 2048, 768, 3072, 16, 2),
    Case("fluid-2048-half", 2048, 768, 3072, 16, 2, routed="half", cpu_T=128),
    Case("fluid-16384", 16384, 768, 3072, 16, 2),
    Case("fluid-16384-zipf", 16384, 768, 3072, 16, 2, routed="zipf", cpu_T=128),
    Case("swiglu-e4", 8192, 2048, 5504, 4, 1, gated=True, headline=True),
    Case("swiglu-e4-one-hot", 8192, 2048, 5504, 4, 1, gated=True, routed="one-hot"),
    Case("swiglu-e8", 4096, 1024, 2816, 8, 2, gated=True, cpu_T=128),
    Case("swiglu-e8-hot", 4096, 1024, 2816, 8, 2, gated=True, routed="hot", cpu_T=128),
    Case("swiglu-e128", 32768, 2048, 768, 128, 8, gated=True),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """Return the cases for a device.

    ``quick``: at most 512 tokens on CUDA; 32 tokens and a quarter of the widths on a CPU.
    """
    if device_type == "cuda":
        return [replace(case, T=min(case.T, 512)) for case in CASES] if quick else list(CASES)
    chosen = [replace(case, T=case.cpu_T) for case in CASES if case.cpu_T]
    return (
        [replace(case, T=32, D=case.D // 4, I=case.I // 4) for case in chosen] if quick else chosen
    )


def custom(shape: dict[str, int]) -> Case:
    """Return a case with GELU experts; sizes not in ``shape`` are FLUID's, with T = 512."""
    defaults = {"T": 512, "D": 768, "I": 3072, "E": 16, "k": 2}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"grouped_mlp: shape: got {', '.join(unknown)}, expected {', '.join(defaults)}"
        )
    sizes = defaults | shape
    if min(sizes.values()) < 1 or sizes["k"] > sizes["E"]:
        raise ValueError(
            f"grouped_mlp: shape: got {sizes}, expected positive sizes and k at most E"
        )
    return Case("custom-" + "-".join(f"{name}{size}" for name, size in sizes.items()), **sizes)


@functools.cache
def choices(case: Case) -> Tensor:
    """Draw the experts of each token from the distribution ``case.routed``: (T, k) int64, CPU."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(*shape, generator=generator).clamp(min=1e-30)

    # Gumbel noise: the k largest of noise + log(probability) are k draws without replacement.
    keys = -(-rand(case.T, case.E).log()).log()
    if case.routed == "zipf":
        keys -= 1.2 * torch.arange(1, case.E + 1).log()
    elif case.routed == "half":
        keys[:, (case.E + 1) // 2 :] = float("-inf")
    elif case.routed != "uniform":
        hot = rand(case.T) < {"hot": 0.9, "one-hot": 1.1}[case.routed]
        keys[hot, 0] = float("inf")
    return keys.topk(case.k).indices


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Draw tokens, experts, upstream gradient, and routing weights in at least float32."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    rows = (2 if case.gated else 1) * case.I
    parameters = {
        "w_up": randn(case.E, rows, case.D, std=case.D**-0.5),
        "w_down": randn(case.E, case.D, case.I, std=case.I**-0.5),
    }
    if not case.gated:
        parameters |= {
            "b_up": randn(case.E, rows, std=0.1),
            "b_down": randn(case.E, case.D, std=0.1),
        }
    x, scores = randn(case.T, case.D).requires_grad_(), randn(case.T, case.k + 1)
    weights = (
        scores.to(torch.promote_types(dtype, torch.float32))
        .softmax(-1)[:, : case.k]
        .clone()
        .requires_grad_()
    )
    return Problem({"x": x, "weights": weights}, parameters, randn(case.T, case.D))
