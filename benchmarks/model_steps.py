"""The five models, each as one module from given tokens to the loss, with its sizes and data.

`models.py` times them. Encoders are left out, as they are the same for all providers: their tokens
are the inputs, and the gradients of the tokens are computed too. There is no dropout, so that
providers can be compared. In 16 bits a step runs as the library trains: float32 parameters under
autocast.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.models import FLUIDConfig, MOON2Config, UniCAConfig, UniECSConfig, UNITEConfig
from mmfused.models.presets import QWEN2_VL_2B
from mmfused.models.qwen import KINDS

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
    "initializer_range": 0.2,  # with the usual 0.02 narrow layers would do almost nothing
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
# The vision tower is built and then removed, as picture tokens are given.
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
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Step(nn.Module, ABC):
    """A model and a batch; ``forward`` maps the tokens of `inputs`, in their order, to the loss.

    Args:
        models: the library's models, or `torch_modules.models()`.
        batch: samples.
        small: sizes for a CPU.
        device: of the model and the batch.
        dtype: of the inputs.
    """

    def __init__(
        self,
        models: Any,
        batch: int,
        small: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.batch, self.small = batch, small
        wide = torch.promote_types(dtype, torch.float32)
        with torch.device(device):
            self.model = self.build(models).to(wide)
        self.autocast = {"device_type": device.type, "dtype": dtype} if dtype != wide else None
        self.generator = torch.Generator().manual_seed(1)
        for name, tensor in self.data().items():
            self.register_buffer(name, tensor.to(device))

    def forward(self, *inputs: Tensor) -> Tensor:
        with nullcontext() if self.autocast is None else torch.autocast(**self.autocast):
            return self.loss(*inputs)

    @abstractmethod
    def build(self, models: Any) -> nn.Module:
        """Build the model, of the library or of `torch_modules`."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs, by name."""

    def data(self) -> dict[str, Tensor]:
        """Return what is the same in every call: labels, masks and ids, made on the CPU."""
        return {}

    @abstractmethod
    def loss(self, *inputs: Tensor) -> Tensor:
        """Return the loss of the inputs, in the order of `shapes`."""

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Draw tokens in float32."""
        generator = torch.Generator(device).manual_seed(2)
        return {
            name: torch.randn(shape, generator=generator, device=device)
            for name, shape in self.shapes().items()
        }

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def padding(self, length: int) -> Tensor:
        """(B, length) bool, True behind the texts, which fill at least a quarter of the length."""
        return torch.arange(length) >= self.randint(length // 4, length + 1, self.batch, 1)


class FluidStep(Step):
    """Head of FLUID: two Q-Transforms, gate, Q-bottleneck, 16 experts, three losses.

    192 classes, as grouped_mm needs multiples of eight.
    """

    def build(self, models: Any) -> Any:
        options = {"dropout": 0.0, "head_dropout": 0.0, "query_std": 0.3}
        if not self.small:
            return models.FLUID(
                FLUIDConfig.preset("paper", num_classes=192, image=None, text=None, **options)
            )
        sizes = {
            "dim": 32,
            "image_dim": 32,
            "text_dim": 32,
            "gate_hidden": (32,),
            "expert_hidden": (48, 32),
        }
        return models.FLUID(
            FLUIDConfig(num_classes=16, num_queries=4, balance="gshard", **sizes, **options)
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        images, texts, dim = (9, 6, 32) if self.small else (197, 128, 768)
        return {"image": (self.batch, images, dim), "text": (self.batch, texts, dim)}

    def data(self) -> dict[str, Tensor]:
        return {
            "labels": self.randint(0, self.model.config.num_classes, self.batch),
            "ignore": self.padding(self.shapes()["text"][1]),
        }

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return self.model(
            image_tokens=image, text_tokens=text, text_padding_mask=self.ignore, labels=self.labels
        ).loss

    @torch.no_grad()
    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return each sample's clearest of 16 draws, so that no rounding selects other experts.

        Before that, the router's bias is set so that the experts are equally likely, as after
        training.
        """
        generator, seen = torch.Generator(device).manual_seed(2), []
        router = self.model.moe.router
        hook = router.register_forward_hook(lambda module, args, out: seen.append(out))
        best = margin = None
        for trial in range(17):
            drawn = {name: self.draw(shape, generator) for name, shape in self.shapes().items()}
            self(*(x.to(router[-1].bias.dtype) for x in drawn.values()))
            logits = seen.pop()
            if trial == 0:
                router[-1].bias -= logits.mean(0)
                continue
            top = logits.topk(self.model.config.top_k + 1).values
            # Differences of all neighbours, because the balance loss depends on the first expert.
            clear = (top[:, :-1] - top[:, 1:]).view(self.batch, -1).amin(1)
            if best is None:
                best, margin = drawn, clear
            better = (clear > margin)[:, None, None]
            best = {name: torch.where(better, drawn[name], x) for name, x in best.items()}
            margin = torch.maximum(margin, clear)
        hook.remove()
        return best

    @staticmethod
    def draw(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Draw tokens with a common part for each sample, so that the samples' means differ."""
        batch, _, dim = shape
        x, common = (
            torch.randn(size, generator=generator, device=generator.device)
            for size in (shape, (batch, 1, dim))
        )
        return x + common


class UniecsStep(Step):
    """UniECS of queries and candidates: three embeddings each, all losses, adaptive weights.

    One item in five lacks a picture, and another one in five a text. Some initial weights are
    changed, so that rounding does not decide the results:
    * biases: without them a view of an absent modality would be zeros in all layers. Each norm of
      zeros multiplies gradients by 300, and a dozen of them exceed float32;
    * scales, so that tokens stay distinct up to the last layer: with attention over equal tokens,
      the gradients of queries and keys are nothing but rounding errors.
    All negatives of a row count as near and hard, because otherwise rounding would select the
    hardest of equal ones.
    """

    def build(self, models: Any) -> Any:
        every = {"nearest": 2**20, "hard_fraction": 1.0}
        sizes = {"dim": 32, "image_dim": 24, "text_dim": 24, "text_length": 8}
        paper = UniECSConfig.preset("paper", image=None, text=None, dropout=0.0, **every)
        model = models.UniECS(UniECSConfig(**sizes, **every) if self.small else paper)
        self.settle(model)
        return model

    @staticmethod
    @torch.no_grad()
    def settle(model: Any) -> None:
        for linear in (model.image_proj, model.text_proj):
            linear.weight.mul_(linear.in_features**0.5)  # from unit length to unit variance
            linear.bias.normal_(std=0.3)
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma1", "gamma2")):
                parameter.fill_(0.2)
            elif name.endswith("gate_proj.bias"):
                parameter.fill_(-2.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        images, texts, dim = (9, 8, 24) if self.small else (197, 64, 768)
        sizes = {"image": (self.batch, images, dim), "text": (self.batch, texts, dim)}
        return {
            f"{role}_{name}": size
            for role in ("query", "candidate")
            for name, size in sizes.items()
        }

    def data(self) -> dict[str, Tensor]:
        kind = {
            "query": torch.arange(self.batch) % 5,
            "candidate": torch.arange(2, self.batch + 2) % 5,
        }
        found = {f"{role}_ignore": self.padding(self.shapes()["query_text"][1]) for role in kind}
        return (
            found
            | {f"{role}_kind": kinds for role, kinds in kind.items()}
            | {"labels": torch.arange(self.batch)}
        )

    def loss(self, *tokens: Tensor) -> Tensor:
        parts = {}
        for role, image, text in (("query", *tokens[:2]), ("candidate", *tokens[2:])):
            kind = getattr(self, f"{role}_kind")
            flags = {"image_present": kind != 1, "text_present": kind != 3}
            masks = {"text_padding_mask": getattr(self, f"{role}_ignore"), "labels": self.labels}
            parts[role] = {"image_tokens": image, "text_tokens": text, **flags, **masks}
        return self.model(**parts).loss


class UnicaStep(Step):
    """UniCA's Bi-CA in its host model, with the width of BERT-base and 2 layers.

    Queries, positives and hard negatives. Some items lack a picture or a text.
    """

    def build(self, models: Any) -> Any:
        if not self.small:
            text = {"num_hidden_layers": 2, **QUIET}
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
        text = {**bert, "max_position_embeddings": 32, "initializer_range": 0.1, **QUIET}
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
            real[2::5, 2:] = False  # no text: [CLS] and [SEP] alone
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
    """MOON2.0 on a Qwen2-VL of the 2B model's width, 2 layers, 8 experts; triplets in three views.

    The experts' hidden width is 2048. The first E channels of a token say how much each expert
    suits it. The routers read little else, and the layers do not change them, so that no rounding
    selects another expert.
    """

    def build(self, models: Any) -> Any:
        language, experts = (SMALL_LANGUAGE, 4) if self.small else (LANGUAGE, 8)
        host = {"text_config": language, "vision_config": TOWER}
        config = MOON2Config(
            host=host, tokens=TOKENS, image_size=56 if self.small else 224, num_experts=experts
        )
        model = models.MOON2(config)
        model.host.visual = nn.Identity()  # picture tokens are given
        self.settle(model)
        return model

    @staticmethod
    @torch.no_grad()
    def settle(model: Any) -> None:
        words, experts = model.host.language_model.embed_tokens.weight, model.config.num_experts
        words.normal_()
        words[:, :experts] = liking(len(words), experts, words.device)
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
            x[..., :experts] = liking(x[..., 0].numel(), experts, device).view(
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


def liking(count: int, experts: int, device: torch.device) -> Tensor:
    """(count, experts): the numbers 0 to experts - 1 in random order."""
    drawn = torch.rand(count, experts, generator=torch.Generator().manual_seed(3), device="cpu")
    return drawn.argsort(1).float().to(device)


class UniteStep(Step):
    """UNITE's loss, without parameters, at Qwen2-VL-2B's width.

    Queries, positives and as many hard negatives, with five codes.
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
        """Return unit rows with a common mean, pairs half aligned, as in training."""
        drawn = super().inputs(device)
        cone = 0.5 * drawn["query"][:1].clone()
        drawn["candidate"] = drawn["candidate"] + drawn["query"]
        return {name: F.normalize(x + cone, dim=-1) for name, x in drawn.items()}

    def loss(self, *rows: Tensor) -> Tensor:
        labels = (self.labels, self.labels, self.labels + self.batch)
        parts = [
            {"embedding": x, "code": self.code, "labels": ids}
            for x, ids in zip(rows, labels, strict=True)
        ]
        return self.model.compare(*parts).loss


STEPS = {
    "fluid": FluidStep,
    "uniecs": UniecsStep,
    "unica": UnicaStep,
    "moon2": Moon2Step,
    "unite": UniteStep,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """``B`` samples, pairs or triplets of the named model.

    ``small``: widths for a CPU, which say nothing about speed.
    """

    name: str
    B: int
    small: bool = False
    # No case is compiled with autotuning: a model has many matrix products, and a run only minutes.
    headline: bool = False


CASES = (
    Case("fluid", 256),
    Case("uniecs", 128),
    Case("unica", 64),
    Case("moon2", 32),
    Case("unite", 4096),
)
HOSTED = ("unica", "moon2")


def cases(device_type: str, quick: bool) -> list[Case]:
    """Return the cases for a device.

    A ``quick`` run has at most 16 samples (512 of UNITE's) on CUDA, and 6 (64) on a CPU. Without
    the package transformers, models hosted in its models are left out.
    """
    known = [
        case
        for case in CASES
        if case.name not in HOSTED or importlib.util.find_spec("transformers")
    ]
    if device_type == "cuda":
        limits = {"unite": 512}
        return [
            dataclasses.replace(case, B=min(case.B, limits.get(case.name, 16))) if quick else case
            for case in known
        ]
    return [
        Case(case.name, 64 if case.name == "unite" else 6 if quick else 32, small=True)
        for case in known
    ]


def custom(shape: dict[str, int]) -> Case:
    raise ValueError(
        f"models: shape: got {shape}, expected none: sizes are the papers', --case selects a model"
    )
