"""UniCA: cross-attention in both directions before the text encoder reads picture and text together
(arXiv 2606.28350).

    V = LN(W ViT(image) + positions 1..N)                            N patch tokens, [CLS] dropped
    [CLS ; T] = LN(BERT's embeddings of the text), T at positions N+1 on, or from 1 on where there
    is no picture V^ = LN(V + Drop(MHA(q = V, k = v = T)))                         Bi-CA: both
    directions from the old states, T^ = LN(T + Drop(MHA(q = T, k = v = V)))
    [CLS] stays out X' = LN(X^ + Drop(FFN(X^)))                                      for either side
    e = L2(BERT layers([CLS ; V' ; T'])_CLS)                         one encoder for queries and
    candidates L = mean_i -log( exp(q_i.c_i / tau) / sum_j exp(q_i.c_j / tau) ) + lambda mean_i (1 -
    q_i.c_i)
        j over positives and hard negatives of all ranks, without those of q_i's own label; tau =
        0.02

The paper's, of which only abstract and figures' captions could be read, and which has no public
code: that a block of bi-directional cross-attention exchanges visual and textual tokens before they
are concatenated, and that a Positive Similarity Loss optimises the absolute proximity of query and
positive beside the contrastive one. No formula, size or weight is known. From VISTA's public code
(FlagOpen/FlagEmbedding), which the paper's baseline is by all signs: the host, that is patch tokens
projected into BERT's space with its positions and LayerNorm, the order [CLS ; image ; text], [CLS]
pooling, an image alone as [CLS] image [SEP] and a text alone as plain BERT reads it, InfoNCE in one
direction with tau = 0.02 and a group of one positive and hard negatives, the text tower frozen, 196
tokens of a ViT-B/16. VISTA's gather is "local": see MaskedInfoNCE. This library's choice
(inferred): all inside Bi-CA. Post-norm as in BERT and LXMERT, 12 heads, dropout 0.1, the
feed-forward part, one block, weights of the directions apart (`share_weights`: together, as
LXMERT), and the pre-norm form, whose output projections start at 0, so that VISTA's weights start
as they are. A sample that lacks either side passes Bi-CA unchanged. The positive similarity is 1 -
cos with lambda = 1. Also: a plain ViT in the place of EVA02-CLIP's, candidates of the query's label
left out, BERT for the host only (not XLM-R), gradients of all ranks ("global"), and preset "tiny".
`without` leaves components out; "fusion" compares with late fusion: the direction between the
embeddings of image and text."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfused.distributed import gather_rows, refused
from mmfused.library import no_autocast
from mmfused.losses import unit_rows
from mmfused.models.config import ModelConfig
from mmfused.models.encoders import build_text, build_vit, freeze
from mmfused.models.inputs import (
    check_flags,
    check_range,
    check_tokens,
    contain,
    encode_image,
    map_tokens,
    one_source,
)
from mmfused.models.retrieval import RetrievalModel, RetrievalOutput, check_views, late_fusion
from mmfused.ops.gated_cross_attention import BidirectionalGatedCrossAttention
from mmfused.ops.masked_info_nce import MaskedInfoNCE

COMPONENTS = ("bica", "ffn", "positive_similarity", "hard_negatives", "fusion")
CHOICES = {
    "bica_norm": ("post", "pre"),
    "gather": ("global", "local"),
    "image_stem": ("conv", "conv_group", "patch"),
    "freeze": ("image", "text"),
    "without": COMPONENTS,
}


@dataclasses.dataclass
class UniCAConfig(ModelConfig):
    """Sizes and weights, by default "tiny" without an image encoder. Values that do not fit
    together raise ValueError.
    """

    text: dict  # encoders.build_text(text_dim, text), a BERT: the host, so there is no model without it
    text_dim: int = 128  # D, width of the host, of Bi-CA and of the embeddings
    image_dim: int = 128  # width of the patch tokens
    image: dict | None = (
        None  # encoders.build_vit(image_dim, image_stem, image); None: no encoder, image_tokens only
    )
    image_stem: str = "conv_group"  # "conv" | "conv_group" (encoders.ConvStem) | "patch", the ViT's own patch projection
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
    empty_text: tuple[int, int] = (
        2,
        3,
    )  # the ids of [CLS] and [SEP], what an item without text reads
    blocks: int = 1  # of Bi-CA
    num_heads: int = 4  # in Bi-CA
    ffn: int | None = None  # hidden width of Bi-CA's feed-forward parts, None: 4 D
    dropout: float = 0.1  # in Bi-CA: of attention probabilities, and of what a block adds
    bica_norm: str = "post"  # "post" | "pre", which starts as the identity
    share_weights: bool = False  # one set of projections for both directions
    temperature: float = 0.02  # tau
    positive_weight: float = 1.0  # lambda
    gather: str = "global"  # "global" | "local" (MaskedInfoNCE): whether other ranks' candidates get gradients
    freeze: tuple[
        str, ...
    ] = ()  # of "image" and "text": encoders that stay as they are; gradients pass through them
    # Left out, each one alone or several: "bica" (VISTA with the positive similarity), "ffn"
    # (Bi-CA's feed-forward parts), "positive_similarity" (lambda = 0), "hard_negatives" (positives
    # of other queries are the only negatives), "fusion" (image and text are read one by one, an
    # item with both gets the direction between their embeddings).
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES)
        self.check_positive("temperature")
        if self.text_dim % self.num_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, expected a divisor of text_dim={self.text_dim}"
            )
        if not self.positive_weight >= 0:
            raise ValueError(
                f"positive_weight: got {self.positive_weight}, expected a number from 0"
            )
        if self.text.get("model_type", "bert") != "bert":
            raise ValueError(
                f"text.model_type: got {self.text['model_type']!r}, expected 'bert', the host"
            )
        if "image" in self.freeze and self.image is None:
            raise ValueError("freeze: got 'image' with image None, expected an image encoder")

    @staticmethod
    def of_tokenizer(tokenizer) -> dict:
        return {
            "vocab_size": len(tokenizer),
            "empty_text": (tokenizer.cls_token_id, tokenizer.sep_token_id),
        }


UniCAConfig.PRESETS = {
    # VISTA's second stage: ViT-B/16, 196 tokens, and bge-base (BERT-base; sizes that are not given
    # are BertConfig's).
    "paper": {
        "text": {"vocab_size": 30522},
        "text_dim": 768,
        "image_dim": 768,
        "image": {"img_size": 224, "patch_size": 16, "depth": 12, "num_heads": 12},
        "image_stem": "patch",
        "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
        "pixel_std": (0.26862954, 0.26130258, 0.27577711),
        "empty_text": (101, 102),
        "num_heads": 12,
        "freeze": ("text",),
    },
    "tiny": {
        "text": {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 128,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.1,  # measured: with BERT's 0.02 the loss stood at log B where this learns within 40 steps
        },
        "image": {"img_size": 64, "patch_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
        "ffn": 256,
    },
}


def start_at_zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


class FeedForward(nn.Module):
    """LN(x + Drop(FFN(x))); with ``pre_norm`` x + Drop(FFN(LN(x))), which starts as x."""

    def __init__(self, dim: int, hidden: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.norm, self.pre_norm = nn.LayerNorm(dim), pre_norm
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )
        if pre_norm:
            start_at_zero(self.layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x)) if self.pre_norm else self.norm(x + self.layers(x))


class BiCA(nn.Module):
    """One block: image (B, N, D) and text (B, M, D) read each other; ``both`` (B,) bool, the
    samples that have both.
    """

    def __init__(self, c: UniCAConfig):
        super().__init__()
        pre = c.bica_norm == "pre"
        options = {
            "gate": "none",
            "indicator": False,
            "missing": "skip",
            "pre_norm": pre,
            "dropout": c.dropout,
        }
        self.attention = BidirectionalGatedCrossAttention(
            c.text_dim, c.num_heads, share_weights=c.share_weights, **options
        )
        if pre:
            start_at_zero(self.attention.to_a.out_proj)
            start_at_zero(self.attention.to_b.out_proj)
        hidden = 4 * c.text_dim if c.ffn is None else c.ffn
        self.image_ffn, self.text_ffn = (
            None if "ffn" in c.without else FeedForward(c.text_dim, hidden, c.dropout, pre)
            for _ in range(2)
        )

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        ignore: Tensor,
        both: Tensor,
    ) -> tuple[Tensor, Tensor]:
        image, text = self.attention(
            image, text, b_key_padding_mask=ignore, a_present=both, b_present=both
        )
        if self.image_ffn is None:
            return image, text
        both = both[:, None, None]
        return torch.where(both, self.image_ffn(image), image), torch.where(
            both, self.text_ffn(text), text
        )


class Items(NamedTuple):
    """B items, ready to be read."""

    image: Tensor  # (B, N, D), V
    has_image: Tensor  # (B,) bool
    input_ids: Tensor  # (B, T) int64
    real: Tensor  # (B, T) bool, False = padding
    has_text: Tensor  # (B,) bool


class UniCA(RetrievalModel):
    """UniCA built from a `UniCAConfig`; encoders start from random weights (needs `pip install
    mmfused[models]`).

    The arguments of `encode` and `embed`: pixel_values: (B, 3, S, S) float, or image_tokens: (B, N,
        image_dim), patch tokens without [CLS], in their place. input_ids: (B, T) int64, [CLS]
        first, T from 2 to max_position_embeddings - N. attention_mask: (B, T), 1 = real token, None
        = all real; padding at the right. image_present, text_present: (B,) bool, False = this item
        has none. image_present None: all have one. text_present None:
            a text is missing where no more than two tokens are real ([CLS] and [SEP]).
    A missing or doubled source, and wrong shapes or ids, raise ValueError.
    """

    def __init__(self, config: UniCAConfig):
        super().__init__()
        self.config = c = config
        self.image_encoder = (
            None if c.image is None else build_vit(c.image_dim, c.image_stem, c.image)
        )
        self.visual_proj = nn.Linear(c.image_dim, c.text_dim)
        self.text_encoder = build_text(c.text_dim, c.text)
        vocabulary = self.text_encoder.config.vocab_size
        if max(c.empty_text) >= vocabulary:
            raise ValueError(
                f"empty_text must be ids below the host's vocab_size={vocabulary}, got {c.empty_text}"
            )
        blocks = 0 if {"bica", "fusion"} & set(c.without) else c.blocks
        self.bica = nn.ModuleList(BiCA(c) for _ in range(blocks))
        self.positive_weight = 0.0 if "positive_similarity" in c.without else c.positive_weight
        self.info_nce = MaskedInfoNCE(
            c.temperature,
            normalize=False,
            gather=c.gather,
            same_id="drop",
            positive_weight=self.positive_weight,
        )
        for name in c.freeze:
            freeze(getattr(self, f"{name}_encoder"))

    @property
    def picture_size(self) -> int:
        """Side of the pictures it takes; without an image encoder, of ones that cost little."""
        return 16 if self.image_encoder is None else super().picture_size

    def encode(self, role: str, *, labels: Tensor, **items) -> dict[str, Tensor]:
        """``{"embedding": (B, D), "labels": (B,)}``, the same for every role: queries and
        candidates share the encoder.
        """
        embedding = self.embed(**items)["both"]
        if labels.dtype != torch.int64 or labels.shape != embedding.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(embedding)},), got {labels.dtype} {tuple(labels.shape)}"
            )
        return {"embedding": embedding, "labels": labels}

    def compare(
        self,
        query: dict,
        candidate: dict,
        negative: dict | None = None,
    ) -> RetrievalOutput:
        """The loss, and its terms "info_nce" and "positive_similarity", which carry no gradient of
        their own.
        """
        q, positive = query["embedding"], candidate["embedding"]
        if len(q) != len(positive):
            error = ValueError(
                f"candidate must have a row for each of the {len(q)} queries, got {len(positive)}"
            )
            raise refused("UniCA", error, q)
        parts = (
            [candidate]
            if negative is None or "hard_negatives" in self.config.without
            else [candidate, negative]
        )
        c, labels = (torch.cat([part[name] for part in parts]) for name in ("embedding", "labels"))
        with no_autocast(q.device.type):  # in float32, which unit vectors deserve
            loss = self.info_nce(q, c, query_id=query["labels"], candidate_id=labels)
            apart = gather_rows(1 - (q * positive).sum(-1).detach()).mean()
        return RetrievalOutput(
            loss,
            {
                "info_nce": loss.detach() - self.positive_weight * apart,
                "positive_similarity": apart,
            },
        )

    def embed(self, views: tuple[str, ...] = ("both",), **items) -> dict[str, Tensor]:
        """Unit embeddings (B, D) in float32 (float64 for a model in float64) for each of ``views``:
        "image", "text", "both".
        """
        check_views(views)
        prepared = self._prepare(**items)
        shown = {"image": self._image_alone, "text": self._text_alone, "both": self._both}
        return {view: shown[view](prepared) for view in views}

    def _image_alone(self, x: Items) -> Tensor:
        return self._read(
            Items(
                x.image,
                x.has_image,
                x.input_ids[:, :2],
                x.real[:, :2],
                torch.zeros_like(x.has_text),
            )
        )

    def _text_alone(self, x: Items) -> Tensor:
        return self._read(Items(x.image[:, :0], torch.zeros_like(x.has_image), *x[2:]))

    def _both(self, x: Items) -> Tensor:
        if "fusion" not in self.config.without:
            return self._read(x)
        image = self._image_alone(x).masked_fill(~x.has_image[:, None], 0)
        return late_fusion(
            image, self._text_alone(x).masked_fill((x.has_image & ~x.has_text)[:, None], 0)
        )

    def _read(self, x: Items) -> Tensor:
        """Embeddings (B, D) of [CLS ; image ; text], of what is there."""
        image, ids, real = x.image, *self._or_empty(x.input_ids, x.real, x.has_text)
        slots = torch.arange(ids.shape[1], device=ids.device)
        behind = (
            image.shape[1] * x.has_image[:, None]
        )  # (B, 1): behind its picture, if any, a text begins
        ids, poison = contain(ids, self.text_encoder.config.vocab_size)
        text = self.text_encoder.embeddings(
            input_ids=ids, position_ids=slots + behind * (slots > 0)
        )
        text = text + poison[..., None].to(text.dtype)
        first, text = text[:, :1], text[:, 1:]
        if image.shape[1]:
            for block in self.bica:
                image, text = block(image, text, ~real[:, 1:], x.has_image & x.has_text)
        seen = torch.cat(
            (real[:, :1], x.has_image[:, None].expand(image.shape[:2]), real[:, 1:]), 1
        )
        return unit_rows(self._host(torch.cat((first, image, text), 1), seen.long())[:, 0])

    def _host(self, x: Tensor, seen: Tensor) -> Tensor:
        """BERT's layers alone: the embeddings have been through its LayerNorm already, and through
        Bi-CA.
        """
        from transformers.masking_utils import create_bidirectional_mask

        mask = create_bidirectional_mask(
            self.text_encoder.config, x, seen
        )  # in the form its attention takes
        return self.text_encoder.encoder(x, attention_mask=mask).last_hidden_state

    def _or_empty(self, ids: Tensor, real: Tensor, has_text: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS][SEP] in place of what is missing."""
        markers = (torch.full_like(ids[:, :1], marker) for marker in self.config.empty_text)
        empty = torch.cat((*markers, ids[:, 2:]), 1)
        there, first_two = has_text[:, None], torch.arange(ids.shape[1], device=ids.device) < 2
        return torch.where(there, ids, empty), torch.where(there, real, first_two)

    def _prepare(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        *,
        image_present=None,
        image_tokens=None,
        text_present=None,
    ) -> Items:
        source = one_source("pixel_values and image_tokens", pixel_values, image_tokens)
        check_flags("image_present", image_present, source.shape[:1])
        if image_tokens is None:
            image_tokens = encode_image(self.image_encoder, pixel_values, image_present)
            image_tokens = image_tokens[:, self.image_encoder.num_prefix_tokens :]
        check_tokens("image_tokens", image_tokens, self.config.image_dim)
        batch, count = image_tokens.shape[:2]
        self._check_text(input_ids, attention_mask, text_present, batch, count)
        if image_present is None:
            image_present = torch.ones(batch, dtype=torch.bool, device=image_tokens.device)
        image = map_tokens(
            self.visual_proj, image_tokens, ~image_present[:, None].expand(batch, count)
        )
        positions = torch.arange(1, count + 1, device=image.device)[None]
        image = self.text_encoder.embeddings(inputs_embeds=image, position_ids=positions)
        real = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask != 0
        )
        has_text = (
            real.sum(1) > 2 if text_present is None else text_present
        )  # two: [CLS] and [SEP] around no text
        return Items(image, image_present, input_ids, real, has_text)

    def _check_text(self, ids, attention_mask, present, batch, images) -> None:
        limit = self.text_encoder.config.max_position_embeddings - images
        if ids is None or ids.ndim != 2 or not 2 <= ids.shape[1] <= limit:
            got = None if ids is None else tuple(ids.shape)
            raise ValueError(
                f"input_ids must have shape (B, T), T from 2 to {limit} beside {images} image tokens, got {got}"
            )
        if len(ids) != batch:
            raise ValueError(f"image and text must have one batch size, got {batch} and {len(ids)}")
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, got {tuple(attention_mask.shape)}"
            )
        check_flags("text_present", present, ids.shape[:1])
        check_range("input_ids", ids, self.text_encoder.config.vocab_size)
