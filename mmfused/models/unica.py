"""UniCA: cross-attention between picture and text before a joint encoder (arXiv 2606.28350).

    V = LN(W ViT(image) + positions 1..N)                  N patch tokens, without [CLS]
    [CLS ; T] = LN(the host's embeddings of the text)      T starts at position N + 1; without a
                                                           picture, the host's own positions
    V^ = LN(V + Drop(MHA(queries V, keys and values T)))   Bi-CA: cross-attention in both
    T^ = LN(T + Drop(MHA(queries T, keys and values V)))   directions, without [CLS]
    X' = LN(X^ + Drop(FFN(X^)))                            X is V or T
    e = L2(host's layers([CLS ; V' ; T'])_CLS)             one encoder for queries and candidates
    L = mean_i -log( exp(q_i.c_i / tau) / sum_j exp(q_i.c_j / tau) ) + lambda mean_i (1 - q_i.c_i)

The host is a BERT or an XLM-RoBERTa. q_i and c_i are the embeddings e of a query and its positive.
j runs over i and over all positives and hard negatives, on any rank, whose label is not that of
query i. tau is 0.02. The preset "code" is VISTA: no Bi-CA, lambda = 0, and j runs over all
candidates. docs/models.md gives the source of each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mmfused.distributed import gather_rows
from mmfused.library import no_autocast
from mmfused.losses import unit_rows
from mmfused.models import inputs, presets
from mmfused.models.config import ModelConfig
from mmfused.models.encoders import Stem, build_text, build_vit, freeze
from mmfused.models.fields import Options
from mmfused.models.retrieval import (
    RetrievalModel,
    RetrievalOutput,
    View,
    check_part,
    check_views,
    late_fusion,
)
from mmfused.models.text_padding import longest_text_of, setting
from mmfused.models.unica_bica import BiCA
from mmfused.ops.masked_info_nce import MaskedInfoNCE

Component = Literal["bica", "ffn", "positive_similarity", "hard_negatives", "fusion"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
HOSTS = ("bert", "xlm-roberta")


@dataclasses.dataclass
class UniCAConfig(ModelConfig):
    """Configuration of UniCA; the default sizes are tiny, without an image encoder.

    Examples:
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UniCAConfig
        >>> tokenizer = train_tokenizer(["Red mug", "Blue plate"])
        >>> config = UniCAConfig.preset("tiny", **UniCAConfig.of_tokenizer(tokenizer))
        >>> config.text["vocab_size"] == len(tokenizer), config.temperature
        (True, 0.02)
    """

    PRESETS: ClassVar[presets.Presets] = presets.UNICA

    # Fields of the host's config (build_text), a BertConfig or, with model_type "xlm-roberta", an
    # XLMRobertaConfig.
    text: Options
    text_dim: int = 128  # D, width of the host, of Bi-CA and of the embeddings
    image_dim: int = 128  # width of the patch tokens
    image: Options | None = None  # arguments of timm's ViT (build_vit); None: takes image_tokens
    image_stem: Stem = "conv_group"  # ViT's patch embedding: convolutions, or "patch" (linear)
    # Normalisation of pixel_values, which training and evaluation apply to their batches.
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["crop", "stretch", "shortest"] = "crop"  # see load_picture
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # of picture files
    empty_text: tuple[int, int] = (2, 3)  # ids of [CLS] and [SEP], which replace a missing text
    # Whether image tokens get the host's embedding of token type 0 and dropout, as text tokens do.
    image_token_type: bool = True
    blocks: int = 1  # number of Bi-CA blocks
    num_heads: int | None = 4  # heads in Bi-CA; None: as many as in the host
    ffn: int | None = None  # hidden width of Bi-CA's feed-forward parts, None: 4 D
    dropout: float = 0.1  # in Bi-CA: of attention probabilities and block outputs
    bica_norm: Literal["post", "pre"] = "post"  # with "pre", Bi-CA is the identity at first
    share_weights: bool = False  # whether both directions share their projections
    temperature: float = 0.02  # tau, of the loss
    positive_weight: float = 1.0  # lambda, weight of the positive similarity
    # What candidates with the query's label are: "drop": no negatives | "ignore": negatives.
    same_id: Literal["drop", "ignore"] = "drop"
    # Whether candidates of other ranks get gradients ("global", as in VISTA), see MaskedInfoNCE.
    gather: Literal["global", "local"] = "global"
    # Encoders with frozen weights. Gradients still flow through a frozen encoder.
    freeze: tuple[Literal["image", "text"], ...] = ()
    # Ablations, alone or together: "bica" (no Bi-CA, as in VISTA), "ffn" (no feed-forward parts in
    # Bi-CA), "positive_similarity" (lambda = 0), "hard_negatives" (the only negatives are positives
    # of other queries), "fusion" (image and text are encoded separately, and the embedding of an
    # item with both is the normalised sum of the two embeddings).
    without: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")
        if self.has_bica and self.num_heads is not None:
            self.check_divisor("num_heads", "text_dim")
        if not self.positive_weight >= 0:
            raise ValueError(f"positive_weight: got {self.positive_weight}, expected at least 0")
        host = self.text.get("model_type", "bert")
        if host not in HOSTS:
            raise ValueError(f"text.model_type: got {host!r}, expected one of {', '.join(HOSTS)}")
        self.check_frozen(self.freeze)

    @property
    def has_bica(self) -> bool:
        """Whether the model has Bi-CA, which the ablations "bica" and "fusion" leave out."""
        return not {"bica", "fusion"} & set(self.without)

    @property
    def bica_heads(self) -> int:
        """The number of heads in Bi-CA."""
        return self.num_heads or setting(self.text, "num_attention_heads")

    @staticmethod
    def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of `preset` that depend on the tokenizer."""
        empty = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        return {**ModelConfig.of_tokenizer(tokenizer), "empty_text": empty}


class Inputs(TypedDict, total=False):
    """Inputs of B items; exactly one of pixel_values and image_tokens is required."""

    pixel_values: Tensor | None  # (B, 3, S, S) float
    image_tokens: Tensor | None  # (B, N, image_dim), patch tokens without [CLS]
    image_present: Tensor | None  # (B,) bool, False = the item has no image; None = all have one
    # (B, T) int64, [CLS] first, T from 2 to max_position_embeddings - N. An XLM-RoBERTa also reads
    # at most max_position_embeddings - pad_token_id - 1 tokens.
    input_ids: Tensor
    attention_mask: Tensor | None  # (B, T), 1 = real token; None = all real; padding on the right
    # (B,) bool; None = an item has a text if more than two ids are real ([CLS] and [SEP] are two).
    text_present: Tensor | None


class Items(NamedTuple):
    """B items after input validation and the image encoder."""

    image: Tensor  # (B, N, D), V
    has_image: Tensor  # (B,) bool
    input_ids: Tensor  # (B, T) int64
    real: Tensor  # (B, T) bool, False = padding
    has_text: Tensor  # (B,) bool


class UniCA(RetrievalModel):
    """UniCA (arXiv 2606.28350): cross-attention of picture and text before one host, for retrieval.

    Encoders have random weights and need `mmfused[models]`.

    Args:
        config: the sizes and options.

    Examples:
        >>> import torch
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UniCA, UniCAConfig
        >>> tokenizer = train_tokenizer(["Red mug", "Blue plate"])
        >>> config = UniCAConfig.preset("tiny", **UniCAConfig.of_tokenizer(tokenizer))
        >>> model = UniCA(config)
        >>> texts = tokenizer(["red mug", "plate"], padding=True, return_tensors="pt")
        >>> items = {"pixel_values": torch.randn(2, 3, 64, 64), **texts}
        >>> query = {**items, "labels": torch.arange(2)}
        >>> list(model(query, candidate=query).losses)
        ['info_nce', 'positive_similarity']
        >>> model.embed(**items)["both"].shape
        torch.Size([2, 128])
    """

    def __init__(self, config: UniCAConfig) -> None:
        super().__init__()
        self.config = c = config
        image = c.image
        self.image_encoder: nn.Module | None = (
            None if image is None else build_vit(c.image_dim, c.image_stem, image)
        )
        self.visual_proj: nn.Linear = nn.Linear(c.image_dim, c.text_dim)
        self.text_encoder: Any = build_text(c.text_dim, c.text)
        vocabulary = self.text_encoder.config.vocab_size
        if max(c.empty_text) >= vocabulary:
            expected = f"ids below the host's vocab_size={vocabulary}"
            raise ValueError(f"empty_text: got {c.empty_text}, expected {expected}")
        if self.longest_text is not None and self.longest_text < 2:
            encoder: Any = self.image_encoder
            got = f"{encoder.patch_embed.num_patches} image tokens"
            positions = self.text_encoder.config.max_position_embeddings
            raise ValueError(
                f"image: got {got}, expected at most {positions - 2}, so that [CLS] and [SEP] fit "
                f"into the {positions} positions of the host"
            )
        blocks = c.blocks if c.has_bica else 0
        self.bica: nn.ModuleList = nn.ModuleList(BiCA(c) for _ in range(blocks))
        weighted = "positive_similarity" not in c.without
        self.positive_weight: float = c.positive_weight if weighted else 0.0
        self.info_nce: MaskedInfoNCE = MaskedInfoNCE(
            c.temperature,
            normalize=False,
            gather=c.gather,
            same_id="drop",
            positive_weight=self.positive_weight,
        )
        for name in c.freeze:
            freeze(getattr(self, f"{name}_encoder"))

    @property
    def longest_text(self) -> int | None:
        """Largest number of tokens of a text beside a picture; None without an image encoder."""
        encoder: Any = self.image_encoder
        return None if encoder is None else self._longest_beside(encoder.patch_embed.num_patches)

    def _longest_beside(self, patches: int) -> int:
        positions = self.text_encoder.config.max_position_embeddings
        return min(longest_text_of(self.text_encoder), positions - patches)

    @property
    def picture_size(self) -> int:
        """Side of the input pictures in pixels; 16 without an image encoder."""
        return 16 if self.image_encoder is None else super().picture_size

    def encode(
        self,
        role: str,
        *,
        labels: Tensor,
        **items: Unpack[Inputs],
    ) -> dict[str, Tensor]:
        """Return "embedding" (B, D) and "labels" (B,); the ``role`` has no effect."""
        embedding = self.embed(**items)["both"]
        inputs.check_labels(labels, len(embedding))
        return {"embedding": embedding, "labels": labels}

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss and its detached terms "info_nce" and "positive_similarity"."""
        q, positive = query["embedding"], candidate["embedding"]
        check_part("UniCA", "candidate", candidate, q, "embedding")
        parts = [candidate]
        if negative is not None and "hard_negatives" not in self.config.without:
            parts.append(negative)
        candidates = torch.cat([part["embedding"] for part in parts])
        labels = torch.cat([part["labels"] for part in parts])
        with no_autocast(q.device.type):  # unit vectors need float32
            ids = {"query_id": query["labels"], "candidate_id": labels}
            loss = self.info_nce(q, candidates, **({} if self.config.same_id == "ignore" else ids))
            distance = gather_rows(1 - (q * positive).sum(-1).detach()).mean()
        info_nce = loss.detach() - self.positive_weight * distance
        return RetrievalOutput(loss, {"info_nce": info_nce, "positive_similarity": distance})

    def embed(
        self,
        views: Sequence[View] = ("both",),
        **items: Unpack[Inputs],
    ) -> dict[str, Tensor]:
        """Return unit embeddings (B, D) of each view, in float32, or float64 in a float64 model.

        Args:
            views: the views to embed, of "image", "text" and "both".
            items: pixel_values (B, 3, S, S) or image_tokens (B, N, image_dim), with image_present
                (B,) bool; input_ids (B, T) with [CLS] first, with attention_mask (B, T) and
                text_present (B,) bool.
        """
        check_views(views)
        prepared = self._prepare(**items)
        encoders = {"image": self._image_alone, "text": self._text_alone, "both": self._both}
        return {view: encoders[view](prepared) for view in views}

    def _image_alone(self, x: Items) -> Tensor:
        no_text = torch.zeros_like(x.has_text)
        ids, real = x.input_ids[:, :2], x.real[:, :2]
        return self._read(Items(x.image, x.has_image, ids, real, no_text))

    def _text_alone(self, x: Items) -> Tensor:
        no_image = torch.zeros_like(x.has_image)
        return self._read(x._replace(image=x.image[:, :0], has_image=no_image))

    def _both(self, x: Items) -> Tensor:
        if "fusion" not in self.config.without:
            return self._read(x)
        image = self._image_alone(x).masked_fill(~x.has_image[:, None], 0)
        only_image = (x.has_image & ~x.has_text)[:, None]
        return late_fusion(image, self._text_alone(x).masked_fill(only_image, 0))

    def _read(self, x: Items) -> Tensor:
        """Return the embeddings (B, D) of the sequences [CLS ; image ; text]."""
        image, ids, real = x.image, *self._fill_missing_texts(x.input_ids, x.real, x.has_text)
        ids, poison = inputs.clamp_indices(ids, self.text_encoder.config.vocab_size)
        positions = self._text_positions(ids.shape[1], x.has_image, image.shape[1])
        text = self.text_encoder.embeddings(input_ids=ids, position_ids=positions)
        text = text + poison[..., None].to(text.dtype)
        cls, text = text[:, :1], text[:, 1:]
        if image.shape[1]:
            for block in self.bica:
                image, text = block(image, text, ~real[:, 1:], x.has_image & x.has_text)
        image_real = x.has_image[:, None].expand(image.shape[:2])
        seen = torch.cat((real[:, :1], image_real, real[:, 1:]), 1)
        return unit_rows(self._run_layers(torch.cat((cls, image, text), 1), seen.long())[:, 0])

    def _text_positions(self, count: int, has_image: Tensor, patches: int) -> Tensor:
        """Return the positions (B, T) of texts of T = ``count`` tokens, padded on the right.

        Beside a picture of N ``patches``, [CLS] is at 0 and the text begins at N + 1. Without, the
        positions are the host's own: BERT's begin at 0, XLM-RoBERTa's after the id of PAD.
        """
        slots, config = torch.arange(count, device=has_image.device), self.text_encoder.config
        first = config.pad_token_id + 1 if config.model_type == "xlm-roberta" else 0
        beside = slots + patches * (slots > 0)
        return torch.where(has_image[:, None], beside, slots + first)

    def _run_layers(self, x: Tensor, seen: Tensor) -> Tensor:
        """Run the host's layers, without embeddings, on x (B, L, D) masked by ``seen`` (B, L)."""
        from transformers.masking_utils import create_bidirectional_mask

        # The form of the mask depends on the attention implementation.
        mask = create_bidirectional_mask(self.text_encoder.config, x, seen)
        return self.text_encoder.encoder(x, attention_mask=mask).last_hidden_state

    def _fill_missing_texts(
        self,
        ids: Tensor,
        real: Tensor,
        has_text: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ids and real tokens, with missing texts replaced by [CLS] [SEP]."""
        markers = (torch.full_like(ids[:, :1], marker) for marker in self.config.empty_text)
        empty = torch.cat((*markers, ids[:, 2:]), 1)
        first_two = torch.arange(ids.shape[1], device=ids.device) < 2
        has_text = has_text[:, None]
        return torch.where(has_text, ids, empty), torch.where(has_text, real, first_two)

    def _prepare(
        self,
        *,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        image_present: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_present: Tensor | None = None,
    ) -> Items:
        """Check the inputs, encode pixels, and compute V."""
        tokens = self._image_tokens(pixel_values, image_tokens, image_present)
        batch, count = tokens.shape[:2]
        ids = self._check_text(input_ids, attention_mask, text_present, batch, count)
        if image_present is None:
            image_present = torch.ones(batch, dtype=torch.bool, device=tokens.device)
        absent = ~image_present[:, None].expand(batch, count)
        image = inputs.map_tokens(self.visual_proj, tokens, absent)
        positions, host = torch.arange(1, count + 1, device=image.device)[None], self.text_encoder
        if self.config.image_token_type:
            image = host.embeddings(inputs_embeds=image, position_ids=positions)
        else:
            image = image + host.embeddings.position_embeddings(positions)
            image = host.embeddings.LayerNorm(image)
        all_real = torch.ones_like(ids, dtype=torch.bool)
        real = all_real if attention_mask is None else attention_mask != 0
        if text_present is None:
            text_present = real.sum(1) > 2  # an empty text has two tokens, [CLS] and [SEP]
        return Items(image, image_present, ids, real, text_present)

    def _image_tokens(
        self,
        pixels: Tensor | None,
        tokens: Tensor | None,
        present: Tensor | None,
    ) -> Tensor:
        source = inputs.one_source("pixel_values and image_tokens", pixels, tokens)
        inputs.check_flags("image_present", present, source.shape[:1])
        if tokens is None:
            encoder: Any = self.image_encoder
            tokens = inputs.encode_image(encoder, source, present)[:, encoder.num_prefix_tokens :]
        inputs.check_tokens("image_tokens", tokens, self.config.image_dim)
        return tokens

    def _check_text(
        self,
        ids: Tensor | None,
        attention_mask: Tensor | None,
        present: Tensor | None,
        batch: int,
        patches: int,
    ) -> Tensor:
        limit = self._longest_beside(patches)
        if ids is None or ids.ndim != 2 or not 2 <= ids.shape[1] <= limit:
            got = None if ids is None else f"shape {tuple(ids.shape)}"
            expected = f"(batch, tokens), from 2 to {limit} tokens beside {patches} image tokens"
            raise ValueError(f"input_ids: got {got}, expected {expected}")
        inputs.check_batch(batch, len(ids))
        inputs.check_attention_mask(attention_mask, ids.shape)
        inputs.check_flags("text_present", present, ids.shape[:1])
        inputs.check_range("input_ids", ids, self.text_encoder.config.vocab_size)
        return ids
