"""Cases and inputs of the benchmark of masked InfoNCE: batches of CLIP and UNITE training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Problem

TEMPERATURE = 0.07


@dataclass(frozen=True)
class Case:
    """``B`` queries and ``B`` candidates of width ``D``.

    ``K``: number of modalities. A query is compared only with the candidates of its own modality.
    """

    name: str
    B: int
    D: int
    K: int = 1
    symmetric: bool = True
    headline: bool = False  # compiled with autotuning on CUDA
    cpu_B: int | None = 2048  # batch size on a CPU; None: not measured on a CPU


CASES: tuple[Case, ...] = (
    Case("clip-65536", 65536, 768, headline=True),
    Case("clip-65536-k4", 65536, 768, K=4),
    Case("clip-16384-d256", 16384, 256, cpu_B=4096),
    Case("unite-4096-d1536", 4096, 1536, K=5, symmetric=False),
    Case("unite-4096-d3584", 4096, 3584, K=5, symmetric=False, cpu_B=None),
    Case("clip-262144", 262144, 768, cpu_B=None),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """Return the cases for a device; ``quick``: at most 64 queries (1024 on CUDA)."""
    on_gpu = device_type == "cuda"
    chosen = list(CASES)
    if not on_gpu:
        chosen = [replace(case, B=case.cpu_B) for case in CASES if case.cpu_B]
    if not quick:
        return chosen
    return [replace(case, B=min(case.B, 1024 if on_gpu else 64)) for case in chosen]


def custom(shape: dict[str, int]) -> Case:
    """Return a symmetric case; sizes that are not in ``shape`` are B = 4096, D = 768, K = 1."""
    defaults = {"B": 4096, "D": 768, "K": 1}
    unknown = sorted(shape.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"masked_info_nce: shape: got {', '.join(unknown)}, expected {', '.join(defaults)}"
        )
    sizes = defaults | shape
    if min(sizes.values()) < 1:
        raise ValueError(f"masked_info_nce: shape: got {sizes}, expected positive sizes")
    name = "-".join(f"{name}{size}" for name, size in sizes.items())
    return Case(f"custom-{name}", B=sizes["B"], D=sizes["D"], K=sizes["K"])


def make(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Draw unit embeddings; all share a component, and each candidate is close to its query."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shared = 0.5 * randn(1, case.D)
    query = randn(case.B, case.D)
    candidate = query + randn(case.B, case.D)
    embeddings = {"query": query + shared, "candidate": candidate + shared}
    inputs = {
        name: F.normalize(x, dim=-1).to(dtype).requires_grad_() for name, x in embeddings.items()
    }
    temperature = torch.full((1,), TEMPERATURE, device=device, dtype=dtype)
    upstream = torch.full((), 1.7, device=device, dtype=dtype)
    return Problem(inputs, {"temperature": temperature}, upstream)


def modality(case: Case, device: torch.device) -> Tensor | None:
    """Return the modality of each query and its candidate (B,), or None if K = 1."""
    if case.K == 1:
        return None
    order = torch.randperm(case.B, generator=torch.Generator().manual_seed(1))
    return (order % case.K).to(device)
