"""Test cases for modified child modules: module x attachment x backend.

``MODULES``: modules that read the weights of their children, with inputs and a plain PyTorch
forward that calls every child. ``ATTACHMENTS``: modifications of the projections or of the norms.
``outcome``: what a call of the modified module must do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mmfused

B, N, M, D, HEADS, EXPERTS = 2, 5, 3, 16, 2, 4
BACKENDS = ("reference", "composed", "fused")


# ---- modules, each with a plain forward that calls every child -----------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, ignore: Tensor | None = None) -> Tensor:
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if ignore is not None:
        logits = logits.masked_fill(ignore[:, None, None], float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain_pooling(m: nn.Module, x: Tensor, ignore: Tensor) -> Tensor:
    x = m.norm_kv(x.masked_fill(ignore[..., None], 0.0))
    q = m.q_proj(m.queries).expand(len(x), -1, -1)
    return m.out_proj(attend(q, m.k_proj(x), m.v_proj(x), ignore))


def plain_one_head(m: nn.Module, x: Tensor) -> Tensor:
    probs = (m.queries @ m.k_proj(x).mT * D**-0.5).softmax(-1)
    return m.out_proj(probs @ m.v_proj(x))


def plain_direction(m: nn.Module, x: Tensor, normed: Tensor, context: Tensor) -> Tensor:
    attn_out = m.out_proj(attend(m.q_proj(normed), m.k_proj(context), m.v_proj(context)))
    g = m.gate_proj(torch.cat([x, attn_out, torch.ones_like(x[..., :1])], -1)).sigmoid()
    return g * attn_out + (1 - g) * x


def plain_cross(m: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    return plain_direction(m, x, m.norm_x(x), m.norm_context(context))


def plain_post_norm(m: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    return m.norm_x(x + m.out_proj(attend(m.q_proj(x), m.k_proj(context), m.v_proj(context))))


def plain_both(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    na, nb = m.norm_a(a), m.norm_b(b)
    return torch.cat([plain_direction(m.to_a, a, na, nb), plain_direction(m.to_b, b, nb, na)], 1)


def plain_moe(m: nn.Module, x: Tensor) -> Tensor:
    weights, chosen = m.router(x).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden = F.gelu(torch.einsum("td,ehd->teh", x, m.w_up) + m.b_up)
    out = torch.einsum("teh,edh->ted", hidden, m.w_down) + m.b_down
    return (out.gather(1, chosen[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)


class Module(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, D)


def pooling() -> nn.Module:
    options = dict(q_proj=True, out_proj=True, bias=True, norm_kv=True)
    return mmfused.QueryPooling(D, 3, HEADS, **options)


MODULES = {
    "QueryPooling": Module(
        pooling,
        lambda: (tokens(B, N), torch.tensor([[False] * N, [False] * 3 + [True] * 2])),
        lambda m, x, ignore: m(x, ignore),
        plain_pooling,
    ),
    # With more pooled rows (2 x 9) than D, an unmodified out_proj is folded into v_proj.
    "QueryPooling, one head": Module(
        lambda: mmfused.QueryPooling(D, 9, 1, out_proj=True),
        lambda: (tokens(B, N),),
        lambda m, x: m(x),
        plain_one_head,
    ),
    "GatedCrossAttention": Module(
        lambda: mmfused.GatedCrossAttention(D, HEADS),
        lambda: (tokens(B, N), tokens(B, M)),
        lambda m, x, context: m(x, context),
        plain_cross,
    ),
    "GatedCrossAttention, post-norm": Module(
        lambda: mmfused.GatedCrossAttention(D, HEADS, gate="none", pre_norm=False),
        lambda: (tokens(B, N), tokens(B, M)),
        lambda m, x, context: m(x, context),
        plain_post_norm,
    ),
    "BidirectionalGatedCrossAttention": Module(
        lambda: mmfused.BidirectionalGatedCrossAttention(D, HEADS),
        lambda: (tokens(B, N), tokens(B, M)),
        lambda m, a, b: torch.cat(m(a, b), 1),
        plain_both,
    ),
    "TopKMoE": Module(
        lambda: mmfused.TopKMoE(D, D, EXPERTS),
        lambda: (tokens(7),),
        lambda m, x: m(x)[0],
        plain_moe,
    ),
}


# ---- attachments ---------------------------------------------------------------------------------


class Attachment(NamedTuple):
    """A modification of the children of a module.

    ``attach(module, names)``: modifies the named children and returns the module to call.
    ``to``: the kind of children, "linear" or "norm".
    ``reads``: the library reads the weight of a modified child instead of calling the child.
    ``gradients``: the modified module can be differentiated.
    ``training``: the training mode of the call. With None, ``attach`` sets the mode.
    ``neutral``: the modification does not change the results.
    ``needs``: the package that ``attach`` imports.
    """

    attach: Callable[[nn.Module, list[str]], nn.Module]
    to: str = "linear"
    reads: bool = False
    gradients: bool = True
    training: bool | None = False
    neutral: bool = False
    needs: str = ""


def children(module: nn.Module, kind: type) -> list[str]:
    return [name for name, child in module.named_modules() if type(child) is kind]


def each(change: Callable[[nn.Module], nn.Module | None]) -> Callable:
    """Return an ``attach`` that applies ``change`` to each child.

    A module returned by ``change`` replaces the child.
    """

    def attach(module: nn.Module, names: list[str]) -> nn.Module:
        for name in names:
            new = change(module.get_submodule(name))
            if isinstance(new, nn.Module):
                module.set_submodule(name, new)
        return module

    return attach


def adapted(
    config: str, after: Callable[[nn.Module], object] = lambda m: None, **options: Any
) -> Callable:
    """Return an ``attach`` that adds a peft adapter, then calls ``after`` on the module."""

    def attach(module: nn.Module, names: list[str]) -> nn.Module:
        import peft

        cls = getattr(peft, config)
        peft.inject_adapter_in_model(cls(target_modules=names, **options), module)
        for name, parameter in module.named_parameters():
            if "default" in name:
                # An adapter with its initial values has no effect.
                parameter.data += 0.2 * torch.randn_like(parameter)
        after(module)
        return module

    return attach


def tuners(module: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def merge(module: nn.Module) -> None:
    for part in tuners(module):
        part.merge()


def disable(module: nn.Module) -> None:
    for part in tuners(module):
        part.enable_adapters(False)


def dropouts_in_training(module: nn.Module) -> None:
    """Put only the Dropout modules in training mode, for Monte Carlo dropout."""
    for part in module.eval().modules():
        part.train(type(part) is nn.Dropout)


def empty_until_called(child: nn.Module) -> None:
    """Empty the parameters of the child except during its calls, as DeepSpeed's ZeRO-3 does."""
    for parameter in child.parameters(recurse=False):
        parameter.whole, parameter.data = parameter.data, torch.empty(0)

    def gather(module, args):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.whole

    def release(module, args, out):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    child.register_forward_pre_hook(gather)
    child.register_forward_hook(release)


def doubled_forward(child: nn.Module) -> None:
    class DoubledForward(type(child)):
        def forward(self, x):
            return 2 * super().forward(x)

    child.__class__ = DoubledForward


def doubled_call(child: nn.Module) -> None:
    child.__class__ = type(
        "DoubledCall", (type(child),), {"__call__": lambda m, x: 2 * nn.Module.__call__(m, x)}
    )


def hooked_spectral_norm(child: nn.Module) -> None:
    parametrizations.spectral_norm(child)
    child.register_forward_hook(lambda m, args, out: 2 * out)


def renamed(child: nn.Module) -> None:
    child.__class__ = type("Renamed", (type(child),), {})


def instance_forward(child: nn.Module) -> None:
    child.forward = lambda x: 2 * type(child).forward(child, x)


def hooked(register: str, hook: Callable) -> Callable:
    return each(lambda child: getattr(child, register)(hook))


def quantized(module: nn.Module, names: list[str]) -> nn.Module:
    qconfig = {name: torch.ao.quantization.default_dynamic_qconfig for name in names}
    return torch.ao.quantization.quantize_dynamic(module, qconfig, dtype=torch.qint8)


def int8_weights(module: nn.Module, names: list[str]) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = [module.get_submodule(name) for name in names]
    quantize_(
        module, Int8WeightOnlyConfig(), filter_fn=lambda part, _: any(part is c for c in chosen)
    )
    return module


def offloaded(module: nn.Module, names: list[str]) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(module, execution_device=torch.device("cpu"))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def without(name: str) -> Callable[[nn.Module], None]:
    return lambda child: setattr(child, name, None)


ATTACHMENTS = {
    "LoRA": Attachment(adapted("LoraConfig", r=2), reads=True, needs="peft"),
    "LoRA, merged": Attachment(adapted("LoraConfig", merge, r=2), reads=True, needs="peft"),
    "LoRA, disabled": Attachment(adapted("LoraConfig", disable, r=2), reads=True, needs="peft"),
    "LoRA, dropout": Attachment(
        adapted("LoraConfig", r=2, lora_dropout=0.3), training=True, needs="peft"
    ),
    "LoRA, Monte Carlo dropout": Attachment(
        adapted("LoraConfig", dropouts_in_training, r=2, lora_dropout=0.3),
        training=None,
        needs="peft",
    ),
    "LoRA, dropout, evaluation": Attachment(
        adapted("LoraConfig", r=2, lora_dropout=0.3), reads=True, needs="peft"
    ),
    "DoRA": Attachment(adapted("LoraConfig", r=2, use_dora=True), needs="peft"),
    "IA3": Attachment(adapted("IA3Config", feedforward_modules=[]), needs="peft"),
    "LoHa": Attachment(adapted("LoHaConfig", r=2), needs="peft"),
    "LoKr": Attachment(adapted("LoKrConfig", r=2), needs="peft"),
    "OFT": Attachment(adapted("OFTConfig", oft_block_size=4), needs="peft"),
    "forward hook": Attachment(hooked("register_forward_hook", lambda m, args, out: 2 * out)),
    "forward pre-hook": Attachment(
        hooked("register_forward_pre_hook", lambda m, args: (2 * args[0],))
    ),
    "full backward hook": Attachment(
        hooked("register_full_backward_hook", lambda m, given, out: (2 * given[0],))
    ),
    "full backward pre-hook": Attachment(
        hooked("register_full_backward_pre_hook", lambda m, out: (2 * out[0],))
    ),
    "instance forward": Attachment(each(instance_forward)),
    "subclass": Attachment(each(doubled_forward)),
    "subclass, other __call__": Attachment(each(doubled_call)),
    "spectral_norm and a hook": Attachment(each(hooked_spectral_norm), training=True),
    "subclass, same forward": Attachment(each(renamed), reads=True),
    "LayerNorm": Attachment(
        each(
            lambda child: (
                nn.LayerNorm(child.out_features, bias=False)
                if child.in_features == child.out_features
                else child
            )
        )
    ),
    "other module": Attachment(each(lambda child: nn.Sequential(child, nn.Tanh()))),
    "pruning": Attachment(
        each(lambda child: (prune.l1_unstructured(child, "weight", 0.5), None)[1]), reads=True
    ),
    "old weight_norm": Attachment(
        each(lambda child: (nn.utils.weight_norm(child), None)[1]), reads=True
    ),
    "weight_norm": Attachment(each(parametrizations.weight_norm), reads=True),
    "old spectral_norm": Attachment(
        each(lambda child: (nn.utils.spectral_norm(child), None)[1]), reads=True, training=True
    ),
    "spectral_norm": Attachment(each(parametrizations.spectral_norm), reads=True, training=True),
    "parametrization": Attachment(
        each(lambda child: parametrize.register_parametrization(child, "weight", Doubled())),
        reads=True,
    ),
    "quantize_dynamic": Attachment(quantized, gradients=False),
    "torchao int8": Attachment(int8_weights, gradients=False, needs="torchao"),
    "cpu_offload": Attachment(offloaded, gradients=False, neutral=True, needs="accelerate"),
    "ZeRO-3": Attachment(each(empty_until_called), gradients=False, neutral=True),
    "norm: forward hook": Attachment(
        hooked("register_forward_hook", lambda m, args, out: 2 * out), to="norm"
    ),
    "norm: subclass": Attachment(each(doubled_forward), to="norm"),
    "norm: Linear": Attachment(each(lambda child: nn.Linear(D, D)), to="norm"),
    "norm: RMSNorm": Attachment(each(lambda child: nn.RMSNorm(child.normalized_shape)), to="norm"),
    "norm: pruning": Attachment(
        each(lambda child: (prune.l1_unstructured(child, "weight", 0.5), None)[1]),
        to="norm",
        reads=True,
    ),
    "norm: no bias": Attachment(each(without("bias")), to="norm", reads=True),
    "norm: no weight": Attachment(
        each(lambda child: nn.LayerNorm(D, elementwise_affine=False)), to="norm"
    ),
    "norm: other eps": Attachment(each(lambda child: setattr(child, "eps", 0.5)), to="norm"),
    "norm: ZeRO-3": Attachment(each(empty_until_called), to="norm", gradients=False, neutral=True),
}


def outcome(module: str, attachment: str, backend: str) -> str:
    """Return what a call of the modified module must do.

    "equal": return the result of the plain forward. "refused": raise an error. "none": the module
    has no child to modify.
    """
    kind = nn.Linear if ATTACHMENTS[attachment].to == "linear" else nn.LayerNorm
    if not children(MODULES[module].make(), kind):
        return "none"
    # The fused kernels of cross-attention need the weights of the children, not the outputs.
    called = not ATTACHMENTS[attachment].reads
    return "refused" if called and backend == "fused" and "Cross" in module else "equal"
