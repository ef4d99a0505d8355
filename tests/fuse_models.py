"""Small models from torch, timm, open_clip and transformers for test_fuse.py, with inputs."""

import pytest
import torch
from torch import nn

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
B, N, D, K, H = 3, 11, 36, 20, 3  # samples, tokens, width, width of encoder tokens, heads


class Pool(nn.Module):
    """Attention pooling with learned queries and ``nn.MultiheadAttention``."""

    def __init__(self, shape, **options):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(shape))
        self.attention = nn.MultiheadAttention(D, H, **options)

    def forward(self, x, mask=None):
        queries = self.queries.expand(len(x), -1, -1)
        if not self.attention.batch_first:
            x, queries = x.transpose(0, 1), queries.transpose(0, 1)
        return self.attention(queries, x, x, key_padding_mask=mask, need_weights=False)[0]


def library(path, *args, **options):
    """Create an instance of the class at ``path``. Skip the test if the module is missing."""
    module, _, name = path.rpartition(".")
    return getattr(pytest.importorskip(module), name)(*args, **options)


def torch_attention(**options):
    return nn.MultiheadAttention(D, H, batch_first=True, **options)


def latent(**options):
    return library("timm.layers.attention_pool.AttentionPoolLatent", D, num_heads=H, **options)


def timm_vit():
    options = dict(
        num_classes=5, embed_dim=D, depth=1, num_heads=H, global_pool="map", class_token=False
    )
    return library("timm.models.vision_transformer.VisionTransformer", 16, 4, **options)


def open_clip_pool(**options):
    return library("open_clip.transformer.AttentionalPooler", D, K, H, 4, **options)


def open_clip_tower():
    pool = dict(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=H, output_dim=K + 1)
    return library(
        "open_clip.transformer.VisionTransformer",
        16,
        4,
        width=D,
        layers=1,
        heads=H,
        mlp_ratio=2.0,
        **pool,
    )


def hugging_face(model, name, config, *args, implementation="sdpa", **options):
    sizes = dict(hidden_size=D, intermediate_size=24, num_attention_heads=H)
    config = library(
        f"transformers.models.{model}.configuration_{model}.{config}", **sizes, **options
    )
    config._attn_implementation = implementation
    return library(f"transformers.models.{model}.modeling_{model}.{name}", config, *args)


def head(model, prefix, **options):
    return hugging_face(
        model, f"{prefix}MultiheadAttentionPoolingHead", f"{prefix}VisionConfig", **options
    )


def siglip2_head(**options):
    return head("siglip2", "Siglip2", **options)


def siglip():
    return hugging_face(
        "siglip",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        num_hidden_layers=1,
        image_size=16,
        patch_size=4,
    )


def q_former(name="Model", *args, model="blip_2", prefix="Blip2", dropout=0.0, **options):
    options |= dict(num_hidden_layers=2, encoder_hidden_size=K, cross_attention_frequency=2)
    options |= dict(attention_probs_dropout_prob=dropout, hidden_dropout_prob=0.0)
    return hugging_face(model, f"{prefix}QFormer{name}", f"{prefix}QFormerConfig", *args, **options)


def cross(**options):
    return q_former("MultiHeadAttention", True, **options)


def after(model, change):
    change(model)
    return model


def setting(name, value):
    return lambda model: setattr(model, name, value)


SIZES = {
    "x": (B, N, D),
    "k": (B, N, K),
    "q": (B, 5, D),
    "one q": (1, 5, D),
    "image": (2, 3, 16, 16),
}


def data(names):
    inputs = {
        n: torch.randn(SIZES[n], dtype=torch.float64, device=DEVICE)
        for n in names.split(", ")
        if n != "mask"
    }
    if "mask" in names:
        inputs["mask"] = (torch.arange(N) >= torch.tensor([N, 4, 7])[:, None]).to(DEVICE)
        inputs["mask"][1, 0] = True  # also padded on the left
    return inputs


def attend_to(mask):
    return (~mask)[:, None, None]


def plain_call(model, *inputs):
    return model(*inputs)


CROSS, SELF = (
    {"encoder.layer.0.crossattention.attention"},
    {f"encoder.layer.{i}.attention.attention" for i in (0, 1)},
)

# name -> (function that creates a model, names of the inputs, function that calls the model,
# modules that mmfused.fuse swaps, attention modules that mmfused.fuse leaves unchanged).
# The last three items may be missing.
CASES = {
    "torch, root": (
        lambda: torch_attention(kdim=K, vdim=K),
        "q, k",
        lambda m, q, x: m(q, x, x, need_weights=False)[0],
    ),
    "torch, sequence first": (
        lambda: Pool((5, D), kdim=K, vdim=K),
        "k, mask",
        plain_call,
        {"attention"},
    ),
    "torch, one query": (lambda: Pool((1, D), bias=False), "x", plain_call, {"attention"}),
    "torch, batch first": (
        lambda: Pool((1, 5, D), batch_first=True),
        "x, mask",
        plain_call,
        {"attention"},
    ),
    "timm": (latent, "x"),
    "timm, bare": (
        lambda: latent(latent_len=3, q_proj=False, qkv_bias=False, out_features=0, pool_type=""),
        "x",
    ),
    "timm, masked": (
        lambda: latent(
            latent_len=3,
            pos_embed="abs",
            feat_size=N,
            norm_layer=nn.LayerNorm,
            pool_type="avg",
            latent_dim=16,
        ),
        "x, mask",
        lambda m, x, mask: m(x, attend_to(mask)),
    ),
    "timm, q_norm": (lambda: after(latent(), setting("q_norm", nn.LayerNorm(D // H))), "x"),
    "timm, a ViT": (timm_vit, "image", plain_call, {"attn_pool"}),
    "open_clip": (open_clip_pool, "k"),
    "open_clip, another norm": (lambda: open_clip_pool(norm_layer=nn.RMSNorm), "k"),
    "open_clip, a tower": (
        open_clip_tower,
        "image",
        plain_call,
        {"attn_pool"},
        {"transformer.resblocks.0.attn"},
    ),
    "siglip": (siglip, "image", lambda m, x: m(x).pooler_output, {"head"}),
    "siglip2": (siglip2_head, "x, mask", lambda m, x, mask: m(x, (~mask).long())),
    "siglip2, eager": (
        lambda: siglip2_head(implementation="eager"),
        "x, mask",
        lambda m, x, mask: m(x, ~mask),
    ),
    "idefics2": (lambda: head("idefics2", "Idefics2"), "x"),
    "phi4": (
        lambda: hugging_face(
            "phi4_multimodal",
            *(f"Phi4MultimodalVision{n}" for n in ("MultiheadAttentionPoolingHead", "Config")),
        ),
        "x, mask",
        lambda m, x, mask: m(x, ~mask),
    ),
    "blip2": (
        q_former,
        "q, k",
        lambda m, q, x: m(q, encoder_hidden_states=x).last_hidden_state,
        CROSS,
        SELF,
    ),
    "blip2, padded": (
        q_former,
        "q, k, mask",
        lambda m, q, x, mask: m(q, 5, None, x, attend_to(mask)).last_hidden_state,
        CROSS,
        SELF,
    ),
    "instructblip": (
        lambda: cross(model="instructblip", prefix="InstructBlip"),
        "one q, k",
        lambda m, q, x: m(q, encoder_hidden_states=x)[0],
    ),
    "instructblipvideo": (
        lambda: cross(model="instructblipvideo", prefix="InstructBlipVideo"),
        "q, k",
        lambda m, q, x: m(q, None, x)[0],
    ),
}
