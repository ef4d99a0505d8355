"""UNITE: universal multimodal embeddings from Qwen2-VL (arXiv 2505.19650).

    e(x) = h / |h|, h = last hidden state of the sequence's last token S = Q C^T / tau, tau = 0.03,
    c_i the candidate of query q_i stage 1:  L = 1/2 [CE(S) + CE(S^T)]
    retrieval adaptation stage 2:  L = -1/N sum_i log( exp S_ii / sum over j with M_ij = 1 of exp
    S_ij )  MAMCL, instruction tuning
              M_ij = 1[mod(c_i) = mod(c_j)], mod: TEXT = 1, IMAGE = 2, VIDEO = 4, OR-ed

The paper's: the loss of either stage, Qwen2-VL, the last token, tau, LoRA of rank 8, alpha 16 in
stage 1 and 64 in stage 2, a frozen vision tower with its projector. From the public code
(friedrichor/UNITE): left padding, the prompt "Summary above ... in one word:" and an end-of-text
token that is pooled, the norm in the model's dtype, hard negatives as further columns of S that the
mask spares (stage 2; the dual loss goes without), LoRA on every Linear layer of the language model
with dropout 0.05, and several positives where ids are given, whose log-probabilities are summed
(preset "code": `same_id` "sum"). This library's choice: -inf in place of the code's -1e9; the
sequence without the chat template; the view that each item is drawn to show in training, which
makes candidates of several modalities out of products that have both; items of one label left out
of each other's negatives (`same_id` "drop"); pictures of one size; over ranks the gradient of one
process with the whole batch, where the code's is that divided by the number of ranks; preset
"tiny"."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.distributed import in_group
from mmfused.losses import unit_rows
from mmfused.models import qwen
from mmfused.models.config import AbsentPart
from mmfused.models.qwen import HostedConfig
from mmfused.models.retrieval import VIEWS, RetrievalModel, RetrievalOutput, check_views
from mmfused.ops.masked_info_nce import loss_over_ranks, masked_info_nce

TEXT, IMAGE, VIDEO = 1, 2, 4
COMPONENTS = ("mamcl", "negatives", "dual", "fusion")
STAGE_OF = {"mamcl": 2, "negatives": 2, "dual": 1}
CHOICES = {
    "stage": (1, 2),
    "query_views": VIEWS,
    "candidate_views": VIEWS,
    "same_id": ("drop", "sum"),
    "freeze": tuple(qwen.PARTS),
    "without": COMPONENTS,
}


@dataclasses.dataclass
class UNITEConfig(HostedConfig):
    """Values that do not fit together raise ValueError."""

    host: dict  # qwen.build_qwen2_vl(host)
    tokens: dict | None = None  # qwen.token_ids(tokenizer); every model needs them
    image_size: int = 64  # side of the pictures, a multiple of patch and merge
    stage: int = 2  # 1: both directions, no mask, no hard negatives | 2: MAMCL
    temperature: float = 0.03
    # What an item shows in training, one drawn of these with equal odds. The paper's stage 1 has
    # pairs of texts, of a text and a picture, of a text and a video; its stage 2 mixes all.
    query_views: tuple[str, ...] = VIEWS
    candidate_views: tuple[str, ...] = VIEWS
    same_id: str = "drop"  # another candidate of the same label: "drop", no negative | "sum", one more positive (the public code)
    freeze: tuple[str, ...] = ()  # of "vision", "language"
    pixel_mean: tuple[float, float, float] = qwen.PIXEL_MEAN
    pixel_std: tuple[float, float, float] = qwen.PIXEL_STD
    # Left out: "mamcl" (stage 2 without its mask), "negatives" (stage 2 without hard negatives),
    # "dual" (stage 1 from query to candidate alone), "fusion" (picture and text are read apart, and
    # their embeddings added).
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES)
        self.check_positive("temperature")
        self.check_host()
        check_views(self.query_views)
        check_views(self.candidate_views)
        for name in self.without:
            if STAGE_OF.get(name, self.stage) != self.stage:
                raise AbsentPart(
                    f"without: got {name!r} with stage {self.stage}, which has none anyway, expected stage {STAGE_OF[name]}"
                )


QWEN2_VL_2B = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
}
UNITEConfig.PRESETS = {
    # 448 x 448 pixels are 256 tokens, the least that UNITE takes.
    "paper": {"host": QWEN2_VL_2B, "image_size": 448, "freeze": ("vision",)},
    "code": {"host": QWEN2_VL_2B, "image_size": 448, "freeze": ("vision",), "same_id": "sum"},
    "tiny": {"host": qwen.TINY, "image_size": 64},
}


class UNITE(RetrievalModel):
    """UNITE from a `UNITEConfig`; the host starts from random weights (needs `pip install
    mmfused[models]`).
    """

    def __init__(self, config: UNITEConfig):
        super().__init__()
        self.config = config
        self.host = qwen.build_qwen2_vl(config.host, config.freeze)

    @property
    def picture_size(self) -> int:
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
        """What the loss needs of the items, each in a view drawn from the config's for its `role`.

        Args: role: "query", "candidate" or "negative"; the last draws as candidates do.
            pixel_values: (B, 3, S, S), or videos (B, frames, 3, S, S); or image_tokens: (B, n, D),
            as the vision tower gives them. input_ids: (B, T) int64, with attention_mask (B, T), 1 =
            real, None = all. labels: (B,) int64, the product. image_present: (B,) bool, None = all.

        Returns: "embedding" (B, D), unit rows in the model's dtype; "code" (B,) int64, the
        modalities shown; "labels".

        The views are drawn with the CPU's generator, so that a seed draws the same ones on every
        device."""
        views = self.config.query_views if role == "query" else self.config.candidate_views
        allowed = torch.tensor([VIEWS.index(view) for view in views])
        view = allowed[torch.randint(len(views), (len(input_ids),))].to(
            input_ids.device, non_blocking=True
        )
        pictures = qwen.read_pictures(
            self.host, self.config.image_size, pixel_values, image_tokens, image_present
        )
        video = pixel_values is not None and pixel_values.ndim == 5
        embedding, has_image, has_text = self._read(
            *pictures, input_ids, attention_mask, image_present, view, video
        )
        code = has_image * (VIDEO if video else IMAGE) + has_text * TEXT
        return {"embedding": embedding, "code": code, "labels": labels}

    def compare(
        self,
        query: dict,
        candidate: dict,
        negative: dict | None = None,
    ) -> RetrievalOutput:
        """The stage's loss of rows from `encode`; row i of `candidate` is query i's positive."""
        c = self.config
        ids = {
            "query_id": query["labels"],
            "candidate_id": candidate["labels"],
            "same_id": c.same_id,
        }
        keys = {}
        candidates = candidate["embedding"]
        if c.stage == 2 and "mamcl" not in c.without:
            keys = {"query_key": candidate["code"], "candidate_key": candidate["code"]}
        if c.stage == 2 and "negatives" not in c.without and negative is not None:
            candidates = torch.cat([candidates, negative["embedding"]])
            ids["candidate_id"] = torch.cat([ids["candidate_id"], negative["labels"]])
            if keys:  # hard negatives are everybody's
                keys["candidate_key"] = torch.cat(
                    [keys["candidate_key"], torch.full_like(negative["code"], -1)]
                )
        options = {
            "temperature": c.temperature,
            "symmetric": c.stage == 1 and "dual" not in c.without,
            **ids,
            **keys,
        }
        if in_group():
            loss = loss_over_ranks(query["embedding"], candidates, True, **options)
        else:
            loss = masked_info_nce(query["embedding"], candidates, **options)
        return RetrievalOutput(loss, {"contrastive": loss})

    def embed(
        self,
        views: tuple[str, ...] = ("both",),
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Unit embeddings (B, D) in float32 of each view; arguments as `encode`'s."""
        check_views(views)
        pictures = qwen.read_pictures(
            self.host, self.config.image_size, pixel_values, image_tokens, image_present
        )
        items = (input_ids, attention_mask, image_present)
        video = pixel_values is not None and pixel_values.ndim == 5
        return {view: unit_rows(self._read(*pictures, *items, view, video)[0]) for view in views}

    def _read(
        self,
        pictures,
        grid,
        ids,
        attention_mask,
        image_present,
        view,
        video,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings (B, D) of items in their views, and which show a picture and a text, (B,)
        bool each.
        """
        tokens = self.config.tokens
        image, text = qwen.visible(tokens, ids, attention_mask, image_present, view)  # (B,), (B, T)
        if "fusion" not in self.config.without:
            return self._last(pictures, qwen.assemble(tokens, grid, ids, text, image, video=video))
        of_image, *_ = self._last(
            pictures, qwen.assemble(tokens, grid, ids, text, image, "image", video=video)
        )
        of_text, _, has_text = self._last(
            pictures, qwen.assemble(tokens, grid, ids, text, image, "text")
        )
        both = (
            of_image * image[:, None] + of_text * (has_text | ~image)[:, None]
        )  # of nothing, what a text of nothing is
        return F.normalize(both, dim=-1), image, has_text

    def _last(self, pictures: Tensor, sequence: qwen.Sequence) -> tuple[Tensor, Tensor, Tensor]:
        last = qwen.hidden_states(self.host, sequence, pictures)[:, -1]
        return F.normalize(last, dim=-1), sequence.has_image, sequence.has_text


def lora(model: UNITE, rank: int = 8, alpha: float | None = None, dropout: float = 0.05) -> UNITE:
    """The same model with peft's LoRA on every Linear layer of its language model, whose own
    weights are then frozen.

    ``alpha`` None: the paper's, 16 in stage 1 and 64 in stage 2. ImportError where peft is not
    installed."""
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
    alpha = (16 if model.config.stage == 1 else 64) if alpha is None else alpha
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(names), bias="none"
    )
    peft.inject_adapter_in_model(settings, language)
    return model
