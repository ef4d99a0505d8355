"""Calls of public functions with one invalid argument. The error must name the argument."""

from __future__ import annotations

import random
import re

import torch
from public_functions import arguments, has_kernels, leaves, public_functions, replaced
from torch import Tensor

import mmfused

NAN, LEARNED = float("nan"), torch.tensor(0.1, requires_grad=True)
# option -> invalid values
BAD_OPTIONS = {
    "num_heads": (0, -1, 10**6),
    "form": ("nonsense",),
    "dropout_p": (-0.1, 1.0, NAN, LEARNED),
    "gate": ("nonsense",),
    "indicator": ("nonsense",),
    "missing": ("nonsense",),
    "passes": (("nonsense",), ()),
    "same_id": ("nonsense",),
    "positive_weight": (-1.0, NAN, LEARNED),
    "label_smoothing": (-0.1, 1.0, NAN, LEARNED),
    "reduction": ("nonsense",),
    "false_negative_margin": (NAN, float("inf"), LEARNED),
    "k": (0, -1, 10**6),
    "score": ("nonsense",),
    "balance": ("nonsense",),
    "num_segments": (0,),
    "jitter": (-0.1, 1.0, NAN, LEARNED),
    "activation": ("nonsense",),
    "fraction": (-0.1, 1.1, NAN),
    "top": (0,),
    "samples": (0,),
    "normalise": (0, -1.0),
    "temperature": (0.0, -1.0),
    "max_seqlen": (-1, 2.5, None),
    "chunk": (0, 1.5),
}
# Options without invalid values in these tests.
ANYTHING_GOES = (
    "scale",
    "norm_eps",
    "return_lse",
    "pre_norm",
    "symmetric",
    "renormalize",
    "gather",
    "combine",
    "rate",
    "num_experts",
    "margin",
)
ANYTHING_GOES += ("diagonal", "tolerance", "bias", "detach_routing", "group")
# tensor argument -> invalid elements, which the functions must reject on a CPU
BAD_VALUES = {
    "target": (-1, 10**6),
    "query_key": (-1,),
    "candidate_key": (-2,),
    "segments": (-1, 10**6),
    "lengths": (-1, 10**6),
    "cu_seqlens": (-1, 10**6),
}
BAD_VALUES |= {"indices": (-1, 10**6), "available": (False,), "row_weight": (-1.0,)}
BAD_VALUES |= {f"{side}_lengths": (-1, 10**6) for side in ("a", "b", "context")}
# Functions that are not called with invalid arguments, because they check few arguments.
UNCHECKED = ("pack_passes", "update_selection_bias")


def refusal_faults(function: str, inputs: dict, backend: str, rng: random.Random) -> list[str]:
    """Call a function with one invalid argument. Return a list with at most one fault.

    A fault is a call without an error, an error of the wrong type, or an error that does not name
    the argument.
    """
    broken = list(_breaks(function, inputs))
    if function in UNCHECKED or not broken:
        return []
    name, what, bad = broken[rng.randrange(len(broken))]
    try:
        with mmfused.backend(backend if has_kernels(function) else "composed"):
            public_functions()[function](**bad)
    except (ValueError, TypeError, RuntimeError) as error:
        names = (
            name,
            name.split(".")[-1],
            name.split(".")[0],
            name.removeprefix("a_").removeprefix("b_"),
        )
        _, named, sentence = str(error).partition(f"{function}:")
        if named and any(re.search(rf"\b{re.escape(word)}\b", sentence) for word in names):
            return []
        return [
            f"with {name} {what}, the error does not name {name}: {type(error).__name__}: {error}"
        ]
    except Exception as error:
        return [f"with {name} {what}: {type(error).__name__}: {error}"]
    return [f"with {name} {what}, no error is raised."]


def _breaks(function: str, inputs: dict):
    """Yield (argument, what is wrong, arguments of the call)."""
    known = arguments(public_functions()[function])
    for name in known:
        if name in inputs and not isinstance(inputs[name], Tensor):
            for value in BAD_OPTIONS.get(name, ()):
                yield name, f"= {value!r}", inputs | {name: value}
    if "routing" in inputs:
        yield "routing", "as a tuple", inputs | dict(routing=tuple(inputs["routing"]))
    for path, x in leaves(inputs).items():
        if path.startswith("routing."):  # created by mmfused, so never invalid
            continue
        yield path, "as a list", replaced(inputs, {path: [x.tolist()]})
        if x.is_floating_point() and path not in ("row_weight", "scale"):
            yield (
                path,
                "of integers",
                replaced(inputs, {path: torch.ones_like(x, dtype=torch.int64)}),
            )
        elif not x.is_floating_point():
            yield path, "of floats", replaced(inputs, {path: x.float()})
        if path != "temperature" and path not in ANYTHING_GOES:
            yield path, "with two more dimensions", replaced(inputs, {path: x[None, None]})
        if x.dim() and x.numel():
            for value in BAD_VALUES.get(path, ()):
                yield path, f"holding {value}", replaced(inputs, {path: _holding(x, value)})


def _holding(x: Tensor, value: object) -> Tensor:
    """Return a copy of ``x`` with ``x[0]`` set to ``value``."""
    x = x.clone()
    x[0] = value
    return x
