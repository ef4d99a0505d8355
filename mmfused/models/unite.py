"""UNITE: universal multimodal embeddings from Qwen2-VL (arXiv 2505.19650).

    e(x) = h / |h|, h = last hidden state of the sequence's last token
    S_ij = e(q_i) . e(c_j) / tau, tau = 0.03, c_i is the positive of query q_i
    stage 1, retrieval adaptation:  L = 1/2 [CE(S) + CE(S^T)]
    stage 2, instruction tuning:    L = -1/N sum_i log( exp S_ii / sum over j with M_ij = 1 of
                                    exp S_ij )                                           (MAMCL)
    M_ij = 1[mod(c_i) = mod(c_j)], mod(c): the modalities of c, bits TEXT = 1, IMAGE = 2, VIDEO = 4

CE(S) is the cross-entropy of the rows of S with the diagonal as targets. In stage 2, S has further
columns j for hard negatives, with M_ij = 1. docs/models.md gives the source of each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.distributed import in_group
from mmfused.losses import unit_rows
from mmfused.models import presets, qwen
from mmfused.models.config import absent_part
from mmfused.models.fields import Options
from mmfused.models.qwen_config import HostedConfig
from mmfused.models.retrieval import VIEWS, RetrievalModel, RetrievalOutput, View, check_views
from mmfused.ops.masked_info_nce import loss_over_ranks, masked_info_nce

TEXT, IMAGE, VIDEO = 1, 2, 4
Component = Literal["mamcl", "negatives", "dual", "fusion"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
# The stage whose loss has the component.
STAGE_OF: dict[Component, int] = {"mamcl": 2, "negatives": 2, "dual": 1}


@dataclasses.dataclass
class UNITEConfig(HostedConfig):
    """Configuration of UNITE.

    Examples:
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UNITEConfig
        >>> tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> options = UNITEConfig.of_tokenizer(tokenizer)
        >>> config = UNITEConfig.preset("tiny", **options, stage=1, query_views=("text",))
        >>> config.picture_size, config.temperature
        (64, 0.03)
    """

    PRESETS: ClassVar[presets.Presets] = presets.UNITE

    host: Options  # fields of transformers' Qwen2VLConfig (qwen.build_qwen2_vl)
    tokens: Options | None = None  # required: the result of qwen.token_ids(tokenizer)
    image_size: int = 64  # side of the pictures, a multiple of patch_size * spatial_merge_size
    stage: Literal[1, 2] = 2  # 1: both directions, no mask, no hard negatives | 2: MAMCL
    temperature: float = 0.03  # tau, of the loss
    # Training encodes each item in one of these views, drawn uniformly. In the paper, stage 1 pairs
    # texts with texts, pictures or videos, and stage 2 mixes all modalities.
    query_views: tuple[View, ...] = VIEWS
    candidate_views: tuple[View, ...] = VIEWS
    # Other candidates with the query's label: "drop": ignored | "sum": additional positives, as
    # in the public code.
    same_id: Literal["drop", "sum"] = "drop"
    freeze: tuple[qwen.Part, ...] = ()  # parts of the host that are not trained
    pixel_mean: tuple[float, float, float] = qwen.PIXEL_MEAN  # normalisation of pixel_values
    pixel_std: tuple[float, float, float] = qwen.PIXEL_STD
    # Ablations: "mamcl" (stage 2 without the mask M), "negatives" (stage 2 without hard negatives),
    # "dual" (stage 1 without CE(S^T)), "fusion" (picture and text are encoded separately, and the
    # two embeddings are added and normalised).
    without: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")
        self.check_host_and_tokens()
        check_views(self.query_views)
        check_views(self.candidate_views)
        for name in self.without:
            stage = STAGE_OF.get(name, self.stage)
            if stage != self.stage:
                raise absent_part(name, f"stage {self.stage}", f"stage {stage}")


class UNITE(RetrievalModel):
    """UNITE (arXiv 2505.19650): embeddings of text, pictures and videos from a Qwen2-VL.

    The host has random weights and needs `mmfused[models]`.

    Args:
        config: the sizes and options.

    Examples:
        >>> import torch
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UNITE, UNITEConfig
        >>> tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> model = UNITE(UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer)))
        >>> texts = tokenizer(["red mug", "plate"], padding=True, return_tensors="pt")
        >>> embeddings = model.embed(
        ...     ["text", "both"], pixel_values=torch.randn(2, 3, 64, 64), **texts
        ... )
        >>> torch.allclose(embeddings["both"].norm(dim=1), torch.ones(2))
        True
    """

    def __init__(self, config: UNITEConfig) -> None:
        super().__init__()
        self.config = config
        self.host: Any = qwen.build_qwen2_vl(config.host, config.freeze)

    @property
    def picture_size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.config.image_size

    def encode(
        self,
        role: str,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode each item in a random view out of the config's views for ``role``.

        The views are drawn with the CPU's generator, so that a seed gives the same views on every
        device.

        Args:
            role: "query", "candidate" or "negative"; negatives have the views of candidates.
            pixel_values: pictures (B, 3, S, S) or videos (B, frames, 3, S, S).
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            labels: (B,) int64, the product of each item.
            image_present: (B,) bool, False = the item has no image; None = all have an image.
            image_tokens: (B, n, D), output of the vision tower, in place of pixel_values.

        Returns:
            "embedding" (B, D), unit rows in the model's dtype; "code" (B,) int64, mod of each item
            in its view; "labels".
        """
        ids = qwen.check_ids(input_ids)
        views = self.config.query_views if role == "query" else self.config.candidate_views
        allowed = torch.tensor([VIEWS.index(view) for view in views])
        view = allowed[torch.randint(len(views), (len(ids),))].to(ids.device, non_blocking=True)
        items = self._items(pixel_values, image_tokens, ids, attention_mask, image_present)
        embedding, has_image, has_text = self._read(items, view)
        code = has_image * (VIDEO if items.video else IMAGE) + has_text * TEXT
        return {"embedding": embedding, "code": code, "labels": labels}

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss of the config's stage; row i of each part belongs to query i."""
        c = self.config
        candidates, candidate_id = candidate["embedding"], candidate["labels"]
        query_key = candidate_key = None
        if c.stage == 2 and "mamcl" not in c.without:
            query_key = candidate_key = candidate["code"]
        if c.stage == 2 and "negatives" not in c.without and negative is not None:
            candidates = torch.cat([candidates, negative["embedding"]])
            candidate_id = torch.cat([candidate_id, negative["labels"]])
            if candidate_key is not None:  # -1 matches the keys of all queries
                any_key = torch.full_like(negative["code"], -1)
                candidate_key = torch.cat([candidate_key, any_key])
        options: dict[str, Any] = {
            "temperature": c.temperature,
            "symmetric": c.stage == 1 and "dual" not in c.without,
            "query_id": query["labels"],
            "candidate_id": candidate_id,
            "same_id": c.same_id,
            "query_key": query_key,
            "candidate_key": candidate_key,
        }
        if in_group():
            loss = loss_over_ranks(query["embedding"], candidates, True, **options)
        else:
            loss = masked_info_nce(query["embedding"], candidates, **options)
        return RetrievalOutput(loss, {"contrastive": loss})

    def embed(
        self,
        views: Sequence[View] = ("both",),
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return unit embeddings (B, D) of each view, in float32, or float64 in a float64 model.

        See `encode` for the arguments.
        """
        check_views(views)
        ids = qwen.check_ids(input_ids)
        items = self._items(pixel_values, image_tokens, ids, attention_mask, image_present)
        return {view: unit_rows(self._read(items, view)[0]) for view in views}

    def _items(
        self,
        pixel_values: Tensor | None,
        image_tokens: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_present: Tensor | None,
    ) -> qwen.Items:
        """Check the inputs, and encode pixels with the vision tower."""
        pictures, grid = qwen.read_pictures(
            self.host, self.config.image_size, pixel_values, image_tokens, image_present
        )
        video = pixel_values is not None and pixel_values.ndim == 5
        return qwen.Items(pictures, grid, input_ids, attention_mask, image_present, video)

    def _read(self, x: qwen.Items, view: View | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings (B, D), has_image and has_text of the items in a view."""
        tokens = self.config.tokens or {}
        image, text = qwen.visible(tokens, x.input_ids, x.attention_mask, x.image_present, view)

        def read_view(view: View, video: bool) -> tuple[Tensor, Tensor, Tensor]:
            return self._last_token(
                x.pictures,
                qwen.assemble(tokens, x.grid, x.input_ids, text, image, view, video=video),
            )

        if "fusion" not in self.config.without:
            return read_view("both", x.video)
        of_image, *_ = read_view("image", x.video)
        of_text, _, has_text = read_view("text", False)
        # An item without picture and text gets the embedding of an empty text.
        use_text = has_text | ~image
        both = of_image * image[:, None] + of_text * use_text[:, None]
        return F.normalize(both, dim=-1), image, has_text

    def _last_token(
        self,
        pictures: Tensor,
        sequence: qwen.Sequence,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised hidden state of the last token, has_image and has_text."""
        last = qwen.hidden_states(self.host, sequence, pictures)[:, -1]
        return F.normalize(last, dim=-1), sequence.has_image, sequence.has_text


def lora(
    model: UNITE,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.05,
) -> UNITE:
    """Add LoRA to every Linear layer of the language model, in place.

    The original weights of the language model are frozen. This function needs the package peft.

    Args:
        model: the model.
        rank: rank of the adapters.
        alpha: scale of the adapters, times ``rank``; the default is the paper's, 16 in stage 1 and
            64 in stage 2.
        dropout: dropout rate of the adapters' inputs.

    Returns:
        The model.

    Raises:
        ImportError: peft is not installed.

    Examples:
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UNITE, UNITEConfig
        >>> from mmfused.models.unite import lora
        >>> tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> model = UNITE(UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer)))
        >>> language = lora(model, rank=4).host.language_model
        >>> all("lora" in name for name, p in language.named_parameters() if p.requires_grad)
        True
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs peft: pip install peft") from error
    language = model.host.language_model
    names = {
        name.rpartition(".")[2]
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear)
    }
    default_alpha = 16 if model.config.stage == 1 else 64
    lora_alpha: Any = default_alpha if alpha is None else alpha
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=dropout,
        target_modules=sorted(names),
        bias="none",
    )
    peft.inject_adapter_in_model(settings, language)
    return model
