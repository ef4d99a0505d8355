"""Test cases for the C++ router.

This file makes inputs, computes the expected results with plain PyTorch, and runs the CUDA kernels
on the CPU (tests/simt).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from mmfused import extension
from mmfused.ops.topk_routing import topk_routing_reference

SIMT = Path(__file__).parent / "simt"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BALANCES = ("switch", "gshard", "mse")

# The cases cover every number of lanes per token, every number of experts per lane, both scores and
# every balance loss.
CASES = {
    "one expert": dict(tokens=3, experts=1, k=1),
    "all experts": dict(tokens=33, experts=8, k=8, sigmoid=True),
    "first choice": dict(tokens=45, experts=5, k=1),
    "plain": dict(tokens=70, experts=16, k=2),
    "raw weights": dict(tokens=33, experts=13, k=3, renormalize=False),
    "raw sigmoid": dict(
        tokens=33, experts=7, k=3, renormalize=False, sigmoid=True, balance="gshard"
    ),
    "masked": dict(tokens=41, experts=13, k=3, masked=True, balance="mse"),
    "all masked": dict(tokens=9, experts=6, k=2, masked="all"),
    "no tokens": dict(tokens=0, experts=6, k=2, segments=2),
    "segments": dict(tokens=50, experts=20, k=4, segments=4, masked=True, sigmoid=True),
    "available": dict(tokens=37, experts=40, k=6, segments=3, available=True, balance="gshard"),
    "biased": dict(tokens=21, experts=70, k=6, biased=True, sigmoid=True, balance="mse"),
    "jitter": dict(tokens=30, experts=100, k=8, jitter=0.3, masked=True),
    "replay": dict(tokens=29, experts=24, k=5, replay=True, segments=2, balance="mse"),
    "many": dict(tokens=11, experts=200, k=8, biased=True, available=True, segments=2, jitter=0.01),
    "most": dict(tokens=9, experts=512, k=32, sigmoid=True, masked=True, balance="gshard"),
    "wide segments": dict(tokens=40, experts=130, k=3, segments=31, balance="gshard"),
}


def make(
    tokens,
    experts,
    k,
    *,
    sigmoid=False,
    renormalize=True,
    balance="switch",
    masked=False,
    segments=1,
    available=False,
    biased=False,
    jitter=0.0,
    replay=False,
    dtype=torch.float32,
    strided=False,
) -> dict:
    """Return the arguments of the op by name.

    The logits of masked tokens are NaN. With several segments, the last segment is empty.
    """
    logits = (
        torch.randn(experts, tokens).to(dtype).T
        if strided
        else torch.randn(tokens, experts).to(dtype)
    )
    mask = None
    if masked:
        mask = torch.ones(tokens, dtype=torch.bool) if masked == "all" else torch.rand(tokens) < 0.3
        logits[mask] = float("nan")
    usable = None
    if available:
        usable = torch.rand(segments, experts).argsort(1) < max(k + 1, experts // 2)
    segment = torch.randint(0, max(1, segments - 1), (tokens,)) if segments > 1 else None
    indices = None
    if replay:
        priority = (
            torch.rand(tokens, experts)
            if usable is None
            else torch.rand(tokens, experts) * usable[segment]
        )
        indices = priority.topk(k).indices
    return dict(
        source=logits,
        router_weight=None,
        router_bias=None,
        k=k,
        sigmoid=sigmoid,
        renormalize=renormalize and (k > 1 or sigmoid),
        selection_bias=torch.randn(experts) * 0.3 if biased else None,
        mask=mask,
        segments=segment,
        num_segments=segments,
        available=usable,
        balance=balance,
        indices=indices,
        jitter=jitter,
        jitter_seed=torch.tensor(0x123456789ABCDEF) if jitter else None,
    )


def upstream(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the upstream gradients of the weights, balance loss, z-loss and entropy."""
    return torch.randn(len(case["source"]), case["k"]), *torch.randn(3).unbind(0)


def expected(case: dict, dtype: torch.dtype, gradients=None) -> dict[str, Tensor]:
    """Compute a case with plain PyTorch in ``dtype``.

    Return every output of the op except ``coefficients``. With upstream ``gradients``, also return
    the gradient of the logits.
    """
    logits = case["source"].to(dtype, copy=True).requires_grad_(gradients is not None)
    with torch.enable_grad():
        routing = topk_routing_reference(
            logits,
            case["k"],
            score="sigmoid" if case["sigmoid"] else "softmax",
            renormalize=case["renormalize"],
            selection_bias=case["selection_bias"],
            token_padding_mask=case["mask"],
            segments=case["segments"],
            num_segments=case["num_segments"],
            available=case["available"],
            balance=case["balance"],
            indices=case["indices"],
            jitter=case["jitter"],
            jitter_seed=case["jitter_seed"],
        )
        losses = torch.stack([routing.balance_loss, routing.z_loss, routing.entropy])
        out = {
            name: getattr(routing, name).detach()
            for name in ("indices", "weights", "counts", "order", "position", "offsets")
        }
        out |= {
            "losses": losses.detach(),
            "tiles": tiles_of(routing.offsets, case["source"].shape[1], routing.order.numel()),
        }
        if gradients is not None:
            d_weights, *d_losses = (g.to(dtype) for g in gradients)
            (
                (routing.weights * d_weights).sum() + (losses * torch.stack(d_losses)).sum()
            ).backward()
            out["d_logits"] = logits.grad
    return out


def tiles_of(offsets: Tensor, experts: int, rows: int) -> Tensor:
    height = max(h for h in (16, 32, 64, 128) if h == 16 or h * experts <= rows)
    bounds = offsets.tolist()
    tiles = [(e, row) for e in range(experts) for row in range(bounds[e], bounds[e + 1], height)]
    return torch.tensor(tiles + [(-1, 0)] * (rows // 16 + experts - len(tiles)), dtype=torch.int32)


# ---- CUDA kernels on the CPU ---------------------------------------------------------------------


def cuda_headers() -> Path | None:
    home = extension._cuda_home()
    folders = [*([home / "include"] if home else []), *map(Path, extension.include_folders())]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


def why_no_simt() -> str | None:
    if shutil.which("g++") is None:
        return "g++ not found"
    return None if cuda_headers() else "CUDA headers not found in a toolkit or a pip package"


class Simt:
    """Run the kernels of csrc/topk_routing.cu thread by thread on the CPU."""

    def __init__(self, folder: Path):
        library = folder / "topk_routing.so"
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            "-idirafter",
            str(cuda_headers()),
        ]
        subprocess.run([*command, str(SIMT / "topk_routing.cpp"), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))

    def _run(
        self, name: str, case: dict, logits: Tensor, tensors: list[Tensor | None], blocks: int
    ) -> None:
        tokens, experts = logits.shape
        arguments = [
            logits,
            case["mask"],
            case["segments"],
            case["available"],
            case["jitter_seed"],
            *tensors,
        ]
        pointers = [None if x is None else x.data_ptr() for x in arguments]
        numbers = [
            DTYPES.index(logits.dtype),
            *logits.stride(),
            tokens,
            experts,
            case["k"],
            case["num_segments"],
            case["sigmoid"],
            case["renormalize"],
            BALANCES.index(case["balance"]),
            blocks,
        ]
        status = getattr(self.library, name)(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(numbers))(*numbers),
            ctypes.c_float(case["jitter"]),
        )
        assert status == 0, f"{name} returned {status}"

    def forward(self, case: dict, *, blocks: int = 512) -> dict[str, Tensor]:
        tokens, experts = case["source"].shape
        rows, cells = tokens * case["k"], case["num_segments"] * experts
        shapes = dict(
            indices=((tokens, case["k"]), torch.int64),
            weights=((tokens, case["k"]), torch.float32),
            counts=((case["num_segments"], experts), torch.int64),
            losses=((3,), torch.float32),
            order=((rows,), torch.int32),
            position=((rows,), torch.int32),
            offsets=((experts + 1,), torch.int32),
            tiles=((rows // 16 + experts, 2), torch.int32),
            coefficients=((cells + 1,), torch.float32),
        )
        out = {
            name: torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        self._run(
            "simt_forward",
            case,
            case["source"],
            [case["selection_bias"], case["indices"], *out.values()],
            blocks,
        )
        if case["indices"] is not None:
            out["indices"] = case["indices"]
        return out

    def backward(self, case: dict, gradients, out: dict[str, Tensor]) -> Tensor:
        d_logits = torch.full(case["source"].shape, float("nan"), dtype=case["source"].dtype)
        tensors = [*gradients, out["indices"], out["weights"], out["coefficients"], d_logits]
        self._run("simt_backward", case, case["source"], tensors, 0)
        return d_logits
