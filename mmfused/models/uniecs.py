"""UniECS: one encoder for images, texts and both, for retrieval from any to any (arXiv 2508.13843).

    V = L2(ViT(image) P_v) W_pv + b, T = L2(BERT(text) P_t) W_pt + b     per token; a missing
    modality is zeros before W A_v = MHA(V, T), A_t = MHA(T, V)
    each from the old V and T, pre-norm V' = g_v A_v + (1 - g_v) V, g_v = sigmoid([V ; A_v ; e_t] W
    + b)      e_t: is the text there; T' likewise x + gamma_1 MHA(LN x), then x + gamma_2 FFN(LN x)
    self-attention, gamma learnable scalars p = tanh(Linear(LN(mean of the tokens)))
    of V and of T f = L2(LN(blocks(Linear([p_v ; p_t]))))                               blocks over
    this one token v = Enc(V, 0), t = Enc(0, T), f = Enc(V, T)                           three
    embeddings, nine tasks

Losses of query 1 and candidate 2, S = s x_1 y_2^T, s = exp(log_scale): CMAL: alignment 1/2 [2 -
    cos(v_1, f_1) + 2 - cos(t_1, f_1)]; InfoNCE V2T (symmetric), V2F, T2F CLAL: PPM, PDC (hinges on
    S), PLC (agreement of S^mm, S^vm, S^tm on the ten nearest) IMCL: V2V = InfoNCE + L_hard; T2T L =
    sum_k omega_k L_k over these groups, omega_k = (g_k + eps)^-beta / sum, g_k = |dL_k / d
    embeddings|   (adaptive)

The paper's: the model above, d = 256, four times (cross, gate, self), ViT-B/16, three fusion
blocks, the three groups, margins, weights that fall with the gradient, beta = 0.5. From the public
code (qzp2018/UniECS): every formula and weight of a term, three gated layers and then two
self-attention blocks, patches of 32, texts of 64 rows without a mask, static weights (the mean of
all terms by weight), V2F and S^vm as f_1 -> v_2 (an older script, and preset "paper": v_1 -> f_2),
the indicator per batch. That flag is taken after a LayerNorm with a bias, so from the first step on
it is 1 for zeros too: "batch" is 1 for every item here. This library's choice: which term belongs
to which group, the form of the adaptive weights, an initial b of W that is not 0 (see
`_initialise`), padded text masked (`text_mask`; without it padded rows are zeros), the indicator
per item, `missing` = "constant" in every preset: an absent modality's tokens, equal ones, are
attended to, as in the code, and cost one key. A term that compares images (texts) leaves out items
that have none, only the hinges (PPM, PDC, PLC, L_hard) keep their embedding of an empty item and
know no labels, as in the code. Left out: two heads of the code whose outputs it discards. CLIP's
ViT differs from timm's by a norm before its blocks; take it by its name in timm for CLIP's weights.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfused.distributed import gather_rows, refused
from mmfused.losses import unit_rows
from mmfused.models.config import AbsentPart, ModelConfig
from mmfused.models.encoders import build_text, build_vit, freeze
from mmfused.models.inputs import read_image, read_text
from mmfused.models.retrieval import (
    VIEWS,
    RetrievalModel,
    RetrievalOutput,
    check_views,
    late_fusion,
)
from mmfused.models.uniecs_losses import (
    NAMES,
    TERMS,
    LossOptions,
    adaptive_loss,
    loss_terms,
    weighted_mean,
)
from mmfused.ops.gated_cross_attention import BidirectionalGatedCrossAttention, pack_passes

PASSES = {"image": "a", "text": "b", "both": "both"}
COMPONENTS = ("gate", "cross", "cmal", "clal", "imcl", "adaptive", "hard_negatives", "fusion")
CHOICES = {
    "placement": ("interleaved", "after"),
    "indicator": (True, False, "batch"),
    "missing": ("constant", "zero", "skip"),
    "v2f": ("v_to_f", "f_to_v"),
    "weighting": ("adaptive", "static"),
    "image_stem": ("conv", "conv_group", "patch"),
    "freeze": ("image", "text"),
    "without": COMPONENTS,
}


@dataclasses.dataclass
class UniECSConfig(ModelConfig):
    """Sizes and weights, by default "tiny" without encoders. Values that do not fit together raise
    ValueError.
    """

    dim: int = 128  # d
    num_heads: int = 4
    cross_layers: int = 2  # gated layers
    self_blocks: int = (
        1  # blocks of each modality after each gated layer, or after the last one alone
    )
    placement: str = "interleaved"  # "interleaved": (cross, gate, self) each time | "after": self-attention after all of them
    fusion_blocks: int = 1
    dropout: float = (
        0.0  # of attention probabilities, of what attention gives, inside the feed-forward part
    )
    indicator: bool | str = (
        True  # True: per item | False: the gate sees none | "batch": 1 for all, see above
    )
    missing: str = (
        "constant"  # of the gated layers, for an absent modality: "constant" | "zero" | "skip"
    )
    text_mask: bool = True  # False: padded rows of a text are attended to and averaged, as zeros
    text_length: int | None = None  # rows that a text is cut or padded to, None: as it comes
    temperature: float = 0.07  # of V2T, V2F, T2F
    temperature_v2v: float = 0.05
    temperature_t2t: float = 0.03
    initial_scale: float = 10.0  # s; log s is learnable and kept in [0, 3]
    margins: tuple[float, float, float, float] = (
        0.3,
        0.2,
        0.05,
        0.2,
    )  # of PPM, PDC, PLC (tolerance) and L_hard
    hard_fraction: float = 0.5  # of the batch, L_hard's negatives
    nearest: int = 10  # of PLC
    v2f: str = "v_to_f"  # V2F and S^vm compare v_1 with f_2, or "f_to_v": f_1 with v_2
    loss_weights: tuple[float, ...] = (
        0.5,
        1.0,
        1.0,
        0.2,
        0.8,
        0.5,
        0.5,
        2.0,
        1.0,
    )  # of the terms, as in NAMES
    weighting: str = "adaptive"  # "adaptive": of the groups, by their gradients | "static": the terms' mean by loss_weights
    beta: float = 0.5  # of the adaptive weights: 0 equal ones, 1 equal gradients
    epsilon: float = 1e-3  # beside the gradients' norms: keeps a group that is nearly done from taking all the weight
    image_dim: int = 128  # width of the image tokens
    text_dim: int = 128  # width of the text tokens
    image_stem: str = (
        "conv_group"  # "conv" | "conv_group" (encoders.ConvStem) | "patch", the ViT's own
    )
    pixel_mean: tuple[float, float, float] = (
        0.485,
        0.456,
        0.406,
    )  # how the pixel_values were normalised
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    image: dict | None = (
        None  # encoders.build_vit(image_dim, image_stem, image); None: no encoder, image_tokens only
    )
    text: dict | None = (
        None  # encoders.build_text(text_dim, text); None: no encoder, text_tokens only
    )
    freeze: tuple[str, ...] = ()  # encoders that stay as they are: "image", "text"
    # Left out: "gate" (V' = V + A_v), "cross" (no gated layers), "cmal", "clal", "imcl" (no such
    # losses), "adaptive" (static weights), "hard_negatives" (no L_hard), "fusion" (p_v and p_t of
    # the encoders' tokens, and between them for both).
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES)
        self.check_positive(
            "initial_scale", "epsilon", "temperature", "temperature_v2v", "temperature_t2t"
        )
        if self.dim % self.num_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, expected a divisor of dim={self.dim}"
            )
        if len(self.loss_weights) != len(NAMES) or min(self.loss_weights) <= 0:
            raise ValueError(
                f"loss_weights: got {self.loss_weights}, expected {len(NAMES)} numbers above 0"
            )
        if not self.text_mask and self.text_length is None:
            raise ValueError(
                "text_length: got None without text_mask, expected a number, or an item would depend on its batch"
            )
        if self.indicator == "batch" and self.missing != "constant":
            raise ValueError(
                f"missing: got {self.missing!r} with indicator 'batch', expected 'constant'"
            )
        if "adaptive" in self.without and self.weighting != "adaptive":
            raise AbsentPart(
                "without: got 'adaptive' with weighting 'static', which is not adaptive anyway, expected 'adaptive'"
            )
        if not set(TERMS) - set(self.without):
            raise ValueError(
                "without: got all of cmal, clal, imcl, which leaves no loss, expected at most two of them"
            )
        for name in self.freeze:
            if getattr(self, name) is None:
                raise ValueError(
                    f"freeze: got {name!r} with {name} None, expected a config with that encoder"
                )


FULL_SIZE = {
    "dim": 256,
    "num_heads": 8,
    "fusion_blocks": 3,
    "dropout": 0.1,
    "text_length": 64,
    "image_dim": 768,
    "text_dim": 768,
    "image_stem": "patch",
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),  # CLIP's
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
    "text": {"vocab_size": 21128},  # chinese-roberta-wwm-ext; the rest is BertConfig's default
}
VIT_B = {"img_size": 224, "depth": 12, "num_heads": 12}
UniECSConfig.PRESETS = {
    "paper": {**FULL_SIZE, "cross_layers": 4, "image": {**VIT_B, "patch_size": 16}},
    "code": {
        **FULL_SIZE,
        "cross_layers": 3,
        "self_blocks": 2,
        "placement": "after",
        "indicator": "batch",
        "text_mask": False,
        "v2f": "f_to_v",
        "weighting": "static",
        "image": {**VIT_B, "patch_size": 32},
    },
    "tiny": {
        "image": {"img_size": 64, "patch_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
        "text": {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 128,
            "attention_probs_dropout_prob": 0.0,
        },
    },
}


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward part, each with a learnable scalar before it is
    added.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4)
        )
        self.ffn = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        ignore: Tensor | None = None,
    ) -> Tensor:  # (B, N, D), (B, N) -> (B, N, D)
        normed = self.norm1(x)
        heads = (
            proj(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = None if ignore is None else ~ignore[:, None, None]
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=attend, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.gamma1 * self.drop(self.out_proj(out.transpose(1, 2).flatten(2)))
        return x + self.gamma2 * self.ffn(self.norm2(x))


class Stage(nn.Module):
    """One gated layer (none without "cross"), then self-attention blocks of each modality."""

    def __init__(self, config: UniECSConfig, blocks: int):
        super().__init__()
        c = config
        sizes = (c.dim, c.num_heads)
        gate = "none" if "gate" in c.without else "channel"
        indicator = False if gate == "none" else c.indicator
        options = {"gate": gate, "indicator": indicator, "missing": c.missing, "dropout": c.dropout}
        self.cross = (
            None if "cross" in c.without else BidirectionalGatedCrossAttention(*sizes, **options)
        )
        self.image_blocks = nn.ModuleList(Block(*sizes, c.dropout) for _ in range(blocks))
        self.text_blocks = nn.ModuleList(Block(*sizes, c.dropout) for _ in range(blocks))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        ignore: Tensor | None,
        **present: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if self.cross is not None:
            image, text = self.cross(image, text, b_key_padding_mask=ignore, **present)
        for image_block, text_block in zip(self.image_blocks, self.text_blocks, strict=True):
            image, text = image_block(image), text_block(text, ignore)
        return image, text


class Pool(nn.Module):
    """tanh(Linear(LN(mean of the tokens that count)))."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        ignore: Tensor | None = None,
    ) -> Tensor:  # (B, N, D), (B, N) -> (B, D)
        if ignore is None:
            mean = x.mean(1)
        else:
            mean = x.masked_fill(ignore[..., None], 0).sum(1) / (~ignore).sum(1, keepdim=True)
        return self.linear(self.norm(mean)).tanh()


class UniECS(RetrievalModel):
    """UniECS built from a `UniECSConfig`; encoders start from random weights (needs `pip install
    mmfused[models]`).
    """

    takes_negatives = False

    def __init__(self, config: UniECSConfig):
        super().__init__()
        self.config = c = config
        self.image_encoder = (
            None if c.image is None else build_vit(c.image_dim, c.image_stem, c.image)
        )
        self.text_encoder = None if c.text is None else build_text(c.text_dim, c.text)
        self.image_map, self.text_map = (
            nn.Linear(width, c.dim, bias=False) for width in (c.image_dim, c.text_dim)
        )
        self.image_proj, self.text_proj = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, c.dim)
        self.image_pool, self.text_pool = Pool(c.dim), Pool(c.dim)
        if "fusion" not in c.without:
            interleaved = c.placement == "interleaved"
            blocks = [
                c.self_blocks if interleaved or i == c.cross_layers - 1 else 0
                for i in range(c.cross_layers)
            ]
            self.stages = nn.ModuleList(Stage(c, count) for count in blocks)
            self.fusion_proj = nn.Linear(2 * c.dim, c.dim)
            self.fusion_blocks = nn.ModuleList(
                Block(c.dim, c.num_heads, c.dropout) for _ in range(c.fusion_blocks)
            )
            self.fusion_norm = nn.LayerNorm(c.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(c.initial_scale)))
        self._initialise()
        for name in c.freeze:
            freeze(getattr(self, f"{name}_encoder"))

    def _initialise(self) -> None:
        own = (part for name, part in self.named_children() if not name.endswith("encoder"))
        for module in chain.from_iterable(part.modules() for part in own):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.image_map, self.text_map):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.image_proj, self.text_proj):
            # What an absent modality is made of. With 0 (the code) its tokens would be zeros in all
            # layers, and each LayerNorm on the way back would multiply their gradient by eps**-0.5
            # = 316: inf after a few.
            nn.init.uniform_(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)

    def encode(self, role: str, *, labels: Tensor, **items) -> dict[str, Tensor]:
        """For each item its embeddings "image" (v), "text" (t), "both" (f), (B, D), has_image,
        has_text (B,) bool, and labels.

        ``items`` as in :meth:`embed`; labels (B,) int64. A query's and a candidate's are made
        alike."""
        tokens = self._tokens(**items)
        size = len(tokens[0])
        if labels.dtype != torch.int64 or labels.shape != (size,):
            raise ValueError(
                f"labels must be int64 ({size},), got {labels.dtype} {tuple(labels.shape)}"
            )
        return {
            **self._embeddings(tokens, VIEWS),
            "has_image": tokens[3],
            "has_text": tokens[4],
            "labels": labels,
        }

    def compare(
        self,
        query: dict,
        candidate: dict,
        negative: dict | None = None,
    ) -> RetrievalOutput:
        """All terms between queries and candidates of all ranks, each of which evaluates all of it,
        weights included.
        """
        if negative is not None:
            error = ValueError("negative must be None: UniECS has its negatives from the batch")
            raise refused("UniECS", error, query["both"])
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(0, 3)
        c = self.config
        pair = (query, candidate)
        rows = gather_rows(torch.stack([part[view] for part in pair for view in VIEWS], 1))
        if not len(rows):
            raise ValueError("query: got 0 rows on every rank, expected at least one in all")
        flags = ("labels", "has_image", "has_text")
        ids = gather_rows(torch.stack([part[name].long() for part in pair for name in flags], 1))
        options = LossOptions(*(getattr(c, name) for name in LossOptions._fields))
        if c.weighting == "static" or "adaptive" in c.without:
            terms = loss_terms(rows, self.log_scale, ids, options)
            return RetrievalOutput(weighted_mean(terms, options), terms)
        loss, values = adaptive_loss(rows, self.log_scale, ids, tuple(options))
        names = (name for group, names in TERMS.items() if group not in c.without for name in names)
        return RetrievalOutput(loss, dict(zip(names, values.unbind(), strict=True)))

    def embed(self, views: tuple[str, ...] = ("both",), **items) -> dict[str, Tensor]:
        """Unit embeddings (B, D) for each of the views "image" (the text hidden), "text" (the image
        hidden), "both".

        Args: pixel_values: (B, 3, S, S), or image_tokens: (B, N, image_dim) in their place.
            image_present: (B,) bool, None: all have an image. input_ids: (B, T) int64 with
            attention_mask (B, T), 1 = real token, None = all real; or in their place text_tokens:
                (B, T, text_dim) with text_padding_mask (B, T) bool, True = ignore.
            text_present: (B,) bool; None: a text is missing where no more than two of the ids are
            real, or no token is.

        Raises ValueError where a modality has no source or two, and for wrong shapes, ids and
        views."""
        check_views(views)
        return self._embeddings(self._tokens(**items), views)

    def _tokens(
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
    ):
        """Image (B, N, D) and text tokens (B, T, D) of unit length, zeros where there is none;
        padded ones (B, T); flags (B,).
        """
        c = self.config
        image, has_image = read_image(
            self.image_encoder, c.image_dim, pixel_values, image_tokens, image_present
        )
        source = (input_ids, attention_mask, text_tokens, text_padding_mask, text_present)
        text, padding, has_text = read_text(self.text_encoder, c.text_dim, *source)
        if len(image) != len(text):
            raise ValueError(
                f"image and text must have one batch size, got {len(image)} and {len(text)}"
            )
        if c.text_length is not None:
            more = c.text_length - text.shape[1]
            text, padding = F.pad(text, (0, 0, 0, more)), F.pad(padding, (0, more), value=True)
        has_text = has_text & ~padding.all(1)
        absent = ~has_image[:, None].expand(image.shape[:2])
        image, text = (
            unit_rows(linear(x.masked_fill(none[..., None], 0))).masked_fill(none[..., None], 0)
            for linear, x, none in (
                (self.image_map, image, absent),
                (self.text_map, text, padding | ~has_text[:, None]),
            )
        )
        return image, text, padding, has_image, has_text

    def _embeddings(self, tokens: tuple[Tensor, ...], views: tuple[str, ...]) -> dict[str, Tensor]:
        if "fusion" in self.config.without:
            return self._separate(*tokens, views)
        image, text, padding, has_image, has_text = tokens
        count = len(views)
        image, text, image_shown, text_shown = pack_passes(
            image, text, [PASSES[view] for view in views]
        )
        image_shown, text_shown = (
            image_shown & has_image.repeat(count),
            text_shown & has_text.repeat(count),
        )
        present = (
            {}
            if self.config.indicator == "batch"
            else {"a_present": image_shown, "b_present": text_shown}
        )
        # A text that is not there is read as its zero tokens, all of them.
        ignore = padding.repeat(count, 1) & text_shown[:, None] if self.config.text_mask else None
        image, text = self.image_proj(image), self.text_proj(text)
        for stage in self.stages:
            image, text = stage(image, text, ignore, **present)
        fused = self.fusion_proj(
            torch.cat([self.image_pool(image), self.text_pool(text, ignore)], 1)
        )[:, None]
        for block in self.fusion_blocks:
            fused = block(fused)
        return dict(zip(views, unit_rows(self.fusion_norm(fused[:, 0])).chunk(count), strict=True))

    def _separate(self, image, text, padding, has_image, has_text, views) -> dict[str, Tensor]:
        """Without the fusion: each modality pooled by itself, and late fusion of what an item has."""
        ignore = padding & has_text[:, None] if self.config.text_mask else None
        image, text = (
            unit_rows(self.image_pool(self.image_proj(image))),
            unit_rows(self.text_pool(self.text_proj(text), ignore)),
        )
        only_text, only_image = (has_text & ~has_image)[:, None], (has_image & ~has_text)[:, None]
        both = late_fusion(image.masked_fill(only_text, 0), text.masked_fill(only_image, 0))
        made = {"image": image, "text": text, "both": both}
        return {view: made[view] for view in views}
