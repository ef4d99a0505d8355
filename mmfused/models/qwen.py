"""What UNITE and MOON2.0 share around transformers' Qwen2-VL: the host, its patches, its tokens,
the sequences it reads.

A sequence is what an item shows in a view: <|vision_start|>, the picture's tokens, <|vision_end|>,
the text, a prompt, an end token; padding stands at the left, so that the last token is the last of
every item. All items get all slots in shapes that depend on nothing but the batch's, and absent
slots are sorted to the left: no loop over items, no wait for the device. (Only the vision tower,
which is transformers' own, reads its grid back and goes picture by picture.)"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmfused.models.config import ModelConfig, check_sizes
from mmfused.models.fields import check_field, check_fields
from mmfused.models.inputs import check_flags, check_range, contain, one_source
from mmfused.models.qwen_host import (  # noqa: F401, some for the models alone
    PARTS,
    PIXEL_MEAN,
    PIXEL_STD,
    build_qwen2_vl,
    check_host,
    freeze_parts,
    pretrained_qwen2_vl,
    token_side,
)
from mmfused.models.retrieval import VIEWS

VISION_TOKENS = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "end": "<|endoftext|>",
}
PROMPT = "Summary above {} in one word:"
KINDS = ("text", "image", "image and text", "video", "video and text")  # what a sequence can hold
TINY = {  # a host for a CPU, trained in minutes
    "text_config": {
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
    },
}


class Sequence(NamedTuple):
    """What the host reads; B items, L slots."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 1 = real, the padding at the left
    position_ids: Tensor  # (3, B, L) int64: time, row, column (M-RoPE)
    picture_slot: Tensor  # (B, L) int64: which of the picture's tokens stands here, -1 = none
    has_image: Tensor  # (B,) bool: a picture in this sequence
    has_text: Tensor  # (B,) bool


TOKENS = {
    **dict.fromkeys((*VISION_TOKENS, "pad"), int),
    "drop": list[int],
    "prompts": dict.fromkeys(KINDS, list[int]),
}
MOST_TOKENS = 1 << 16  # of a picture


class HostedConfig(ModelConfig):
    """Base of the configs with a `host`, a dict that `build_qwen2_vl` takes, its `tokens`, and an
    `image_size`.
    """

    UNKNOWN: ClassVar[dict] = {
        "tokens": {
            **dict.fromkeys(VISION_TOKENS, 0),
            "pad": 0,
            "drop": [],
            "prompts": dict.fromkeys(KINDS, []),
        }
    }

    @classmethod
    def preset(cls, name="tiny", *, vocab_size=None, image_size=None, patch_size=None, **overrides):
        """As `ModelConfig.preset`; `patch_size` is the side of what becomes one token, several
        patches of the vision tower.

        `host` updates the preset's, part by part; with a `model_type` in it, it takes the preset's
        place, and pictures are of 16 x 16 tokens unless `image_size` says otherwise."""
        usual = cls.values_of(name)["host"]
        check_sizes(vocab_size=vocab_size, image_size=image_size, patch_size=patch_size)
        values = {**cls.values_of(name), **overrides}
        own = overrides.get("host", {})
        check_field("host", own, dict)
        for part in ("text_config", "vision_config"):
            check_field(f"host.{part}", own.get(part, {}), dict)
        if "model_type" in own:
            values["image_size"] = 16 * token_side(own.get("vision_config", {}))
        else:
            merge = usual["vision_config"]["spatial_merge_size"]
            if patch_size is not None and patch_size % merge:
                raise ValueError(
                    f"patch_size: got {patch_size}, expected a multiple of {merge}, the patches on a token's side"
                )
            given = {"text_config": {} if vocab_size is None else {"vocab_size": vocab_size}}
            given["vision_config"] = (
                {} if patch_size is None else {"patch_size": patch_size // merge}
            )
            values["host"] = {
                **usual,
                **own,
                **{part: {**usual[part], **given[part], **own.get(part, {})} for part in given},
            }
        return cls.from_dict(values if image_size is None else {**values, "image_size": image_size})

    @property
    def picture_size(self) -> int:
        return self.image_size

    @staticmethod
    def prepare_tokenizer(tokenizer):
        return add_vision_tokens(enclose_texts(tokenizer))

    @staticmethod
    def of_tokenizer(tokenizer) -> dict:
        return {"vocab_size": len(tokenizer), "tokens": token_ids(tokenizer)}

    def check_host(self) -> None:
        """ValueError unless the host can be built, there are tokens, and the pictures are whole
        ones of these.
        """
        check_host(self.host)
        if self.tokens is None:
            raise ValueError(
                "tokens: got None, expected what mmfused.models.qwen.token_ids(tokenizer) gives"
            )
        check_fields("tokens", self.tokens, TOKENS)
        for name, values, fields in (
            ("tokens", self.tokens, TOKENS),
            ("tokens.prompts", self.tokens.get("prompts"), KINDS),
        ):
            lacking = [field for field in fields if (values or {}).get(field) is None]
            if lacking:
                raise ValueError(
                    f"{name}: got no {', '.join(lacking)}, expected {', '.join(fields)}"
                )
        side = token_side(self.host["vision_config"])
        if self.image_size % side:
            raise ValueError(
                f"image_size: got {self.image_size}, expected a multiple of {side}, the side of what becomes one token"
            )
        if (self.image_size // side) ** 2 > MOST_TOKENS:
            raise ValueError(
                f"image_size: got {self.image_size}, expected at most {MOST_TOKENS} tokens of {side} x {side} pixels"
            )


# --- tokens ---


def enclose_texts(tokenizer):
    """The same tokenizer, a text between two tokens, as BERT's [CLS] and [SEP]: by these alone is
    an empty text known.

    Qwen's own puts nothing around a text; then <|im_start|> and <|im_end|> serve, which sequences
    leave out (`token_ids`, "drop")."""
    from tokenizers.processors import TemplateProcessing

    if tokenizer("")["input_ids"]:
        return tokenizer
    tokenizer.add_special_tokens({"cls_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    ends = [
        (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")
    ]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=ends,
    )
    return tokenizer


def add_vision_tokens(tokenizer):
    """The same tokenizer, with <|vision_start|>, <|vision_end|>, <|image_pad|> and <|endoftext|> as
    special tokens.
    """
    missing = [token for token in VISION_TOKENS.values() if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def token_ids(tokenizer) -> dict:
    """Ids that `assemble` needs, as plain values for a config's `tokens`.

    vision_start, vision_end, image, end, pad; "drop": ids around a text that its sequence leaves
    out ([CLS], [SEP]); "prompts": the ids of each prompt, by what it speaks of (KINDS). ValueError
    where a token is missing."""
    vocabulary = tokenizer.get_vocab()
    for token in VISION_TOKENS.values():
        if token not in vocabulary:
            raise ValueError(
                f"tokenizer has no token {token}; add_vision_tokens(tokenizer) adds it"
            )
    ids = {name: vocabulary[token] for name, token in VISION_TOKENS.items()}
    ids["pad"] = ids["end"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids["drop"] = [
        token for token in (tokenizer.cls_token_id, tokenizer.sep_token_id) if token is not None
    ]
    ids["prompts"] = {
        kind: tokenizer(PROMPT.format(kind), add_special_tokens=False)["input_ids"]
        for kind in KINDS
    }
    return ids


# --- pictures ---


def patches(
    pixel_values: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) or videos (B, frames, 3, H, W) as the vision tower takes them, in
    Qwen2VLImageProcessor's layout.

    Returns rows (B * n, 3 * t * p * p), the patches that merge into one token side by side, and
    grid_thw (B, 3) int64. A picture is t equal frames. Raises ValueError where sides or frames are
    no multiples of what becomes one token."""
    t, p, m = temporal_patch_size, patch_size, merge_size
    if pixel_values.ndim == 4:
        pixel_values = pixel_values[:, None].expand(-1, t, -1, -1, -1)
    batch, frames, channels, height, width = pixel_values.shape
    if height % (p * m) or width % (p * m) or frames % t:
        got = f"{frames} frames of {height} x {width}"
        raise ValueError(
            f"pixel_values takes sides in multiples of {p * m} and frames in multiples of {t}, got {got}"
        )
    grid = (frames // t, height // p, width // p)
    x = pixel_values.reshape(batch, grid[0], t, channels, grid[1] // m, m, p, grid[2] // m, m, p)
    rows = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, channels * t * p * p)
    return rows, torch.tensor([grid], device=rows.device).expand(batch, -1)


def picture_tokens(
    host: nn.Module,
    pixel_values: Tensor,
    present: Tensor | None,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Tokens of all pictures (B, n, D), and their grid in tokens (time, rows, columns).

    Pixels of absent pictures are not looked at, but the tower runs on zeros in their place: its
    parameters take part in every step. ``present`` (B,) bool, None = all."""
    c = host.config.vision_config
    if pixel_values.ndim == 5 and host.config.model_type != "qwen2_vl":
        raise ValueError(
            f"pixel_values takes videos with model_type 'qwen2_vl', got {host.config.model_type!r}"
        )
    if pixel_values.ndim not in (4, 5) or pixel_values.shape[-3] != c.in_channels:
        raise ValueError(
            f"pixel_values must have shape (B, 3, H, W) or (B, frames, 3, H, W), got {tuple(pixel_values.shape)}"
        )
    check_flags("image_present", present, pixel_values.shape[:1])
    if present is not None:
        pixel_values = pixel_values.masked_fill(
            ~present.view(-1, *(1,) * (pixel_values.ndim - 1)), 0
        )
    rows, grid = patches(pixel_values, c.patch_size, c.temporal_patch_size, c.spatial_merge_size)
    features = host.visual(rows.to(host.visual.dtype), grid_thw=grid).pooler_output
    side = c.patch_size * c.spatial_merge_size
    times = 1 if pixel_values.ndim == 4 else pixel_values.shape[1] // c.temporal_patch_size
    height, width = pixel_values.shape[-2:]
    return features.view(len(grid), -1, features.shape[-1]), (times, height // side, width // side)


def read_pictures(
    host: nn.Module,
    size: int,
    pixel_values,
    image_tokens,
    present,
) -> tuple[Tensor, tuple[int, int, int]]:
    """`picture_tokens` of the pixels; or of pictures of ``size`` x ``size`` the tokens (B, n, D)
    that are given instead.

    With tokens the vision tower does not run: freeze it.
    """
    one_source("pixel_values and image_tokens", pixel_values, image_tokens)
    if image_tokens is None:
        return picture_tokens(host, pixel_values, present)
    c = host.config.vision_config
    side = size // (c.patch_size * c.spatial_merge_size)
    takes = (side * side, host.config.text_config.hidden_size)
    if image_tokens.ndim != 3 or tuple(image_tokens.shape[1:]) != takes:
        raise ValueError(
            f"image_tokens must have shape (B, {takes[0]}, {takes[1]}), got {tuple(image_tokens.shape)}"
        )
    check_flags("image_present", present, image_tokens.shape[:1])
    if present is not None:
        image_tokens = image_tokens.masked_fill(~present[:, None, None], 0)
    return image_tokens, (1, side, side)


# --- sequences ---


def assemble(
    tokens: dict,
    grid: tuple[int, int, int],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_present: Tensor | None,
    view: str | Tensor = "both",
    *,
    video: bool = False,
    prompt: bool = True,
) -> Sequence:
    """The sequences of a batch.

    Args: tokens: see `token_ids`. grid: a picture's tokens (time, rows, columns), as
        `picture_tokens` returns it. input_ids: (B, T) int64, with attention_mask (B, T), 1 = real,
        None = all; ids in tokens["drop"] count as padding, and a
            text without any other is missing.
        image_present: (B,) bool, None = all.
        view: "image", "text" or "both", or for each item the index of one in `retrieval.VIEWS`,
        (B,) int64.
        video: the pictures are videos, and the prompt says so.
        prompt: False leaves prompt and end token out; a sequence of nothing is then the end token
        alone.

    The prompt speaks of what is there, so that "both" of a text alone is its "text"; an item of
    nothing gets the text's."""
    has_image, real_text = visible(tokens, input_ids, attention_mask, image_present, view)
    has_text, device = real_text.any(1), input_ids.device
    count, batch = grid[0] * grid[1] * grid[2], len(input_ids)
    kind = torch.where(has_image, (3 if video else 1) + has_text.long(), 0)  # in KINDS
    prompt_ids, prompt_real = prompt_table(tokens, prompt, device)
    front = torch.tensor(
        [tokens["vision_start"], *[tokens["image"]] * count, tokens["vision_end"]], device=device
    )
    end = torch.full((batch, 1), tokens["end"], device=device)
    needs_end = (
        end.new_ones(batch, 1, dtype=torch.bool) if prompt else ~(has_image | has_text)[:, None]
    )
    ids = torch.cat([front.expand(batch, -1), input_ids, prompt_ids[kind], end], 1)
    real = torch.cat(
        [has_image[:, None].expand(-1, count + 2), real_text, prompt_real[kind], needs_end], 1
    )

    picture = grid_positions(grid, device)  # (3, count + 2)
    after = (picture[:, -1:, None] + 1) * has_image[:, None]  # (3, B, 1): where the words begin
    words = real[:, count + 2 :].long().cumsum(1) - 1 + after
    positions = torch.cat([picture[:, None].expand(-1, batch, -1), words], 2) * real
    slot = torch.arange(-1, ids.shape[1] - 1, device=device)
    slot = torch.where(real & (slot < count), slot, -1)  # a picture's k-th token has slot k

    order = real.long().argsort(dim=1, stable=True)  # padding first, the rest as it was
    real, slot = real.gather(1, order), slot.gather(1, order)
    ids = ids.gather(1, order).masked_fill(~real, tokens["pad"])
    return Sequence(
        ids, real.long(), positions.gather(2, order.expand(3, -1, -1)), slot, has_image, has_text
    )


def visible(tokens, input_ids, attention_mask, image_present, view) -> tuple[Tensor, Tensor]:
    """What a view shows: of each item its picture (B,) bool, and the tokens of its text (B, T)
    bool.
    """
    if input_ids is None:
        raise ValueError(
            "input_ids: got None, expected the ids of each item's text, padding alone where it has none"
        )
    if input_ids.ndim != 2 or (
        attention_mask is not None and attention_mask.shape != input_ids.shape
    ):
        mask = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            f"input_ids and attention_mask must both be (B, T), got {tuple(input_ids.shape)} and {mask}"
        )
    check_flags("image_present", image_present, input_ids.shape[:1])
    real = (
        torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is None
        else attention_mask != 0
    )
    for dropped in tokens["drop"]:
        real = real & (input_ids != dropped)
    image = real.new_ones(len(real)) if image_present is None else image_present
    if isinstance(view, str):
        view = torch.full_like(input_ids[:, 0], VIEWS.index(view))
    return image & (view != VIEWS.index("text")), real & (view != VIEWS.index("image"))[:, None]


def prompt_table(tokens: dict, prompt: bool, device) -> tuple[Tensor, Tensor]:
    """Ids (kinds, P) and which are real; P = 0 without prompts."""
    prompts = [tokens["prompts"][kind] if prompt else [] for kind in KINDS]
    longest = max(map(len, prompts))
    ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    real = [[slot < len(prompt) for slot in range(longest)] for prompt in prompts]
    return torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor(
        real, dtype=torch.bool, device=device
    )


def grid_positions(grid: tuple[int, int, int], device) -> Tensor:
    """M-RoPE positions (3, n + 2) of <|vision_start|>, the picture's tokens and <|vision_end|>.

    The last goes on from the largest position of the three axes, as the Qwen2-VL paper says;
    transformers 5 leaves time out, which is the same unless a video has more token times than rows
    and columns."""
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    inner = 1 + torch.stack(axes).flatten(1)
    ends = torch.tensor([0, 1 + max(grid)], device=device).expand(3, 2)
    return torch.cat([ends[:, :1], inner, ends[:, 1:]], 1)


def hidden_states(host: nn.Module, sequence: Sequence, pictures: Tensor, **options) -> Tensor:
    """(B, L, D): the language model's last hidden states, with the ``pictures``' tokens (B, n, D)
    in their slots.

    ``options`` go to its layers as they are.
    """
    embedding = host.language_model.embed_tokens
    check_range("input_ids", sequence.input_ids, embedding.num_embeddings)
    ids, poison = contain(sequence.input_ids, embedding.num_embeddings)
    words = embedding(ids)
    words = words + poison[..., None].to(words.dtype)
    slot = sequence.picture_slot[..., None]
    placed = pictures.to(words.dtype).gather(1, slot.clamp(min=0).expand(-1, -1, words.shape[-1]))
    return host.language_model(
        inputs_embeds=torch.where(slot >= 0, placed, words),
        attention_mask=sequence.attention_mask,
        position_ids=sequence.position_ids,
        use_cache=False,
        **options,
    ).last_hidden_state
