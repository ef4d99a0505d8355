"""Tiny mixture-of-experts models from transformers, for test_fuse_moe.py."""

from types import SimpleNamespace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, N, D, E, V = 3, 11, 32, 5, 40  # samples, tokens, width, experts, vocabulary
SIZES = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=24,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=E,
    num_local_experts=E,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.5,
    max_position_embeddings=64,
    pad_token_id=0,
    experts_implementation="eager",  # the default, grouped_mm, does not support float64
)


def create(model, prefix, name, config="Config", **options):
    """Create a tiny instance of a class in ``transformers.models.<model>``."""
    package = f"transformers.models.{model}"
    config = getattr(pytest.importorskip(f"{package}.configuration_{model}"), f"{prefix}{config}")
    config = config(**{**SIZES, **options})
    return getattr(pytest.importorskip(f"{package}.modeling_{model}"), f"{prefix}{name}")(config)


def causal(model, prefix, **options):
    return lambda **more: create(model, prefix, "ForCausalLM", **options, **more)


mixtral, qwen2, qwen3 = (
    causal("mixtral", "Mixtral"),
    causal("qwen2_moe", "Qwen2Moe"),
    causal("qwen3_moe", "Qwen3Moe"),
)

# name -> function that creates a causal language model
CASES = {
    "mixtral": mixtral,
    "mixtral, all experts": causal("mixtral", "Mixtral", num_experts_per_tok=E),
    "mixtral, jitter": causal("mixtral", "Mixtral", router_jitter_noise=0.1),
    "qwen2": qwen2,
    "qwen2, one expert": causal(
        "qwen2_moe", "Qwen2Moe", num_experts_per_tok=1, norm_topk_prob=False
    ),
    "qwen2, one dense layer": causal(
        "qwen2_moe", "Qwen2Moe", norm_topk_prob=True, mlp_only_layers=[0]
    ),
    "qwen3": causal("qwen3_moe", "Qwen3Moe", norm_topk_prob=True, num_experts_per_tok=3),
}

# model -> (prefix of the class names, name of the config class). Only the sparse MoE block of these
# models is tested.
BLOCKS = {
    "olmoe": ("Olmoe", "Config"),
    "qwen3_next": ("Qwen3Next", "Config"),
    "qwen3_vl_moe": ("Qwen3VLMoeText", "Config"),
    "qwen3_5_moe": ("Qwen3_5Moe", "TextConfig"),
}


def filled(model, dtype=torch.float64):
    """Fill the parameters with random values that are large enough to change the results."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape) * p.shape[-1] ** -0.5
                if p.dim() > 1
                else 1 + 0.3 * torch.randn(p.shape)
            )
    return model.to(DEVICE, dtype)


def block(model, dtype=torch.float64):
    prefix, config = BLOCKS[model]
    return filled(create(model, prefix, "SparseMoeBlock", config), dtype)


def experts(path, dtype=torch.float64, **options):
    """Create an experts module from a minimal config."""
    sizes = dict(
        hidden_size=D,
        intermediate_size=24,
        moe_intermediate_size=24,
        n_routed_experts=E,
        num_local_experts=E,
    )
    config = SimpleNamespace(**sizes, _experts_implementation="eager", **options)
    module, _, name = path.rpartition(".")
    return filled(
        getattr(pytest.importorskip(f"transformers.models.{module}"), name)(config), dtype
    )


def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, V, (B, N), generator=generator)
    mask = (torch.arange(N) < torch.tensor([N, 4, 7])[:, None]).long()
    return dict(
        input_ids=ids.to(DEVICE),
        attention_mask=mask.to(DEVICE),
        labels=ids.masked_fill(mask == 0, -100).to(DEVICE),
    )


def run(model, seed=3, **more):
    """Return logits, losses, router logits and the gradients of all parameters, by name."""
    torch.manual_seed(seed)  # for the router's jitter
    out = model(**batch(), output_router_logits=True, **more)
    results = {"logits": out.logits, "loss": out.loss, "aux": out.aux_loss}
    results |= {f"router {i}": logits for i, logits in enumerate(out.router_logits)}
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(out.loss, list(parameters.values()))
    return {k: v.detach() for k, v in results.items()} | dict(
        zip(parameters, gradients, strict=True)
    )


def run_block(module, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = (
        torch.randn(B, N, D, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .requires_grad_()
    )
    upstream = torch.randn(B, N, D, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    out = module(x)
    parameters = dict(module.named_parameters())
    return {"out": out.detach()} | dict(
        zip(
            ["x", *parameters],
            torch.autograd.grad(out, [x, *parameters.values()], upstream),
            strict=True,
        )
    )


def expert_inputs(k=2, tokens=19, dtype=torch.float64, experts=E):
    """Return the inputs of an experts module: tokens, chosen experts and routing weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k].to(DEVICE)
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x, index, weights


def run_experts(module, x, index, weights):
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = module(x, index, weights)
    parameters = dict(module.named_parameters())
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out)
    gradients = torch.autograd.grad(out, [x, weights, *parameters.values()], upstream)
    return {"out": out.detach()} | dict(zip(["x", "weights", *parameters], gradients, strict=True))
