"""The cases of tests/test_on_cuda.py: every op and public module.

Sizes are realistic on a GPU and tiny in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import mmfused
from mmfused import library

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter cannot round to bfloat16
SEED = 1234567890123


@dataclass
class Problem:
    """A module with arguments. Every output of the module is differentiable.

    ``inputs``: the arguments that get gradients. ``given``: the other arguments.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    given: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in self.inputs.items()}
        return Problem(copy.deepcopy(self.module).to(dtype), inputs, self.given)

    def on(self, device: torch.device) -> Problem:
        inputs = {name: x.detach().to(device).requires_grad_() for name, x in self.inputs.items()}
        return Problem(
            copy.deepcopy(self.module).to(device),
            inputs,
            {name: x.to(device) for name, x in self.given.items()},
        )

    def leaves(self) -> dict[str, Tensor]:
        """Return the inputs and parameters that get gradients."""
        return self.inputs | {
            name: p for name, p in self.module.named_parameters() if p.requires_grad
        }

    def run(self, step: Callable | None = None) -> dict[str, Tensor]:
        """Return the outputs and gradients by name.

        ``step``: a compiled version of the module, called instead of the module.
        """
        outs = (self.module if step is None else step)(**self.inputs, **self.given)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        leaves = self.leaves()
        gradients = torch.autograd.grad(outs, list(leaves.values()), upstream_for(outs))
        named = {f"out{i}": out.detach() for i, out in enumerate(outs)}
        return named | {
            f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
        }


def upstream_for(outs: list[Tensor]) -> list[Tensor]:
    """Make upstream gradients from the shapes, without synchronizing with the GPU."""
    waves = [
        torch.arange(1, out.numel() + 1, device=out.device).sin().to(torch.bfloat16) for out in outs
    ]
    return [wave.to(out.dtype).view(out.shape) for wave, out in zip(waves, outs, strict=True)]


@dataclass(frozen=True)
class Case:
    """A test case.

    ``make(tiny)``: returns a float64 Problem on DEVICE, with inputs and parameters rounded to
    bfloat16.
    ``fused``: whether the case has a kernel.
    ``composed``: whether the composed backend is tested.
    ``waits``: whether the composed backend synchronizes with the GPU by design.
    ``dtypes``: whether the accuracy is tested in every dtype.
    ``module``: whether the case tests a public module.
    ``large``: whether the case runs only on a GPU, because its kernels need large tensors.
    """

    make: Callable[[bool], Problem]
    fused: bool = True
    composed: bool = True
    waits: bool = False
    dtypes: bool = False
    module: bool = False
    large: bool = False


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, call: Callable):
        super().__init__()
        self.call = call

    def forward(self, **arguments):
        return self.call(**arguments)


class Routed(nn.Module):
    """Return the outputs of ``module``, with the Routing replaced by its differentiable parts."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **arguments):
        out = self.module(**arguments)
        *out, routing = out if type(out) is tuple else (out,)
        return *out, routing.weights, routing.balance_loss, routing.z_loss, routing.entropy


def randn(*shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * std).to(torch.bfloat16).to(DEVICE, torch.float64).requires_grad_()


def rounded(module: nn.Module) -> nn.Module:
    """Return the module in float64, its parameters rounded to bfloat16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).double()
    return module.double().to(DEVICE)


def ignored(batch: int, length: int) -> Tensor:
    """Return a padding mask: the first sample has no tokens, the last is padded on the left."""
    ignore = torch.rand(batch, length) < 0.3
    ignore[0], ignore[-1, : length // 2] = True, True
    return ignore.to(DEVICE)


def seed() -> Tensor:
    return torch.tensor(SEED, device=DEVICE)


# ---- the cases -----------------------------------------------------------------------------------


def pooling(
    norm=False,
    padding=None,
    dropout=0.0,
    queries=32,
    heads=1,
    per_sample=False,
    pooling_form="absorbed",
    return_lse=False,
    size=(197, 768),
):
    """Return a function that makes a pooling problem; ``size``: tokens of a sample, and width."""

    def make(tiny: bool) -> Problem:
        batch, length, dim, rows = (3, 21, 24, 3) if tiny else (64, *size, queries)
        packed = padding == "packed"
        lengths = torch.randint(1, length + 1, (batch,))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

        def call(**arguments):
            return mmfused.query_pooling(
                **arguments,
                max_seqlen=length if packed else None,
                num_heads=heads,
                form=pooling_form,
                dropout_p=dropout,
                return_lse=return_lse,
            )

        shape = (int(offsets[-1]) + 5,) if packed else (batch, length)
        inputs = dict(
            x=randn(*shape, dim), queries=randn(*([batch] if per_sample else []), rows, dim)
        )
        inputs |= {f"w_{name}": randn(dim, dim, std=dim**-0.5) for name in "kv"}
        inputs |= dict(b_v=randn(dim)) | (
            dict(norm_weight=randn(dim), norm_bias=randn(dim)) if norm else {}
        )
        given = dict(dropout_seed=seed()) if dropout else {}
        if padding == "mask":
            given["key_padding_mask"] = ignored(batch, length)
        if padding == "lengths":
            given["lengths"] = torch.randint(0, length + 1, (batch,), device=DEVICE)
        if packed:
            given["cu_seqlens"] = offsets.to(DEVICE, torch.int32)
        return Problem(Call(call), inputs, given)

    return make


def pooling_module(transform: bool):
    def make(tiny: bool) -> Problem:
        batch, length, dim, rows, heads = (
            (3, 21, 24, 3, 2) if tiny else (64, 197, 768, 2 if transform else 32, 1)
        )
        if transform:
            module = mmfused.QTransform(dim, rows, 2, heads)
        else:
            module = mmfused.QueryPooling(
                dim, rows, heads, q_proj=True, out_proj=True, bias=True, norm_kv=True
            )
        return Problem(
            rounded(module),
            dict(x=randn(batch, length, dim)),
            dict(key_padding_mask=ignored(batch, length)),
        )

    return make


def attention(both=True, dropout=0.0, context=None, masked=True, size=(197, 64, 256, 8), **options):
    """Return a function that makes a problem; ``size``: tokens of both sides, width and heads."""

    def make(tiny: bool) -> Problem:
        *lengths, dim, heads = (7, 5, 24, 3) if tiny else size
        batch = 3 if tiny else 64
        width = dim if both else (36 if tiny else context or dim)
        kind = mmfused.BidirectionalGatedCrossAttention if both else mmfused.GatedCrossAttention
        module = kind(
            dim, heads, dropout=dropout, **({} if both else dict(context_dim=width)), **options
        )
        names = ("a", "b") if both else ("x", "context")
        inputs = {
            name: randn(batch, n, d)
            for name, n, d in zip(names, lengths, (dim, width), strict=True)
        }
        present = torch.arange(batch, device=DEVICE) % 3
        given = {
            f"{names[1]}_key_padding_mask": ignored(batch, lengths[1]),
            f"{names[1]}_present": present != 1,
        }
        given |= {"a_present": present != 2} if both else {}
        given = given if masked else {}
        given |= dict(dropout_seed=seed()) if dropout else {}
        return Problem(rounded(module), inputs, given)

    return make


def token_gate(tiny: bool) -> Problem:
    batch, length, dim = (3, 7, 24) if tiny else (64, 197, 256)
    return Problem(
        rounded(mmfused.TokenGate(dim)), {name: randn(batch, length, dim) for name in "ab"}
    )


def routing(from_input: bool, everything=False, router="triton", **options):
    """Return a function that makes a routing problem.

    With ``from_input``, the indices are given: near a tie, 16-bit logits may lead to other experts.
    """

    def make(tiny: bool) -> Problem:
        tokens, experts, k, dim = (37, 5, 2, 24) if tiny else (8192, 128, 8, 512)
        source = (
            dict(x=randn(tokens, dim), router_weight=randn(experts, dim, std=dim**-0.5))
            if from_input
            else {}
        )
        source |= {} if from_input else dict(logits=randn(tokens, experts))
        function = mmfused.topk_routing_from_input if from_input else mmfused.topk_routing

        def call(**arguments):
            with library.router(router):
                return function(k=k, **arguments, **options)

        given = {}
        if everything:
            given = dict(token_padding_mask=torch.rand(tokens, device=DEVICE) < 0.2)
            given |= dict(
                segments=torch.randint(0, 3, (tokens,), device=DEVICE), jitter_seed=seed()
            )
        if from_input:
            given["indices"] = (
                torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :k].contiguous()
            )
        return Problem(Routed(Call(call)), source, given)

    return make


def experts(activation="gelu", packed=False):
    def make(tiny: bool) -> Problem:
        tokens, num_experts, k, dim, width = (
            (37, 5, 2, 24, 20) if tiny else (2048, 16, 2, 768, 1024)
        )

        def call(x, weights, indices, mask, **parameters):
            routed = mmfused.routing_from_indices(
                indices, weights, num_experts, token_padding_mask=mask
            )
            return mmfused.grouped_mlp(x, routed, **parameters, activation=activation)

        inputs = dict(
            x=randn(tokens, dim), weights=torch.rand(tokens, k, dtype=torch.float64, device=DEVICE)
        )
        inputs["weights"] = inputs["weights"].to(torch.bfloat16).double().requires_grad_()
        inputs["w_up"] = randn(num_experts, 2 * width if packed else width, dim, std=dim**-0.5)
        inputs["w_down"] = randn(num_experts, dim, width, std=width**-0.5)
        inputs |= dict(b_up=randn(num_experts, width), b_down=randn(num_experts, dim))
        if activation == "swiglu" and not packed:
            inputs["w_gate"] = randn(num_experts, width, dim, std=dim**-0.5)
        score = torch.rand(tokens, num_experts, device=DEVICE)
        score[:, 1] = -1  # an expert without tokens
        given = dict(
            indices=score.argsort(1, descending=True)[:, :k].contiguous(),
            mask=torch.rand(tokens, device=DEVICE) < 0.1,
        )
        return Problem(Call(call), inputs, given)

    return make


def linear(tiny: bool) -> Problem:
    tokens, num_experts, k, dim, width = (37, 5, 2, 24, 20) if tiny else (2048, 16, 2, 768, 1024)

    def call(x, weights, indices, weight, bias):
        routed = mmfused.routing_from_indices(indices, weights, num_experts)
        return mmfused.grouped_linear(x, routed, weight, bias, combine=True)

    weights = (
        torch.rand(tokens, k, dtype=torch.float64, device=DEVICE)
        .to(torch.bfloat16)
        .double()
        .requires_grad_()
    )
    inputs = dict(
        x=randn(tokens, dim),
        weights=weights,
        weight=randn(num_experts, width, dim, std=dim**-0.5),
        bias=randn(num_experts, width),
    )
    return Problem(
        Call(call),
        inputs,
        dict(indices=torch.rand(tokens, num_experts, device=DEVICE).argsort(1)[:, :k].contiguous()),
    )


def moe(activation: str):
    def make(tiny: bool) -> Problem:
        tokens, num_experts, k, dim, width = (
            (37, 5, 2, 24, 20) if tiny else (2048, 16, 2, 768, 1024)
        )
        module = rounded(mmfused.TopKMoE(dim, width, num_experts, k, activation=activation))
        given = dict(
            token_padding_mask=torch.rand(tokens, device=DEVICE) < 0.1,
            indices=torch.rand(tokens, num_experts, device=DEVICE).argsort(1)[:, :k].contiguous(),
        )
        return Problem(Routed(module), dict(x=randn(tokens, dim)), given)

    return make


def info_nce(dim=256, masks=False, module=False, **options):
    def make(tiny: bool) -> Problem:
        rows, columns, width = (21, 33, 12) if tiny else (2048, 4096, dim)
        inputs = {
            name: randn(n, width, std=width**-0.5)
            for name, n in (("query", rows), ("candidate", columns))
        }
        given = {}
        if masks:
            given = dict(
                candidate_key=torch.randint(-1, 4, (columns,)),
                candidate_id=torch.randint(0, columns // 2, (columns,)),
            )
            given |= dict(query_key=torch.randint(0, 4, (rows,)), row_weight=torch.rand(rows))
            given = {name: tensor.to(DEVICE) for name, tensor in given.items()}
        if module:
            return Problem(
                rounded(mmfused.MaskedInfoNCE(0.125, learnable_temperature=True, **options)),
                inputs,
                given,
            )
        inputs["temperature"] = torch.tensor(
            0.125, dtype=torch.float64, device=DEVICE
        ).requires_grad_()
        return Problem(
            Call(lambda **arguments: mmfused.masked_info_nce(**arguments, **options)), inputs, given
        )

    return make


CASES = {
    "query_pooling": Case(pooling(), dtypes=True),
    "query_pooling, norm and mask": Case(pooling(norm=True, padding="mask", queries=2)),
    "query_pooling, queries per sample and dropout": Case(
        pooling(padding="lengths", per_sample=True, dropout=0.1)
    ),
    "query_pooling, projected": Case(
        pooling(norm=True, padding="mask", queries=2, pooling_form="projected"), fused=False
    ),
    "query_pooling, packed": Case(pooling(norm=True, padding="packed", return_lse=True)),
    "query_pooling, packed, few queries and dropout": Case(
        pooling(padding="packed", queries=2, dropout=0.1)
    ),
    "query_pooling, many rows": Case(pooling(heads=8), large=True),
    "query_pooling, short samples": Case(pooling(queries=2, size=(32, 768)), large=True),
    "query_pooling, wide": Case(
        pooling(queries=64, norm=True, padding="mask", size=(197, 2048)), large=True
    ),
    "QueryPooling": Case(pooling_module(transform=False), module=True),
    "QTransform": Case(pooling_module(transform=True), module=True),
    "both directions": Case(attention(), dtypes=True, module=True),
    "both directions, dropout": Case(attention(dropout=0.1)),
    "both directions, heads of 64": Case(attention(size=(197, 128, 768, 12)), large=True),
    "both directions, many tokens, dropout": Case(
        attention(dropout=0.1, size=(197, 200, 256, 8)), large=True
    ),
    "one direction": Case(
        attention(both=False, context=768, gate="token", missing="zero"), module=True
    ),
    "one direction, no gate": Case(
        attention(both=False, context=768, gate="none", pre_norm=False, indicator="batch"),
        module=True,
    ),
    "both directions, shared weights": Case(
        attention(share_weights=True, masked=False), module=True
    ),
    "TokenGate": Case(token_gate, fused=False, module=True),
    "topk_routing": Case(routing(False), dtypes=True),
    "topk_routing, all options": Case(
        routing(
            False, everything=True, num_segments=3, jitter=0.1, balance="gshard", score="sigmoid"
        )
    ),
    "topk_routing in C++": Case(routing(False, router="cuda"), composed=False),
    "topk_routing_from_input": Case(routing(True)),
    "grouped_mlp": Case(experts(), waits=True, dtypes=True),
    "grouped_mlp, relu": Case(experts("relu"), waits=True),
    "grouped_mlp, swiglu": Case(experts("swiglu"), waits=True),
    "grouped_mlp, packed": Case(experts("swiglu", packed=True), waits=True),
    "grouped_linear": Case(linear, waits=True),
    "TopKMoE": Case(moe("gelu"), waits=True, module=True),
    "masked_info_nce": Case(info_nce(symmetric=True), waits=True, dtypes=True),
    "masked_info_nce, masks": Case(info_nce(768, masks=True), waits=True),
    "masked_info_nce, smoothed": Case(
        info_nce(masks=True, same_id="mean", label_smoothing=0.1), waits=True
    ),
    "MaskedInfoNCE": Case(
        info_nce(masks=True, module=True, symmetric=True), waits=True, module=True
    ),
}
