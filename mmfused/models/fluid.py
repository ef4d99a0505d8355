"""FLUID: token distillation for multimodal product classification (arXiv 2508.07264).

    I = ViT(image), T = BERT(text)                                                (eqs 1, 2)
    I_n = Q-Transform(Q_1, I), T_n = Q-Transform(Q_2, T)        l tokens each     (eqs 3-6)
    F = a * I_n + (1 - a) * T_n, a = sigmoid(MLP([I_n ; T_n]))  one a per token   (section 4.4)
    F' = Q-bottleneck(Q_3, F)                                   2 tokens          (eqs 7, 8)
    N = sum over the top k of G_i(F') E_i(F')                                     (eq. 9)
    L = lambda_1 CE + lambda_2 contrastive + lambda_3 MoE       1/3 each          (eq. 10)

Q_1, Q_2 and Q_3 are learned queries. E_i are the experts, G_i their router weights and N the class
logits. docs/models.md gives the source of each part.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from mmfused.library import no_autocast
from mmfused.models import inputs, presets
from mmfused.models.config import ModelConfig, absent_part
from mmfused.models.encoders import Stem, build_text, build_vit
from mmfused.models.fields import Options
from mmfused.models.fluid_experts import DenseClassifier, MoEClassifier, at_least_float32
from mmfused.models.text_padding import check_padded_length, longest_text_of
from mmfused.ops.gated_cross_attention import TokenGate
from mmfused.ops.masked_info_nce import masked_info_nce
from mmfused.ops.query_pooling import QTransform

Component = Literal["contrastive", "q_transform", "gate", "bottleneck", "moe"]
COMPONENTS: tuple[Component, ...] = get_args(Component)


@dataclasses.dataclass
class FLUIDConfig(ModelConfig):
    """Configuration of FLUID; the default sizes are tiny, without encoders.

    Examples:
        >>> from mmfused.models import FLUIDConfig
        >>> paper = FLUIDConfig.preset("paper")
        >>> paper.dim, paper.num_experts, paper.top_k, paper.picture_size
        (768, 16, 2, 224)
        >>> ours = FLUIDConfig.preset("paper", num_classes=10, num_experts=8, without=("gate",))
        >>> FLUIDConfig(num_classes=10, num_experts=4, top_k=5)
        Traceback (most recent call last):
            ...
        ValueError: top_k: got 5, expected at most num_experts=4
    """

    PRESETS: ClassVar[presets.Presets] = presets.FLUID
    UNKNOWN: ClassVar[dict[str, Any]] = {"num_classes": 1}  # placeholder, see ModelConfig

    num_classes: int  # C, number of classes
    modalities: Literal["both", "image", "text"] = "both"  # what the model sees
    dim: int = 128  # D, width of the tokens after the encoders
    num_queries: int = 8  # l, tokens of each modality after its Q-Transform
    bottleneck_queries: int = 2  # R, tokens after the Q-bottleneck
    depth: int = 1  # blocks in each Q-Transform and in the Q-bottleneck
    num_heads: int = 4  # heads of the attention in these blocks
    ffn: int | None = None  # hidden width of a block's feed-forward part, None: 4 D
    # Dropout of attention probabilities and block outputs in Q-Transforms and Q-bottleneck.
    dropout: float = 0.1
    head_dropout: float = 0.1  # dropout in the gate, the router and the experts
    # Standard deviation of the initial queries. The public code uses 1, which slows learning.
    query_std: float = 0.02
    gate_hidden: tuple[int, ...] = (128,)  # hidden widths of the gate
    router: Literal["mlp", "linear"] = "mlp"  # form of the router
    num_experts: int = 4  # E, number of experts
    top_k: int = 2  # k, experts of a token
    # Widths of the experts' hidden layers. By default the experts are linear, and learn faster from
    # few samples than with the two hidden layers of the public code.
    expert_hidden: tuple[int, ...] = ()
    balance: Literal["mse", "gshard"] = "mse"  # form of the balance loss, see topk_routing
    balance_weight: float = 0.1  # of the balance loss in the MoE loss
    z_weight: float = 0.1  # of the router's z loss in the MoE loss
    temperature: float = 0.07  # of the contrastive loss
    # Weights of cross-entropy, contrastive loss and MoE loss.
    loss_weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    text_mask: bool = True  # whether padded text tokens are masked
    # Texts are padded to this number of tokens before the text encoder, so that no sample depends
    # on its batch although padded tokens take part. None: texts are as long as the batch's longest.
    text_length: int | None = None
    image_dim: int = 128  # width of the image tokens
    text_dim: int = 128  # width of the text tokens
    image_stem: Stem = "conv"  # ViT's patch embedding: convolutions, or "patch" (linear)
    # Normalisation of pixel_values, which training and evaluation apply to their batches.
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["crop", "stretch", "shortest"] = "crop"  # see load_picture
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # of picture files
    image: Options | None = None  # arguments of timm's ViT (build_vit); None: takes image_tokens
    text: Options | None = None  # fields of a BertConfig (build_text); None: takes text_tokens
    # Ablations, alone or together: "contrastive" (no contrastive loss), "q_transform" (an encoder's
    # [CLS] token replaces the l query tokens), "gate" (a = 1/2), "bottleneck" (the l fused tokens
    # are classified, and the logits averaged), "moe" (one expert for all tokens, no router).
    without: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")
        if not self.query_std >= 0:
            raise ValueError(f"query_std: got {self.query_std}, expected a number of at least 0")
        self.check_divisor("num_heads", "dim")
        self.check_at_most("top_k", "num_experts")
        if self.text_length is not None:
            if self.text_mask:
                got = f"{self.text_length} with text_mask, which leaves padded tokens out"
                raise ValueError(f"text_length: got {got}, expected None")
            if self.text is not None:
                check_padded_length(self.text, self.text_length)
        for name in self.without:
            if name in ("contrastive", "gate") and self.modalities != "both":
                raise absent_part(name, f"modalities {self.modalities!r}", "modalities 'both'")

    @classmethod
    def preset(
        cls,
        name: str = "tiny",
        *,
        num_classes: int | None = None,
        **options: Any,
    ) -> Self:
        """Extend :meth:`ModelConfig.preset`: "tiny" needs `num_classes`; other presets have 191."""
        if num_classes is not None:
            options["num_classes"] = num_classes
        elif name == "tiny":
            raise ValueError(
                f"num_classes: got None with preset {name!r}, expected a number of classes"
            )
        return super().preset(name, **options)


class FLUIDOutput(NamedTuple):
    """Result of FLUID.forward: B samples, C classes, l query tokens, R bottleneck tokens.

    Examples:
        >>> import torch
        >>> from mmfused.models import FLUID, FLUIDConfig
        >>> model = FLUID(FLUIDConfig(num_classes=5))
        >>> output = model(image_tokens=torch.randn(2, 9, 128), text_tokens=torch.randn(2, 6, 128))
        >>> output.gate.shape, output.loss  # 8 query tokens; no labels, no loss
        (torch.Size([2, 8]), None)
    """

    logits: Tensor  # (B, C)
    loss: Tensor | None  # scalar, the weighted sum; None without labels
    # "ce", "contrastive" and "moe", not multiplied by loss_weights; empty without labels.
    losses: dict[str, Tensor]
    # Expert indices (B, R, k) int64 and weights (B, R, k), largest first; None without a router.
    routing: tuple[Tensor, Tensor] | None
    gate: Tensor | None  # (B, l): a, the share of the image; None without a gate
    image_embedding: Tensor | None  # (B, D), unit length: the normalised mean of the query tokens
    text_embedding: Tensor | None  # (B, D)


def _mean_direction(tokens: Tensor) -> Tensor:  # (B, l, D) -> (B, D)
    return F.normalize(at_least_float32(tokens).mean(1), dim=-1)


class FirstToken(nn.Module):
    """Ablation of a Q-Transform: select the encoder's [CLS] token."""

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        """Return the first token (B, 1, D) of x (B, N, D); 0 if ``ignore`` (B, N) marks it."""
        return x[:, :1] if ignore is None else x[:, :1].masked_fill(ignore[:, :1, None], 0)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    paired: Tensor,
    temperature: float,
) -> Tensor:
    """Return the symmetric InfoNCE of unit embeddings (B, D).

    ``paired`` (B,) bool marks the samples with both modalities. Other samples are not negatives and
    do not count in the mean. With fewer than two paired samples the loss is 0.
    """
    # Each unpaired sample gets a unique key, so that it is not a negative of any other sample.
    rows = torch.arange(1, len(paired) + 1, device=paired.device)
    key = rows.masked_fill(paired, 0)
    with no_autocast(image.device.type):  # unit vectors need float32
        return masked_info_nce(
            image,
            text,
            temperature=temperature,
            symmetric=True,
            query_key=key,
            candidate_key=key,
            row_weight=paired.to(image.dtype),
        )


class FLUID(nn.Module):
    """FLUID (arXiv 2508.07264): classifies products by picture and text.

    Encoders have random weights and need `mmfused[models]`.

    Args:
        config: the sizes and options.

    Examples:
        >>> import torch
        >>> from mmfused.models import FLUID, FLUIDConfig
        >>> model = FLUID(FLUIDConfig.preset("tiny", num_classes=5, vocab_size=500))
        >>> pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(5, 500, (2, 7))
        >>> output = model(pixels, ids, labels=torch.tensor([0, 4]))
        >>> output.loss.backward()
        >>> output.logits.shape, list(output.losses)
        (torch.Size([2, 5]), ['ce', 'contrastive', 'moe'])
    """

    def __init__(self, config: FLUIDConfig) -> None:
        super().__init__()
        self.config = c = config
        self.uses_image: bool = c.modalities != "text"
        self.uses_text: bool = c.modalities != "image"

        def pool(queries: int) -> QTransform:
            return QTransform(
                c.dim, queries, depth=c.depth, num_heads=c.num_heads, ffn=c.ffn, dropout=c.dropout
            )

        def width_map(width: int) -> nn.Module:
            return nn.Identity() if width == c.dim else nn.Linear(width, c.dim)

        pooled = "q_transform" not in c.without
        if self.uses_image:
            self.image_encoder: nn.Module | None = (
                None if c.image is None else build_vit(c.image_dim, c.image_stem, c.image)
            )
            self.image_map: nn.Module = width_map(c.image_dim)
            self.image_transform: nn.Module = pool(c.num_queries) if pooled else FirstToken()
        if self.uses_text:
            self.text_encoder: nn.Module | None = (
                None if c.text is None else build_text(c.text_dim, c.text)
            )
            self.text_map: nn.Module = width_map(c.text_dim)
            self.text_transform: nn.Module = pool(c.num_queries) if pooled else FirstToken()
        if c.modalities == "both" and "gate" not in c.without:
            self.gate: TokenGate = TokenGate(c.dim, c.gate_hidden, c.head_dropout)
        no_bottleneck = "bottleneck" in c.without
        self.bottleneck: nn.Module = nn.Identity() if no_bottleneck else pool(c.bottleneck_queries)
        if "moe" in c.without:
            self.classifier: DenseClassifier = DenseClassifier(c)
        else:
            self.moe: MoEClassifier = MoEClassifier(c)
        for module in self.modules():
            if isinstance(module, QTransform):
                nn.init.normal_(module.queries, std=c.query_std)

    @property
    def longest_text(self) -> int | None:
        """Largest number of tokens of a text; None without a text encoder."""
        if not self.uses_text or self.text_encoder is None:
            return None
        return self.config.text_length or longest_text_of(self.text_encoder)

    @property
    def picture_size(self) -> int:
        """Side of the input pictures in pixels; 16 without an image encoder."""
        encoder: Any = self.image_encoder if self.uses_image else None
        return 16 if encoder is None else encoder.patch_embed.img_size[0]

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
        """Return class logits, and the losses when `labels` are given.

        Inputs of a modality that the model lacks are ignored.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids: (B, T) int64; T is at most the config's text_length if it is not None.
            attention_mask: (B, T), 1 = real token; None = all real. Only with input_ids.
            image_present: (B,) bool, False = the sample has no image; None = all have an image.
                Samples without an image or without a text are left out of the contrastive loss.
            image_tokens: (B, N, image_dim), in place of pixel_values.
            text_present: (B,) bool, False = the sample has no text. None: a sample has a text if
                more than two of its input_ids are real, because [CLS] and [SEP] are two. If
                text_tokens are given, one real token is enough.
            text_tokens: (B, T, text_dim), in place of input_ids; T is the config's text_length if
                it is not None.
            text_padding_mask: (B, T) bool, True = ignore; None = all real. Only with text_tokens.
            labels: (B,) int64 in [0, num_classes).
        """
        c = self.config
        image = text = image_embedding = text_embedding = None
        if self.uses_image:
            tokens, has_image = inputs.read_image(
                self.image_encoder, c.image_dim, pixel_values, image_tokens, image_present
            )
            ignore = None if image_present is None else ~has_image[:, None].expand(tokens.shape[:2])
            image = self.image_transform(inputs.map_tokens(self.image_map, tokens, ignore), ignore)
            image_embedding = _mean_direction(image)  # (B, l, D) -> (B, D)
        if self.uses_text:
            self._check_text_length(input_ids, text_tokens)
            source = (input_ids, attention_mask, text_tokens, text_padding_mask, text_present)
            tokens, padding, text_present = inputs.read_text(
                self.text_encoder, c.text_dim, *source, c.text_length
            )
            absent = ~text_present[:, None].expand(padding.shape)
            ignore = absent | padding if c.text_mask else absent
            text = self.text_transform(inputs.map_tokens(self.text_map, tokens, ignore), ignore)
            text_embedding = _mean_direction(text)
        fused, gate = self._fuse(image, text)  # (B, l, D), (B, l)
        logits, routing, moe_loss = self._classify(self.bottleneck(fused))  # (B, R, D) -> (B, C)
        output = FLUIDOutput(logits, None, {}, routing, gate, image_embedding, text_embedding)
        if labels is None:
            return output
        losses = self._losses(output, labels, moe_loss, image_present, text_present)
        loss = sum(w * value for w, value in zip(c.loss_weights, losses.values(), strict=True))
        assert isinstance(loss, Tensor)
        # In torch 2.11 a compiled function cannot return the result of output._replace.
        parts = (routing, gate, image_embedding, text_embedding)
        return FLUIDOutput(logits, loss, losses, *parts)

    def _check_text_length(self, ids: Tensor | None, tokens: Tensor | None) -> None:
        """Require texts that can be padded to the config's text_length, if it has one."""
        length = self.config.text_length
        if length is None:
            return
        if tokens is not None and tokens.shape[1:2] != (length,):
            got = f"shape {tuple(tokens.shape)}"
            raise ValueError(f"text_tokens: got {got}, expected text_length={length} tokens")
        if ids is not None and (ids.ndim != 2 or ids.shape[1] > length):
            expected = f"(batch, at most text_length={length} tokens)"
            raise ValueError(f"input_ids: got shape {tuple(ids.shape)}, expected {expected}")

    def _fuse(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the fused tokens (B, l, D), and the gate a (B, l), None without a gate."""
        if image is None or text is None:
            return inputs.one_source("image and text", image, text), None
        inputs.check_batch(len(image), len(text))
        if "gate" in self.config.without:
            return (image + text) / 2, None
        a = self.gate.share(image, text)  # (B, l)
        return a[..., None] * image + (1 - a[..., None]) * text, a

    def _classify(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor]:
        """Return the logits of x (B, R, D), the routing as in FLUIDOutput, and the MoE loss."""
        c = self.config
        if "moe" in c.without:
            return self.classifier(x), None, x.new_zeros(())
        logits, routing = self.moe(x)
        loss = c.balance_weight * routing.balance_loss + c.z_weight * routing.z_loss
        shape = (len(logits), -1, c.top_k)
        return logits, (routing.indices.view(shape), routing.weights.view(shape)), loss

    def _losses(
        self,
        output: FLUIDOutput,
        labels: Tensor,
        moe_loss: Tensor,
        *present_masks: Tensor | None,
    ) -> dict[str, Tensor]:
        c, logits = self.config, output.logits
        inputs.check_labels(labels, len(logits))
        inputs.check_range("labels", labels, c.num_classes)
        labels, poison = inputs.clamp_indices(labels, c.num_classes)
        contrastive = logits.new_zeros(())
        image, text = output.image_embedding, output.text_embedding
        if image is not None and text is not None and "contrastive" not in c.without:
            paired = torch.ones_like(labels, dtype=torch.bool)
            for present in present_masks:
                paired = paired if present is None else paired & present
            contrastive = contrastive_loss(image, text, paired, c.temperature)
        ce = F.cross_entropy(logits + poison[:, None].to(logits.dtype), labels)
        return {"ce": ce, "contrastive": contrastive, "moe": moe_loss}
