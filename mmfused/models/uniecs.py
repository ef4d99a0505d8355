"""UniECS: one encoder for images, texts and both, for retrieval from any to any (arXiv 2508.13843).

    V = L2(ViT(image) P_v) W_pv + b, T = L2(BERT(text) P_t) W_pt + b       for each token
    A_v = MHA(V, T), A_t = MHA(T, V)                                pre-norm
    V' = g_v A_v + (1 - g_v) V, g_v = sigmoid([V ; A_v ; e_t] W_g + b_g)   T' likewise
    x + gamma_1 MHA(LN x), then x + gamma_2 FFN(LN x)               self-attention: x is V' or T'
    p_v = tanh(Linear(LN(mean of the tokens of V')))                p_t likewise
    Enc(V, T) = L2(LN(blocks(Linear([p_v ; p_t]))))                 blocks over a single token
    v = Enc(V, 0), t = Enc(0, T), f = Enc(V, T)                     the embeddings of an item

e_t is 1 if the item has a text, else 0. The tokens of a missing modality are 0 before W_pv or W_pt.
The losses are in uniecs_losses.py. docs/models.md gives the source of each part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from mmfused.distributed import gather_rows, reported
from mmfused.losses import unit_rows
from mmfused.models import presets
from mmfused.models.config import ModelConfig, absent_part
from mmfused.models.encoders import Stem, build_text, build_vit, freeze
from mmfused.models.fields import Options
from mmfused.models.inputs import check_batch, check_labels, read_image, read_text
from mmfused.models.retrieval import (
    VIEWS,
    RetrievalModel,
    RetrievalOutput,
    View,
    check_views,
    late_fusion,
)
from mmfused.models.text_padding import check_padded_length, longest_text_of
from mmfused.models.uniecs_blocks import Block, Pool
from mmfused.models.uniecs_losses import (
    NAMES,
    TERMS,
    LossOptions,
    adaptive_loss,
    loss_terms,
    weighted_mean,
)
from mmfused.ops.gated_cross_attention import BidirectionalGatedCrossAttention, pack_passes

Component = Literal["gate", "cross", "cmal", "clal", "imcl", "adaptive", "hard_negatives", "fusion"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
PASSES: dict[View, Literal["a", "b", "both"]] = {"image": "a", "text": "b", "both": "both"}


@dataclasses.dataclass
class UniECSConfig(ModelConfig):
    """Configuration of UniECS; the default sizes are tiny, without encoders.

    Examples:
        >>> from mmfused.models import UniECSConfig
        >>> paper, code = UniECSConfig.preset("paper"), UniECSConfig.preset("code")
        >>> paper.cross_layers, code.cross_layers
        (4, 3)
        >>> tokens_only = UniECSConfig(dim=64, image_dim=768, text_dim=512)
        >>> tokens_only.picture_size is None  # no image encoder
        True
    """

    PRESETS: ClassVar[presets.Presets] = presets.UNIECS

    dim: int = 128  # d, width of the tokens after the encoders, and of the embeddings
    num_heads: int = 4  # heads of all attention after the encoders
    cross_layers: int = 2  # number of gated layers
    self_blocks: int = 1  # number of self-attention blocks of each modality at each place
    # Places of self-attention: "interleaved": after each gated layer | "after": after the last one.
    placement: Literal["interleaved", "after"] = "interleaved"
    fusion_blocks: int = 1  # number of blocks over the fused token
    # Dropout of attention probabilities and outputs, and inside the feed-forward parts.
    dropout: float = 0.0
    # e in the gate. True: 1 or 0 for each item | False: no e | "batch": always 1, as in the public
    # code.
    indicator: bool | Literal["batch"] = True
    # How the gated layers treat an absent modality, see BidirectionalGatedCrossAttention.
    missing: Literal["constant", "zero", "skip"] = "constant"
    text_mask: bool = True  # False: padded text tokens take part, see text_padding
    text_length: int | None = None  # texts are cut or padded to this length; None: unchanged
    # What padded text tokens are, if they take part: "zeros" | "encoded": the text encoder's tokens
    # of the PAD ids, as in the public code. The encoder itself masks PAD in both cases.
    text_padding: Literal["zeros", "encoded"] = "zeros"
    temperature: float = 0.07  # of V2T, V2F, T2F
    temperature_v2v: float = 0.05  # of V2V and L_hard
    temperature_t2t: float = 0.03  # of T2T
    initial_scale: float = 10.0  # initial s; log s is learned and clamped to [0, 3]
    margins: tuple[float, float, float, float] = (0.3, 0.2, 0.05, 0.2)  # PPM, PDC, PLC, L_hard
    hard_fraction: float = 0.5  # share of the batch that L_hard uses as negatives
    nearest: int = 10  # number of neighbours in PLC
    v2f: Literal["v_to_f", "f_to_v"] = "v_to_f"  # V2F and S^vm: v_1 with f_2, or f_1 with v_2
    loss_weights: tuple[float, ...] = (0.5, 1.0, 1.0, 0.2, 0.8, 0.5, 0.5, 2.0, 1.0)  # order: NAMES
    # "adaptive": a group with a larger gradient has a smaller weight | "static": loss_weights only.
    weighting: Literal["adaptive", "static"] = "adaptive"
    beta: float = 0.5  # 0: equal weights of the groups, 1: nearly equal weighted gradients
    # Added to the gradient norms, so that a small gradient does not give a group all the weight.
    epsilon: float = 1e-3
    image_dim: int = 128  # width of the image tokens
    text_dim: int = 128  # width of the text tokens
    image_stem: Stem = "conv_group"  # ViT's patch embedding: convolutions, or "patch" (linear)
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # normalisation of pixel_values
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["crop", "stretch", "shortest"] = "crop"  # see load_picture
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # of picture files
    image: Options | None = None  # arguments of timm's ViT (build_vit); None: takes image_tokens
    text: Options | None = None  # fields of a BertConfig (build_text); None: takes text_tokens
    freeze: tuple[Literal["image", "text"], ...] = ()  # encoders that are not trained
    # Ablations: "gate" (V' = V + A_v), "cross" (no gated layers), "cmal", "clal", "imcl" (without
    # this group of losses), "adaptive" (static weights), "hard_negatives" (no L_hard), "fusion" (v
    # is L2(p_v) of V, t is L2(p_t) of T, and f is the normalised sum of v and t).
    without: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        scalars = ("temperature", "temperature_v2v", "temperature_t2t")
        self.check_positive("initial_scale", "epsilon", *scalars)
        self.check_divisor("num_heads", "dim")
        if len(self.loss_weights) != len(NAMES) or min(self.loss_weights) <= 0:
            expected = f"{len(NAMES)} numbers above 0"
            raise ValueError(f"loss_weights: got {self.loss_weights}, expected {expected}")
        if not self.text_mask and self.text_length is None:
            expected = "a number, so that no item depends on its batch"
            raise ValueError(f"text_length: got None without text_mask, expected {expected}")
        if self.text_padding == "encoded":
            if self.text_mask:
                got = "'encoded' with text_mask, which leaves padded tokens out"
                raise ValueError(f"text_padding: got {got}, expected 'zeros'")
            if self.text is not None and self.text_length is not None:
                check_padded_length(self.text, self.text_length)
        if self.indicator == "batch" and self.missing != "constant":
            got = f"{self.missing!r} with indicator 'batch'"
            raise ValueError(f"missing: got {got}, expected 'constant'")
        if "adaptive" in self.without and self.weighting != "adaptive":
            raise absent_part("adaptive", "weighting 'static'", "weighting 'adaptive'")
        if not set(TERMS) - set(self.without):
            raise ValueError(
                "without: got all of cmal, clal, imcl, which leaves no loss, expected at most two"
            )
        self.check_frozen(self.freeze)


class Items(TypedDict, total=False):
    """Inputs of B items; each modality needs exactly one source."""

    pixel_values: Tensor | None  # (B, 3, S, S)
    image_tokens: Tensor | None  # (B, N, image_dim), instead of pixel_values
    image_present: Tensor | None  # (B,) bool, False = the item has no image; None = all have one
    input_ids: Tensor | None  # (B, T) int64
    attention_mask: Tensor | None  # (B, T), 1 = real token, None = all real
    text_tokens: Tensor | None  # (B, T, text_dim), instead of input_ids
    text_padding_mask: Tensor | None  # (B, T) bool, True = ignore; with text_tokens
    # (B,) bool. None: an item has a text if more than two of its input_ids are real. If text_tokens
    # are given, one real token is enough.
    text_present: Tensor | None


class Tokens(NamedTuple):
    """Tokens of unit length; absent tokens are zeros, and padded ones as well. D = dim.

    With text_padding "encoded", padded tokens are the text encoder's instead.
    """

    image: Tensor  # (B, N, D)
    text: Tensor  # (B, T, D)
    padding: Tensor  # (B, T) bool
    has_image: Tensor  # (B,) bool
    has_text: Tensor  # (B,) bool


class Stage(nn.Module):
    """One gated layer, if not ablated, then self-attention blocks of each modality."""

    def __init__(self, config: UniECSConfig, blocks: int) -> None:
        super().__init__()
        c = config
        gated = "gate" not in c.without
        self.cross: BidirectionalGatedCrossAttention | None = None
        if "cross" not in c.without:
            self.cross = BidirectionalGatedCrossAttention(
                c.dim,
                c.num_heads,
                gate="channel" if gated else "none",
                indicator=c.indicator if gated else False,
                missing=c.missing,
                dropout=c.dropout,
            )
        sizes = (c.dim, c.num_heads, c.dropout)
        self.image_blocks: nn.ModuleList = nn.ModuleList(Block(*sizes) for _ in range(blocks))
        self.text_blocks: nn.ModuleList = nn.ModuleList(Block(*sizes) for _ in range(blocks))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        ignore: Tensor | None,
        **present: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return image (B, N, D) and text (B, T, D); ``ignore`` (B, T) bool masks text tokens."""
        if self.cross is not None:
            image, text = self.cross(image, text, b_key_padding_mask=ignore, **present)
        for image_block, text_block in zip(self.image_blocks, self.text_blocks, strict=True):
            image, text = image_block(image), text_block(text, ignore)
        return image, text


class UniECS(RetrievalModel):
    """UniECS (arXiv 2508.13843): retrieval from any of image, text and both to any.

    Encoders have random weights and need `mmfused[models]`.

    Args:
        config: the sizes and options.

    Examples:
        >>> import torch
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> model = UniECS(UniECSConfig(dim=32, image_dim=24, text_dim=16))  # without encoders
        >>> items = {"image_tokens": torch.randn(4, 9, 24), "text_tokens": torch.randn(4, 6, 16)}
        >>> query = {**items, "labels": torch.tensor([7, 3, 8, 5])}
        >>> model(query, candidate=query).loss.backward()
        >>> embeddings = model.embed(["image", "both"], **items)
        >>> similarity = embeddings["image"] @ embeddings["both"].T  # cosines
        >>> similarity.shape
        torch.Size([4, 4])
    """

    takes_negatives = False

    def __init__(self, config: UniECSConfig) -> None:
        super().__init__()
        self.config = c = config
        image, text = c.image, c.text
        self.image_encoder: nn.Module | None = (
            None if image is None else build_vit(c.image_dim, c.image_stem, image)
        )
        self.text_encoder: nn.Module | None = None if text is None else build_text(c.text_dim, text)
        self.image_map: nn.Linear = nn.Linear(c.image_dim, c.dim, bias=False)
        self.text_map: nn.Linear = nn.Linear(c.text_dim, c.dim, bias=False)
        self.image_proj: nn.Linear = nn.Linear(c.dim, c.dim)
        self.text_proj: nn.Linear = nn.Linear(c.dim, c.dim)
        self.image_pool: Pool = Pool(c.dim)
        self.text_pool: Pool = Pool(c.dim)
        if "fusion" not in c.without:
            last = c.cross_layers - 1
            self.stages: nn.ModuleList = nn.ModuleList(
                Stage(c, c.self_blocks if c.placement == "interleaved" or i == last else 0)
                for i in range(c.cross_layers)
            )
            self.fusion_proj: nn.Linear = nn.Linear(2 * c.dim, c.dim)
            self.fusion_blocks: nn.ModuleList = nn.ModuleList(
                Block(c.dim, c.num_heads, c.dropout) for _ in range(c.fusion_blocks)
            )
            self.fusion_norm: nn.LayerNorm = nn.LayerNorm(c.dim)
        self.log_scale: nn.Parameter = nn.Parameter(torch.tensor(math.log(c.initial_scale)))
        self._initialise()
        for name in c.freeze:
            freeze(getattr(self, f"{name}_encoder"))

    def _initialise(self) -> None:
        parts = (part for name, part in self.named_children() if not name.endswith("encoder"))
        for module in chain.from_iterable(part.modules() for part in parts):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.image_map, self.text_map):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.image_proj, self.text_proj):
            # All tokens of an absent modality equal this bias. If the bias were 0, as in the public
            # code, LayerNorms of zeros would multiply gradients by eps**-0.5 = 316 in backward.
            nn.init.uniform_(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)

    @property
    def longest_text(self) -> int | None:
        """Largest number of tokens of a text; None without a text encoder.

        A longer text that is padded before the text encoder would lose its [SEP].
        """
        if self.text_encoder is None:
            return None
        padded = self.config.text_length if self.config.text_padding == "encoded" else None
        return padded or longest_text_of(self.text_encoder)

    def encode(
        self,
        role: str,
        *,
        labels: Tensor,
        **items: Unpack[Items],
    ) -> dict[str, Tensor]:
        """Return v, t, f (B, D) as "image", "text", "both"; has_image, has_text, labels (B,)."""
        tokens = self._tokens(**items)
        check_labels(labels, len(tokens.image))
        return {
            **self._embeddings(tokens, VIEWS),
            "has_image": tokens.has_image,
            "has_text": tokens.has_text,
            "labels": labels,
        }

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss over the rows of all ranks, and its terms; every rank has all values."""
        if negative is not None:
            error = ValueError("negative: got hard negatives, expected None")
            raise reported("UniECS", error, query["both"])
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(0, 3)
        c, pair = self.config, (query, candidate)
        rows = gather_rows(torch.stack([part[view] for part in pair for view in VIEWS], 1))
        if not len(rows):
            raise ValueError("query: got 0 rows on every rank, expected at least one in total")
        flags = ("labels", "has_image", "has_text")
        ids = gather_rows(torch.stack([part[name].long() for part in pair for name in flags], 1))
        options = LossOptions(*(getattr(c, name) for name in LossOptions._fields))
        if c.weighting == "static" or "adaptive" in c.without:
            terms = loss_terms(rows, self.log_scale, ids, options)
            return RetrievalOutput(weighted_mean(terms, options), terms)
        loss, values = adaptive_loss(rows, self.log_scale, ids, tuple(options))
        names = (name for group, terms in TERMS.items() if group not in c.without for name in terms)
        return RetrievalOutput(loss, dict(zip(names, values.unbind(), strict=True)))

    def embed(
        self,
        views: Sequence[View] = ("both",),
        **items: Unpack[Items],
    ) -> dict[str, Tensor]:
        """Return unit embeddings (B, D) of each view; "image" hides the text, "text" the image.

        Args:
            views: the views to embed, of "image", "text" and "both".
            items: pixel_values (B, 3, S, S) or image_tokens (B, N, image_dim), with image_present
                (B,) bool; input_ids (B, T) with attention_mask (B, T), or text_tokens (B, T,
                text_dim) with text_padding_mask (B, T) bool; and text_present (B,) bool.
        """
        check_views(views)
        return self._embeddings(self._tokens(**items), views)

    def _tokens(self, **items: Unpack[Items]) -> Tokens:
        c = self.config
        image, has_image, text, padding, has_text = self._read_inputs(**items)
        if c.text_length is not None:
            more = c.text_length - text.shape[1]
            text, padding = F.pad(text, (0, 0, 0, more)), F.pad(padding, (0, more), value=True)
        has_text = has_text & ~padding.all(1)
        no_image = ~has_image[:, None, None]
        absent = ~has_text[:, None].expand(padding.shape)
        no_text = (absent if c.text_padding == "encoded" else absent | padding)[..., None]
        image = unit_rows(self.image_map(image.masked_fill(no_image, 0))).masked_fill(no_image, 0)
        text = unit_rows(self.text_map(text.masked_fill(no_text, 0))).masked_fill(no_text, 0)
        return Tokens(image, text, padding, has_image, has_text)

    def _read_inputs(
        self,
        *,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        image_present: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_tokens: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        text_present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Check the inputs, and encode pixels and ids."""
        c = self.config
        image, has_image = read_image(
            self.image_encoder, c.image_dim, pixel_values, image_tokens, image_present
        )
        source = (input_ids, attention_mask, text_tokens, text_padding_mask, text_present)
        length = c.text_length if c.text_padding == "encoded" else None
        text, padding, has_text = read_text(self.text_encoder, c.text_dim, *source, length)
        check_batch(len(image), len(text))
        return image, has_image, text, padding, has_text

    def _embeddings(self, tokens: Tokens, views: Sequence[View]) -> dict[str, Tensor]:
        """Encode all views as one batch; modalities that a view does not show are absent."""
        if "fusion" in self.config.without:
            return self._separate(tokens, views)
        count = len(views)
        image, text, image_shown, text_shown = pack_passes(
            tokens.image, tokens.text, [PASSES[view] for view in views]
        )
        image_shown = image_shown & tokens.has_image.repeat(count)
        text_shown = text_shown & tokens.has_text.repeat(count)
        present = {"a_present": image_shown, "b_present": text_shown}
        if self.config.indicator == "batch":
            present = {}
        # In an absent text no token is ignored, and all tokens are zeros.
        padding = tokens.padding.repeat(count, 1) & text_shown[:, None]
        ignore = padding if self.config.text_mask else None
        image, text = self.image_proj(image), self.text_proj(text)
        for stage in self.stages:
            image, text = stage(image, text, ignore, **present)
        pooled = torch.cat([self.image_pool(image), self.text_pool(text, ignore)], 1)
        fused = self.fusion_proj(pooled)[:, None]
        for block in self.fusion_blocks:
            fused = block(fused)
        return dict(zip(views, unit_rows(self.fusion_norm(fused[:, 0])).chunk(count), strict=True))

    def _separate(self, tokens: Tokens, views: Sequence[View]) -> dict[str, Tensor]:
        """Return the embeddings with the ablation "fusion": separate pooling and late fusion."""
        has_image, has_text = tokens.has_image[:, None], tokens.has_text[:, None]
        ignore = tokens.padding & has_text if self.config.text_mask else None
        image = unit_rows(self.image_pool(self.image_proj(tokens.image)))
        text = unit_rows(self.text_pool(self.text_proj(tokens.text), ignore))
        shown_image = image.masked_fill(has_text & ~has_image, 0)
        shown_text = text.masked_fill(has_image & ~has_text, 0)
        embeddings = {"image": image, "text": text, "both": late_fusion(shown_image, shown_text)}
        return {view: embeddings[view] for view in views}
