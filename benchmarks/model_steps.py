"""The cases of models.py: each of the five models as a module from tokens to the loss.

The encoders are left out, because all providers use the same encoders. The inputs are the encoders'
outputs, and the gradients of the inputs are computed too. There is no dropout, so that the results
of providers can be compared.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mmfused.models import FLUIDConfig, UniECSConfig

from .hosted_model_steps import Moon2Step, UnicaStep, UniteStep
from .model_step import Step


class FluidStep(Step):
    """FLUID without its encoders: two Q-Transforms, gate, Q-bottleneck, 16 experts, three losses.

    The number of classes is a multiple of 8, as grouped_mm requires.
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
        """Draw inputs for which the choice of experts does not depend on rounding.

        A first draw sets the router's bias so that the mean logits of all experts are equal. Then
        each sample is the best of 16 draws. The margin of a draw is the smallest difference between
        successive logits of the top_k + 1 largest; the draw with the largest margin is the best.
        """
        generator, outputs = torch.Generator(device).manual_seed(2), []
        router = self.model.moe.router
        hook = router.register_forward_hook(lambda module, args, out: outputs.append(out))
        best = best_margin = None
        for trial in range(17):
            drawn = {name: self.draw(shape, generator) for name, shape in self.shapes().items()}
            self(*(x.to(router[-1].bias.dtype) for x in drawn.values()))
            logits = outputs.pop()
            if trial == 0:
                router[-1].bias -= logits.mean(0)
                continue
            top = logits.topk(self.model.config.top_k + 1).values
            # The order among the chosen experts matters too: the balance loss uses the first one.
            margin = (top[:, :-1] - top[:, 1:]).view(self.batch, -1).amin(1)
            if best is None:
                best, best_margin = drawn, margin
            better = (margin > best_margin)[:, None, None]
            best = {name: torch.where(better, drawn[name], x) for name, x in best.items()}
            best_margin = torch.maximum(best_margin, margin)
        hook.remove()
        return best

    @staticmethod
    def draw(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Draw tokens and add a random vector per sample, so that the means of samples differ."""
        batch, _, dim = shape
        x, common = (
            torch.randn(size, generator=generator, device=generator.device)
            for size in (shape, (batch, 1, dim))
        )
        return x + common


class UniecsStep(Step):
    """UniECS without its encoders: queries and candidates, all losses, adaptive weights.

    A fifth of the items lacks an image, and another fifth lacks a text. The loss uses all negatives
    of a row, because a selection of negatives could depend on rounding.
    """

    def build(self, models: Any) -> Any:
        all_negatives = {"nearest": 2**20, "hard_fraction": 1.0}
        sizes = {"dim": 32, "image_dim": 24, "text_dim": 24, "text_length": 8}
        paper = UniECSConfig.preset("paper", image=None, text=None, dropout=0.0, **all_negatives)
        model = models.UniECS(UniECSConfig(**sizes, **all_negatives) if self.small else paper)
        self.change_weights(model)
        return model

    @staticmethod
    @torch.no_grad()
    def change_weights(model: Any) -> None:
        """Change initial weights with which rounding errors would dominate some gradients.

        * Biases: with 0, a missing image or text gives zeros in all layers. A LayerNorm of zeros
          multiplies gradients by about 300, so the product over many LayerNorms overflows float32.
        * Scales gamma1 and gamma2: with larger ones, the tokens become almost equal, and the
          gradients of queries and keys are only rounding errors.
        """
        for linear in (model.image_proj, model.text_proj):
            linear.weight.mul_(linear.in_features**0.5)
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


STEPS = {
    "fluid": FluidStep,
    "uniecs": UniecsStep,
    "unica": UnicaStep,
    "moon2": Moon2Step,
    "unite": UniteStep,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with ``B`` samples, pairs or triplets.

    ``small``: use a small model, for a CPU. Its times do not predict the times of the real model.
    ``headline``: compile with autotuning; False for all models, because it would take too long.
    """

    name: str
    B: int
    small: bool = False
    headline: bool = False


CASES = (
    Case("fluid", 256),
    Case("uniecs", 128),
    Case("unica", 64),
    Case("moon2", 32),
    Case("unite", 4096),
)
HOSTED = ("unica", "moon2")  # these models need the package transformers


def cases(device_type: str, quick: bool) -> list[Case]:
    """Return the cases for a device, without ``HOSTED`` if transformers is not installed.

    ``quick``: use smaller batches.
    """
    available = [
        case
        for case in CASES
        if case.name not in HOSTED or importlib.util.find_spec("transformers")
    ]
    if device_type == "cuda":
        limits = {"unite": 512}
        return [
            dataclasses.replace(case, B=min(case.B, limits.get(case.name, 16))) if quick else case
            for case in available
        ]
    return [
        Case(case.name, 64 if case.name == "unite" else 6 if quick else 32, small=True)
        for case in available
    ]


def custom(shape: dict[str, int]) -> Case:
    raise ValueError(
        f"models: shape: got {shape}, expected no shape (the sizes are fixed; use --case)"
    )
