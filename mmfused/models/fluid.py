"""FLUID: token distillation for multimodal product classification (arXiv 2508.07264).

    I = ViT(image), T = BERT(text)                                                (eqs 1, 2)
    I_n = Q-Transform(Q_1, I), T_n = Q-Transform(Q_2, T)       l tokens each      (eqs 3-6)
    F = a * I_n + (1 - a) * T_n, a = sigmoid(MLP([I_n ; T_n]))  a scalar a token  (section 4.4)
    F' = Q-bottleneck(Q_3, F)                                   2 tokens          (eqs 7, 8)
    N = sum over the top k of G_i(F') E_i(F')                                     (eq. 9)
    L = lambda_1 CE + lambda_2 contrastive + lambda_3 MoE       1/3 each          (eq. 10)

The paper's: all of the above, ViT-B/16 and multilingual BERT, l = 32, a gate with one hidden layer,
16 experts, k = 2, 191 classes, balance by GShard's form (it cites GShard and gives no formula).
From the public code (DucCuong12/Multimodel_CV_NLP), where the paper gives no formula: the post-norm
block around each attention with its feed-forward part, dropout of attention probabilities and of
what either adds, 8 heads, the router Linear-LN-ReLU-Dropout-Linear, softmax over all experts with
the top k renormalised, experts of two hidden layers with LN that give class logits, averaged over
the two tokens, the balance loss "mse" and the z loss (0.1 each), the symmetric contrastive loss at
temperature 0.07 on the mean query token. Preset "code" also takes its six blocks a Q-Transform, two
hidden layers in the gate, 8 experts, and attends to padded text. This library's choice: in every
other preset padded text is not attended to (`text_mask`), a missing image or text is masked as a
whole and left out of the contrastive loss, the linear router, the probability as the weight where
top_k is 1, precomputed tokens, the ViT's stem, small initial queries and preset "tiny". With one
modality there is no gate and no contrastive loss (the paper's Table 2). `without` leaves components
out (Table 3; what stands in their place is this library's choice, but for the [CLS] tokens, which
are the paper's)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfused.library import no_autocast
from mmfused.models.config import AbsentPart, ModelConfig
from mmfused.models.encoders import build_text, build_vit
from mmfused.models.inputs import check_range, contain, map_tokens, read_image, read_text
from mmfused.ops.gated_cross_attention import TokenGate
from mmfused.ops.grouped_mlp import grouped_linear
from mmfused.ops.masked_info_nce import masked_info_nce
from mmfused.ops.query_pooling import QTransform
from mmfused.ops.topk_routing import Routing, topk_routing

MODALITIES, BALANCES, ROUTERS = ("both", "image", "text"), ("mse", "gshard"), ("mlp", "linear")
STEMS = ("conv", "conv_group", "patch")
COMPONENTS = ("contrastive", "q_transform", "gate", "bottleneck", "moe")
CHOICES = {
    "modalities": MODALITIES,
    "balance": BALANCES,
    "router": ROUTERS,
    "image_stem": STEMS,
    "without": COMPONENTS,
}


@dataclasses.dataclass
class FLUIDConfig(ModelConfig):
    """Sizes and weights, by default "tiny" without encoders. Values that do not fit together raise
    ValueError.
    """

    UNKNOWN: ClassVar[dict] = {"num_classes": 1}

    num_classes: int
    modalities: str = "both"  # "both" | "image" | "text"
    dim: int = 128  # D
    num_queries: int = 8  # l
    bottleneck_queries: int = 2
    depth: int = 1  # blocks in each Q-Transform and in the Q-bottleneck
    num_heads: int = 4
    ffn: int | None = (
        None  # hidden width of a block's feed-forward part, None: QTransform's default
    )
    dropout: float = 0.1  # in the Q-Transforms and the Q-bottleneck: of attention probabilities, and of what a block adds
    head_dropout: float = 0.1  # in the gate, the router and the experts
    query_std: float = 0.02  # of the initial queries; the public code's 1 drowns what they read, so it learns slowly
    gate_hidden: tuple[int, ...] = (128,)
    router: str = "mlp"  # "mlp" | "linear"
    num_experts: int = 4  # E
    top_k: int = 2
    expert_hidden: tuple[
        int, ...
    ] = ()  # the public code has two layers; linear experts learn faster from few samples
    balance: str = "mse"  # "mse" | "gshard"
    balance_weight: float = 0.1
    z_weight: float = 0.1
    temperature: float = 0.07
    loss_weights: tuple[float, float, float] = (
        1 / 3,
        1 / 3,
        1 / 3,
    )  # cross-entropy, contrastive, MoE
    text_mask: bool = True  # False: padded text tokens are attended to
    image_dim: int = 128  # width of the image tokens
    text_dim: int = 128  # width of the text tokens
    image_stem: str = "conv"  # "conv" | "conv_group" (encoders.ConvStem) | "patch", the ViT's own linear patch projection
    pixel_mean: tuple[float, float, float] = (
        0.485,
        0.456,
        0.406,
    )  # how the pixel_values were normalised: training and
    pixel_std: tuple[float, float, float] = (
        0.229,
        0.224,
        0.225,
    )  # evaluation prepare their batches so
    image: dict | None = (
        None  # encoders.build_vit(image_dim, image_stem, image); None: no encoder, image_tokens only
    )
    text: dict | None = (
        None  # encoders.build_text(text_dim, text); None: no encoder, text_tokens only
    )
    # Left out, each one alone or several: "contrastive" (no such term), "q_transform" (the
    # encoders' first tokens [CLS] in place of the l query tokens), "gate" (a = 1/2), "bottleneck"
    # (the l fused tokens are classified, their logits averaged), "moe" (one expert for every token,
    # no router).
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES)
        self.check_positive("temperature")
        if self.dim % self.num_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, expected a divisor of dim={self.dim}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: got {self.top_k}, expected at most num_experts={self.num_experts}"
            )
        for name in self.without:
            if name in ("contrastive", "gate") and self.modalities != "both":
                raise AbsentPart(
                    f"without: got {name!r} with modalities {self.modalities!r}, which has none anyway, expected 'both'"
                )

    @classmethod
    def preset(cls, name="tiny", *, num_classes=None, **options):
        """As `ModelConfig.preset`; "paper" and "code" have 191 classes unless `num_classes` says
        otherwise, "tiny" needs it.
        """
        if num_classes is not None:
            options["num_classes"] = num_classes
        elif name == "tiny":
            raise ValueError(
                f"num_classes: got None with preset {name!r}, expected a number of classes"
            )
        return super().preset(name, **options)


TINY_BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
}
FULL_SIZE = {
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
    "image": {"img_size": 224, "patch_size": 16, "depth": 12, "num_heads": 12},  # ViT-B/16
    "text": {
        "vocab_size": 119547
    },  # bert-base-multilingual-cased; the rest is BertConfig's default
}
FLUIDConfig.PRESETS = {
    "paper": {
        **FULL_SIZE,
        "depth": 1,
        "gate_hidden": (768,),
        "num_experts": 16,
        "balance": "gshard",
    },
    "code": {
        **FULL_SIZE,
        "depth": 6,
        "gate_hidden": (768, 768),
        "num_experts": 8,
        "balance": "mse",
        "text_mask": False,
        "query_std": 1.0,
    },
    "tiny": {
        "image": {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
        "text": {**TINY_BERT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0},
        # On a thousand photos the augmentation regularises enough, and one linear map an expert
        # learns fastest.
        "dropout": 0.0,
        "head_dropout": 0.0,
        "expert_hidden": (),
    },
}


class FLUIDOutput(NamedTuple):
    """What FLUID.forward returns; B samples, C classes, l query tokens, R bottleneck tokens, D =
    dim.
    """

    logits: Tensor  # (B, C)
    loss: Tensor | None  # scalar, the weighted sum; None without labels
    losses: dict[str, Tensor]  # "ce", "contrastive", "moe", each unweighted; empty without labels
    routing: (
        tuple[Tensor, Tensor] | None
    )  # expert indices (B, R, k) int64, weights (B, R, k), largest first; None without "moe"
    gate: Tensor | None  # (B, l), the image's share; None without a gate
    image_embedding: Tensor | None  # (B, D), unit length: the normalised mean of the query tokens
    text_embedding: Tensor | None  # (B, D)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class FirstToken(nn.Module):
    """In the place of a Q-Transform: the encoder's first token, [CLS], as the only query token; 0
    where it is ignored.
    """

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:  # (B, N, D) -> (B, 1, D)
        return x[:, :1] if ignore is None else x[:, :1].masked_fill(ignore[:, :1, None], 0)


class ExpertLinear(nn.Module):
    """A Linear layer for each of E experts, with `norm` each followed by a LayerNorm of its own."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, norm: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, outputs))
        self.norm_weight = nn.Parameter(torch.empty(num_experts, outputs)) if norm else None
        self.norm_bias = nn.Parameter(torch.empty(num_experts, outputs)) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform within one over the square root of the inputs, biases 0, norms 1 and 0."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        expert: Tensor,
        first: bool,
        last: bool,
    ) -> Tensor:
        """The `first` layer takes tokens (T, I), the `last` gives tokens (T, O); between them are
        rows (T*k, O) by expert.
        """
        x = grouped_linear(x, routing, self.weight, self.bias, gather=first, combine=last)
        if self.norm_weight is None:
            return x
        with no_autocast(x.device.type):
            # A product with one-hot rows picks each row's scale and shift; its gradient is summed
            # in a fixed order.
            scale, shift = (expert.to(p.dtype) @ p for p in (self.norm_weight, self.norm_bias))
        return F.layer_norm(x, x.shape[-1:]) * scale + shift


class MoEClassifier(nn.Module):
    """Router and experts (eq. 9): sum over the top k of G_i(x) E_i(x), each expert an MLP that
    gives class logits.
    """

    def __init__(self, config: FLUIDConfig):
        super().__init__()
        c, dim, drop = config, config.dim, config.head_dropout
        self.top_k, self.balance = c.top_k, c.balance
        output = nn.Linear(dim, c.num_experts)
        hidden = [nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Dropout(drop)]
        self.router = nn.Sequential(*hidden, output) if c.router == "mlp" else output
        widths = (dim, *c.expert_hidden)
        layers = [
            ExpertLinear(c.num_experts, *pair, norm=True) for pair in itertools.pairwise(widths)
        ]
        self.experts = nn.ModuleList(
            [*layers, ExpertLinear(c.num_experts, widths[-1], c.num_classes)]
        )
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:  # (B, R, D) -> (B, C)
        tokens = x.flatten(0, 1)  # (T, D), T = B*R
        routing = topk_routing(
            at_least_float32(self.router(tokens)), self.top_k, balance=self.balance
        )
        expert = F.one_hot(
            routing.indices.flatten()[routing.order], len(self.experts[0].weight)
        )  # (T*k, E)
        out, end = tokens, len(self.experts) - 1
        for i, layer in enumerate(self.experts):
            out = layer(
                out if i == 0 else self.drop(F.relu(out)),
                routing,
                expert,
                first=i == 0,
                last=i == end,
            )
        return at_least_float32(out).view(*x.shape[:2], -1).mean(1), routing


class DenseClassifier(nn.Sequential):
    """What is left without the mixture: one expert for every token, (B, R, D) -> (B, C), logits
    averaged over the tokens.
    """

    def __init__(self, config: FLUIDConfig):
        layers, widths = [], (config.dim, *config.expert_hidden)
        for inputs, outputs in itertools.pairwise(widths):
            layers += [
                nn.Linear(inputs, outputs),
                nn.LayerNorm(outputs),
                nn.ReLU(),
                nn.Dropout(config.head_dropout),
            ]
        super().__init__(*layers, nn.Linear(widths[-1], config.num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return at_least_float32(super().forward(x)).mean(1)


def contrastive_loss(image: Tensor, text: Tensor, pair: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE on unit embeddings (B, D); `pair` (B,) bool: samples with both modalities.

    A sample without a pair is nobody's negative and adds nothing to the mean; fewer than two pairs
    give 0."""
    key = torch.arange(1, len(pair) + 1, device=pair.device).masked_fill(
        pair, 0
    )  # without a pair: a key of its own
    masks = {"query_key": key, "candidate_key": key, "row_weight": pair.to(image.dtype)}
    with no_autocast(image.device.type):  # in float32, which unit vectors deserve
        return masked_info_nce(image, text, temperature=temperature, symmetric=True, **masks)


class FLUID(nn.Module):
    """FLUID built from a `FLUIDConfig`; encoders start from random weights (needs `pip install
    mmfused[models]`).
    """

    def __init__(self, config: FLUIDConfig):
        super().__init__()
        self.config = c = config
        self.uses_image, self.uses_text = c.modalities != "text", c.modalities != "image"
        blocks = {"depth": c.depth, "num_heads": c.num_heads, "ffn": c.ffn, "dropout": c.dropout}
        pooled = "q_transform" not in c.without
        if self.uses_image:
            self.image_encoder = (
                None if c.image is None else build_vit(c.image_dim, c.image_stem, c.image)
            )
            self.image_map = (
                nn.Identity() if c.image_dim == c.dim else nn.Linear(c.image_dim, c.dim)
            )
            self.image_transform = (
                QTransform(c.dim, c.num_queries, **blocks) if pooled else FirstToken()
            )
        if self.uses_text:
            self.text_encoder = None if c.text is None else build_text(c.text_dim, c.text)
            self.text_map = nn.Identity() if c.text_dim == c.dim else nn.Linear(c.text_dim, c.dim)
            self.text_transform = (
                QTransform(c.dim, c.num_queries, **blocks) if pooled else FirstToken()
            )
        if c.modalities == "both" and "gate" not in c.without:
            self.gate = TokenGate(c.dim, c.gate_hidden, c.head_dropout)
        self.bottleneck = (
            nn.Identity()
            if "bottleneck" in c.without
            else QTransform(c.dim, c.bottleneck_queries, **blocks)
        )
        if "moe" in c.without:
            self.classifier = DenseClassifier(c)
        else:
            self.moe = MoEClassifier(c)
        for module in self.modules():
            if isinstance(module, QTransform):
                nn.init.normal_(module.queries, std=c.query_std)

    @property
    def picture_size(self) -> int:
        """Side of the pictures it takes; without an image encoder, of ones that cost little."""
        return (
            self.image_encoder.patch_embed.img_size[0]
            if self.uses_image and self.image_encoder is not None
            else 16
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_present: Tensor | None = None,
        text_tokens: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> FLUIDOutput:
        """Class logits, and the losses when `labels` are given.

        Args: pixel_values: (B, 3, H, W), or image_tokens: (B, N, image_dim) in their place.
            input_ids: (B, T) int64 with attention_mask (B, T), 1 = real token, None = all real; or
            in their place
                text_tokens: (B, T, text_dim) with text_padding_mask (B, T) bool, True = ignore,
                None = none ignored.
            image_present, text_present: (B,) bool, False = this sample has none; its tokens are
                masked as a whole, and it is left out of the contrastive loss. image_present None:
                all have one. text_present None: a text is missing where `input_ids` hold no more
                than two real tokens ([CLS] and [SEP]), or no text token is real.
            labels: (B,) int64 in [0, num_classes).

        The inputs of a modality that the model does not have are ignored. Raises ValueError where a
        modality has no source or two, and for wrong shapes, ids and labels."""
        c = self.config
        image = text = gate = image_embedding = text_embedding = None
        if self.uses_image:
            tokens, has_image = read_image(
                self.image_encoder, c.image_dim, pixel_values, image_tokens, image_present
            )
            ignore = None if image_present is None else ~has_image[:, None].expand(tokens.shape[:2])
            image = self.image_transform(
                map_tokens(self.image_map, tokens, ignore), ignore
            )  # (B, l, D)
            image_embedding = F.normalize(at_least_float32(image).mean(1), dim=-1)  # (B, D)
        if self.uses_text:
            source = (input_ids, attention_mask, text_tokens, text_padding_mask)
            tokens, padding, text_present = read_text(
                self.text_encoder, c.text_dim, *source, text_present
            )
            absent = ~text_present[:, None].expand(padding.shape)
            ignore = absent | padding if c.text_mask else absent
            text = self.text_transform(
                map_tokens(self.text_map, tokens, ignore), ignore
            )  # (B, l, D)
            text_embedding = F.normalize(at_least_float32(text).mean(1), dim=-1)  # (B, D)
        if c.modalities == "both":
            if len(image) != len(text):
                raise ValueError(
                    f"image and text must have one batch size, got {len(image)} and {len(text)}"
                )
            fused, gate = (
                ((image + text) / 2, None) if "gate" in c.without else self._blend(image, text)
            )  # (B, l, D), (B, l)
        else:
            fused = image if text is None else text
        fused = self.bottleneck(fused)  # (B, R, D)
        if "moe" in c.without:
            logits, routing, moe_loss = self.classifier(fused), None, fused.new_zeros(())
        else:
            logits, routing = self.moe(fused)  # (B, C)
            moe_loss = c.balance_weight * routing.balance_loss + c.z_weight * routing.z_loss
            routing = tuple(
                x.view(len(logits), -1, c.top_k) for x in (routing.indices, routing.weights)
            )  # (B, R, k) each
        if labels is None:
            return FLUIDOutput(logits, None, {}, routing, gate, image_embedding, text_embedding)
        if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(logits)},), got {labels.dtype} {tuple(labels.shape)}"
            )
        check_range("labels", labels, c.num_classes)
        labels, poison = contain(labels, c.num_classes)
        losses = {
            "ce": F.cross_entropy(logits + poison[:, None].to(logits.dtype), labels),
            "contrastive": logits.new_zeros(()),
            "moe": moe_loss,
        }
        if c.modalities == "both" and "contrastive" not in c.without:
            flags = [flag for flag in (image_present, text_present) if flag is not None]
            pair = torch.stack([torch.ones_like(labels, dtype=torch.bool), *flags]).all(0)  # (B,)
            losses["contrastive"] = contrastive_loss(
                image_embedding, text_embedding, pair, c.temperature
            )
        loss = sum(
            weight * value for weight, value in zip(c.loss_weights, losses.values(), strict=True)
        )
        return FLUIDOutput(logits, loss, losses, routing, gate, image_embedding, text_embedding)

    def _blend(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        a = self.gate.share(image, text)  # (B, l)
        return a[..., None] * image + (1 - a[..., None]) * text, a
