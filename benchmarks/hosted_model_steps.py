"""The models built on BERT or Qwen2-VL (UniCA, MOON2.0, UNITE), for model_steps.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.models import MOON2Config, UniCAConfig, UNITEConfig
from mmfused.models.presets import QWEN2_VL_2B
from mmfused.models.qwen import KINDS

from .model_step import Step

LANGUAGE = {
    **QWEN2_VL_2B["text_config"],
    "num_hidden_layers": 2,
    "intermediate_size": 2048,
    "vocab_size": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
SMALL_LANGUAGE = {
    **LANGUAGE,
    "vocab_size": 64,
    "initializer_range": 0.2,  # with the usual 0.02, narrow layers have almost no effect
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
# A minimal vision tower, which Moon2Step replaces because the image tokens are inputs.
TOWER = {
    "depth": 1,
    "embed_dim": 8,
    "num_heads": 1,
    "mlp_ratio": 1,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
TOKENS = {"vision_start": 1, "vision_end": 2, "image": 3, "end": 4, "pad": 5, "drop": []}
TOKENS["prompts"] = dict.fromkeys(KINDS, [])
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class UnicaStep(Step):
    """UniCA's cross-attention block, and a BERT with 2 layers of BERT-base's width.

    The batch has queries, positives and hard negatives. Some items lack an image or a text.
    """

    def build(self, models: Any) -> Any:
        if not self.small:
            text = {"num_hidden_layers": 2, **NO_DROPOUT}
            return models.UniCA(
                UniCAConfig.preset("paper", image=None, freeze=(), dropout=0.0, text=text)
            )
        bert = {
            "vocab_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        }
        sizes = {"text_dim": 32, "image_dim": 24, "ffn": 48}
        text = {**bert, "max_position_embeddings": 32, "initializer_range": 0.1, **NO_DROPOUT}
        return models.UniCA(UniCAConfig(text=text, dropout=0.0, **sizes))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        size = (self.batch, 9, 24) if self.small else (self.batch, 196, 768)
        return dict.fromkeys(("query", "candidate", "negative"), size)

    def data(self) -> dict[str, Tensor]:
        length, vocabulary = (8, 64) if self.small else (64, 30522)
        found = {"present": torch.arange(self.batch) % 5 != 1, "labels": torch.arange(self.batch)}
        for role in self.shapes():
            real = ~self.padding(length)
            real[:, :4] = True
            real[2::5, 2:] = False  # an empty text: only [CLS] and [SEP]
            found |= {
                f"{role}_ids": self.randint(4, vocabulary, self.batch, length),
                f"{role}_real": real,
            }
        return found

    def loss(self, *tokens: Tensor) -> Tensor:
        parts = {}
        for place, (role, image) in enumerate(zip(self.shapes(), tokens, strict=True)):
            texts = {
                "input_ids": getattr(self, f"{role}_ids"),
                "attention_mask": getattr(self, f"{role}_real"),
            }
            labels = self.labels + (self.batch if place == 2 else 0)
            parts[role] = {
                "image_tokens": image,
                "image_present": self.present,
                "labels": labels,
                **texts,
            }
        return self.model(**parts).loss


class Moon2Step(Step):
    """MOON2.0 on a Qwen2-VL with the width of the 2B model, 2 layers and 8 experts of width 2048.

    The batch has queries, positives and hard negatives, with images, texts, or both. The routers
    read mostly the first num_experts channels of a token, and no layer changes these channels.
    Thus the choice of experts does not depend on rounding.
    """

    def build(self, models: Any) -> Any:
        language, experts = (SMALL_LANGUAGE, 4) if self.small else (LANGUAGE, 8)
        host = {"text_config": language, "vision_config": TOWER}
        config = MOON2Config(
            host=host, tokens=TOKENS, image_size=56 if self.small else 224, num_experts=experts
        )
        model = models.MOON2(config)
        model.host.visual = nn.Identity()  # the image tokens are inputs
        self.change_weights(model)
        return model

    @staticmethod
    @torch.no_grad()
    def change_weights(model: Any) -> None:
        words, experts = model.host.language_model.embed_tokens.weight, model.config.num_experts
        words.normal_()
        words[:, :experts] = permutations(len(words), experts, words.device)
        for layer in model.host.language_model.layers:
            layer.self_attn.o_proj.weight[:experts] = 0
            layer.mlp.w_down[:, :experts] = 0
            layer.mlp.router.weight.mul_(0.1)
            layer.mlp.router.weight[:, :experts] = 0.5 * torch.eye(experts, device=words.device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        size = (self.batch, 4, 32) if self.small else (self.batch, 64, 1536)
        return dict.fromkeys(("query", "candidate", "negative"), size)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        drawn, experts = super().inputs(device), self.model.config.num_experts
        for x in drawn.values():
            x[..., :experts] = permutations(x[..., 0].numel(), experts, device).view(
                *x.shape[:2], experts
            )
        return drawn

    def data(self) -> dict[str, Tensor]:
        length, vocabulary = (5, 64) if self.small else (32, 2048)
        found = {"present": torch.arange(self.batch) % 5 != 1, "labels": torch.arange(self.batch)}
        for role in self.shapes():
            real = ~self.padding(length)
            real[2::5] = False
            found |= {
                f"{role}_ids": self.randint(6, vocabulary, self.batch, length),
                f"{role}_real": real,
            }
        return found

    loss = UnicaStep.loss


def permutations(count: int, experts: int, device: torch.device) -> Tensor:
    """Return a random permutation of 0, ..., experts - 1 in each row of (count, experts) floats."""
    drawn = torch.rand(count, experts, generator=torch.Generator().manual_seed(3), device="cpu")
    return drawn.argsort(1).float().to(device)


class UniteStep(Step):
    """The loss of UNITE, which has no parameters, on embeddings of the width of Qwen2-VL-2B.

    The batch has queries, positives and hard negatives with five modality codes.
    """

    def build(self, models: Any) -> Any:
        config = UNITEConfig.preset("paper", tokens=TOKENS)
        return type("Loss", (nn.Module,), {"config": config, "compare": models.UNITE.compare})()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(
            ("query", "candidate", "negative"), (self.batch, 24 if self.small else 1536)
        )

    def data(self) -> dict[str, Tensor]:
        return {"code": self.randint(1, 6, self.batch), "labels": torch.arange(self.batch)}

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Draw unit embeddings; all share a component, and each candidate is close to its query."""
        drawn = super().inputs(device)
        shared = 0.5 * drawn["query"][:1].clone()
        drawn["candidate"] = drawn["candidate"] + drawn["query"]
        return {name: F.normalize(x + shared, dim=-1) for name, x in drawn.items()}

    def loss(self, *rows: Tensor) -> Tensor:
        labels = (self.labels, self.labels, self.labels + self.batch)
        parts = [
            {"embedding": x, "code": self.code, "labels": ids}
            for x, ids in zip(rows, labels, strict=True)
        ]
        return self.model.compare(*parts).loss
