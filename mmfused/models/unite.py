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
from torch import Tensor

from mmfused.distributed import in_group
from mmfused.losses import unit_rows
from mmfused.models import presets, qwen
from mmfused.models.config import absent_part
from mmfused.models.fields import Options
from mmfused.models.inputs import check_labels, check_rows, one_source
from mmfused.models.qwen_config import HostedConfig
from mmfused.models.qwen_packed import GRID_OF, blank_sequence, packed_states, split_packed
from mmfused.models.qwen_tokens import end_line
from mmfused.models.retrieval import VIEWS, RetrievalModel, RetrievalOutput, View, check_views
from mmfused.ops.masked_info_nce import loss_over_ranks, masked_info_nce

TEXT, IMAGE, VIDEO = 1, 2, 4
SameLabel = Literal["drop", "sum", "ignore"]
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
    # Training encodes each item in one of these views, drawn uniformly from those that show
    # something of the item. In the paper, stage 1 pairs texts with texts, pictures or videos, and
    # stage 2 mixes all modalities.
    query_views: tuple[View, ...] = VIEWS
    candidate_views: tuple[View, ...] = VIEWS
    # Other candidates with the query's label: "drop": left out | "sum": additional positives, as in
    # the public code | "ignore": negatives, as if labels were unknown.
    same_id: SameLabel = "drop"
    # The same with hard negatives, where the public code ignores labels; None: as `same_id`.
    same_id_with_negatives: SameLabel | None = None
    # The text around an item: "plain": the prompt | "chat": Qwen2-VL's chat template and the words
    # of the public code, which released checkpoints need.
    prompt: qwen.Prompt = "plain"
    # Positions of tokens: "mrope": Qwen2-VL's, in time, rows and columns | "1d": indices in the
    # sequence, as in the public code, which released checkpoints need.
    positions: qwen.Positions = "mrope"
    freeze: tuple[qwen.Part, ...] = ()  # parts of the host that are not trained
    pixel_mean: tuple[float, float, float] = qwen.PIXEL_MEAN  # normalisation of pixel_values
    pixel_std: tuple[float, float, float] = qwen.PIXEL_STD
    resize: Literal["crop", "stretch", "shortest"] = "crop"  # see load_picture
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # of picture files
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
        if self.prompt == "chat" and (self.tokens or {}).get("chat") is None:
            expected = "the result of mmfused.models.qwen.token_ids(tokenizer)"
            raise ValueError(f"tokens: got a dict without chat, expected {expected}")
        for name in self.without:
            stage = STAGE_OF.get(name, self.stage)
            if stage != self.stage:
                raise absent_part(name, f"stage {self.stage}", f"stage {stage}")

    @property
    def truncation_side(self) -> Literal["left", "right"] | None:
        """Side on which texts that are too long are truncated; None: that of the tokenizer."""
        return "left" if self.prompt == "chat" else None

    def format_text(self, text: str) -> str:
        """Return a text as the tokenizer should get it."""
        return end_line(text) if self.prompt == "chat" else text


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
        code: Tensor | None = None,
        **packed: Tensor | None,
    ) -> dict[str, Tensor]:
        """Encode each item in a random view out of the config's views for ``role``.

        A view that shows nothing of an item, as the image of an item without one, is not drawn. If
        none of the views shows anything, the item is encoded with all it has. The views are drawn
        with the CPU's generator, so that a seed gives the same views on every device.

        With ``code``, input_ids are complete sequences, see `embed_sequences`, and no view is
        drawn.

        Args:
            role: "query", "candidate" or "negative"; negatives have the views of candidates.
            pixel_values: pictures (B, 3, S, S) or videos (B, frames, 3, S, S).
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            labels: (B,) int64, the product of each item.
            image_present: (B,) bool, False = the item has no image; None = all have an image.
            image_tokens: (B, n, D), output of the vision tower, in place of pixel_values.
            code: (B,) int64, mod of each complete sequence.
            packed: the other arguments of `embed_sequences`.

        Returns:
            "embedding" (B, D), unit rows in the model's dtype; "code" (B,) int64, mod of each item
            in its view; "labels".
        """
        ids = qwen.check_ids(input_ids)
        if code is not None:
            check_labels(labels, len(ids))
            check_rows("code", len(code), len(ids))
            one_source("image_tokens and code", image_tokens, code)
            one_source("image_present and code", image_present, code)
            rows = self._read_sequences(ids, attention_mask, pixel_values=pixel_values, **packed)
            return {"embedding": rows, "code": code, "labels": labels}
        if packed:
            names = ", ".join(packed)
            raise ValueError(f"{names}: got complete sequences, expected code with them")
        items = self._items(pixel_values, image_tokens, ids, attention_mask, image_present)
        views = self.config.query_views if role == "query" else self.config.candidate_views
        embedding, has_image, has_text = self._read(items, self._draw_views(items, views))
        code = has_image * (VIDEO if items.video else IMAGE) + has_text * TEXT
        return {"embedding": embedding, "code": code, "labels": labels}

    def _draw_views(self, x: qwen.Items, views: Sequence[View]) -> Tensor:
        """Return the index in VIEWS of a random view of each item, (B,) int64."""
        tokens = self.config.tokens or {}
        image, text = qwen.visible(tokens, x.input_ids, x.attention_mask, x.image_present, "both")
        has_text = text.any(1)
        shown = {"image": image, "text": has_text, "both": image | has_text}
        shows = torch.stack([shown[view] for view in views], 1)  # (B, views)
        # A draw from 6 values is uniform modulo 1, 2 and 3, the possible numbers of views.
        draw = torch.randint(6, (len(image),)).to(image.device, non_blocking=True)
        rank = draw % shows.sum(1).clamp(min=1)
        drawn = (shows & (shows.cumsum(1) - 1 == rank[:, None])).long().argmax(1)
        indices = torch.tensor([VIEWS.index(view) for view in views], device=image.device)
        return torch.where(shows.any(1), indices[drawn], VIEWS.index("both"))

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss of the config's stage; row i of ``candidate`` belongs to query i.

        In stage 2, ``negative`` may have any number of rows, which are negatives of all queries.
        """
        c = self.config
        candidates, candidate_id = candidate["embedding"], candidate["labels"]
        query_key = candidate_key = None
        if c.stage == 2 and "mamcl" not in c.without:
            query_key = candidate_key = candidate["code"]
        same_id = c.same_id
        if c.stage == 2 and "negatives" not in c.without and negative is not None:
            same_id = c.same_id_with_negatives or c.same_id
            candidates = torch.cat([candidates, negative["embedding"]])
            candidate_id = torch.cat([candidate_id, negative["labels"]])
            if candidate_key is not None:  # -1 matches the keys of all queries
                any_key = torch.full_like(negative["code"], -1)
                candidate_key = torch.cat([candidate_key, any_key])
        options: dict[str, Any] = {
            "temperature": c.temperature,
            "symmetric": c.stage == 1 and "dual" not in c.without,
            "query_id": None if same_id == "ignore" else query["labels"],
            "candidate_id": None if same_id == "ignore" else candidate_id,
            "same_id": "drop" if same_id == "ignore" else same_id,
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

    def embed_sequences(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **packed: Tensor | None,
    ) -> Tensor:
        """Return unit embeddings (B, D) of complete sequences, in float32 or float64.

        `UNITEProcessor` makes the arguments, and transformers' Qwen2VLProcessor makes the same. An
        item may have several pictures and videos of any sizes.

        Args:
            input_ids: (B, L) int64, padded on the left or right; the last real token is pooled.
            attention_mask: (B, L), 1 = real token; None = all real.
            packed: "pixel_values" (n, 3 * t * p * p), the patches of all pictures, and
                "image_grid_thw" (pictures, 3) int64, their numbers of patches in time, rows and
                columns; "pixel_values_videos" and "video_grid_thw", the same for videos.

        Raises:
            ValueError: the pictures are not those that the sequences have tokens for.
        """
        packed.pop("code", None)
        return unit_rows(self._read_sequences(input_ids, attention_mask, **packed))

    def split(self, items: dict[str, Any], size: int) -> list[dict[str, Any]]:
        """Split the items of a part into parts of ``size`` items, for GradCache."""
        if items.get("code") is None:
            return super().split(items, size)
        return split_packed(self.config.tokens or {}, self._merge_size, items, size)

    def blank_item(self, items: dict[str, Any]) -> dict[str, Any]:
        """Return one item of zeros, with the arguments of ``items``."""
        zeros = super().blank_item(items)
        if items.get("code") is None:
            return zeros
        return blank_sequence(self.config.tokens or {}, self._merge_size, zeros)

    @property
    def _merge_size(self) -> int:
        return self.host.config.vision_config.spatial_merge_size

    def _read_sequences(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        mm_token_type_ids: Tensor | None = None,
        **pictures: Tensor | None,
    ) -> Tensor:
        """Return normalised hidden states of the last tokens, in the model's dtype.

        ``mm_token_type_ids``, which transformers' processor returns too, has no effect.
        """
        c = self.config
        for name in pictures:
            if name not in (*GRID_OF, *GRID_OF.values()):
                expected = ", ".join((*GRID_OF, *GRID_OF.values()))
                raise ValueError(f"{name}: got an unknown argument, expected {expected}")
        states = packed_states(
            self.host, c.tokens or {}, c.positions, input_ids, attention_mask, **pictures
        )
        if attention_mask is None:
            last = states[:, -1]
        else:
            padding = attention_mask.flip(1).bool().long().argmax(1)  # on the right
            last = states[torch.arange(len(states), device=states.device), -1 - padding]
        return F.normalize(last, dim=-1)

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
                qwen.assemble(
                    tokens,
                    x.grid,
                    x.input_ids,
                    text,
                    image,
                    view,
                    video=video,
                    prompt=self.config.prompt,
                    positions=self.config.positions,
                ),
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
