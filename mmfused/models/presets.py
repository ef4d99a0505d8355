"""Sizes of the models' presets: "paper", "code" (if the public code differs) and "tiny".

A preset updates the defaults of the model's config, whose sizes are tiny.
"""

from __future__ import annotations

from typing import Any

Presets = dict[str, dict[str, Any]]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIT_B_224 = {"img_size": 224, "depth": 12, "num_heads": 12}
TINY_VIT_64: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
TINY_BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
}

# ---- FLUID ---------------------------------------------------------------------------------------

_FLUID = {
    "num_classes": 191,
    "dim": 768,
    "num_queries": 32,
    "num_heads": 8,
    "head_dropout": 0.2,
    "expert_hidden": (3072, 768),
    "image_dim": 768,
    "text_dim": 768,
    "image_stem": "patch",
    "pixel_mean": (0.5, 0.5, 0.5),
    "pixel_std": (0.5, 0.5, 0.5),
    "image": {**VIT_B_224, "patch_size": 16},
    # bert-base-multilingual-cased; all other sizes are BertConfig's defaults.
    "text": {"vocab_size": 119547},
}
FLUID: Presets = {
    "paper": {
        **_FLUID,
        "depth": 1,
        "gate_hidden": (768,),
        "num_experts": 16,
        "balance": "gshard",
    },
    "code": {
        **_FLUID,
        "depth": 6,
        "gate_hidden": (768, 768),
        "num_experts": 8,
        "balance": "mse",
        "text_mask": False,
        "text_length": 512,
        "query_std": 1.0,
        "pixel_mean": IMAGENET_MEAN,
        "pixel_std": IMAGENET_STD,
        "resize": "stretch",
        "resample": "bilinear",
    },
    "tiny": {
        "image": {**TINY_VIT_64, "img_size": 32, "patch_size": 8},
        "text": {
            **TINY_BERT,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.0,
        },
        # Chosen for training on a thousand photos with augmentation.
        "dropout": 0.0,
        "head_dropout": 0.0,
        "expert_hidden": (),
    },
}

# ---- UniECS --------------------------------------------------------------------------------------

_UNIECS = {
    "dim": 256,
    "num_heads": 8,
    "fusion_blocks": 3,
    "dropout": 0.1,
    "text_length": 64,
    "image_dim": 768,
    "text_dim": 768,
    "image_stem": "patch",
    "pixel_mean": CLIP_MEAN,
    "pixel_std": CLIP_STD,
    # chinese-roberta-wwm-ext; all other sizes are BertConfig's defaults.
    "text": {"vocab_size": 21128},
}
UNIECS: Presets = {
    "paper": {**_UNIECS, "cross_layers": 4, "image": {**VIT_B_224, "patch_size": 16}},
    "code": {
        **_UNIECS,
        "cross_layers": 3,
        "self_blocks": 2,
        "placement": "after",
        "indicator": "batch",
        "text_mask": False,
        "text_padding": "encoded",
        "v2f": "f_to_v",
        "weighting": "static",
        "resize": "stretch",
        "image": {**VIT_B_224, "patch_size": 32},
    },
    "tiny": {
        "image": TINY_VIT_64,
        "text": {**TINY_BERT, "attention_probs_dropout_prob": 0.0},
    },
}

# ---- UniCA ---------------------------------------------------------------------------------------

# VISTA's second stage: 196 tokens of an image, and bge-base, a BERT-base (all other sizes are
# BertConfig's defaults).
_VISTA = {
    "text": {"vocab_size": 30522},
    "text_dim": 768,
    "image_dim": 768,
    "image_stem": "patch",
    "pixel_mean": CLIP_MEAN,
    "pixel_std": CLIP_STD,
    "empty_text": (101, 102),
    "resize": "shortest",
    "image_token_type": False,
    "num_heads": None,
    "freeze": ("text",),
}
UNICA: Presets = {
    "paper": {**_VISTA, "image": {**VIT_B_224, "patch_size": 16}},
    "code": {
        **_VISTA,
        # EVA02-CLIP-B/16; VISTA takes its tokens before the last norm.
        "image": {"name": "eva02_base_patch16_clip_224", "final_norm": False},
        "same_id": "ignore",
        "without": ("bica", "positive_similarity"),
    },
    "tiny": {
        "text": {
            **TINY_BERT,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.0,
            # With BERT's 0.02, the loss stays at log(batch size). With 0.1, it falls in 40 steps.
            "initializer_range": 0.1,
        },
        "image": TINY_VIT_64,
        "ffn": 256,
    },
}

# ---- MOON2.0 and UNITE, on a Qwen2-VL ------------------------------------------------------------

# A host that trains on a CPU in minutes.
TINY_QWEN2_VL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
        },
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
    },
}
QWEN2_5_VL_3B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
QWEN2_VL_2B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
}
MOON2: Presets = {
    "paper": {"host": QWEN2_5_VL_3B, "image_size": 224},
    "tiny": {"host": TINY_QWEN2_VL, "image_size": 64, "num_experts": 4},
}
# 448 x 448 pixels are 256 tokens, the fewest that a picture has in UNITE.
_UNITE = {"host": QWEN2_VL_2B, "image_size": 448, "freeze": ("vision",)}
UNITE: Presets = {
    "paper": _UNITE,
    "code": {
        **_UNITE,
        "same_id": "sum",
        "same_id_with_negatives": "ignore",
        "prompt": "chat",
        "positions": "1d",
    },
    "tiny": {"host": TINY_QWEN2_VL, "image_size": 64},
}
