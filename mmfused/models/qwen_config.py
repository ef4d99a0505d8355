"""Base of the configurations of models with a Qwen2-VL as host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from mmfused.models.config import ModelConfig, check_sizes
from mmfused.models.fields import Options, check_field, check_fields
from mmfused.models.qwen_host import check_host, token_side
from mmfused.models.qwen_tokens import (
    KINDS,
    SPECIAL_TOKENS,
    add_vision_tokens,
    enclose_texts,
    token_ids,
)

# The kinds of the fields of a config's `tokens`. "video" depends on the tokenizer, and configs of
# earlier versions have no "chat".
_PROMPTS: dict[str, object] = dict.fromkeys(KINDS, list[int])
REQUIRED_TOKENS: dict[str, object] = {
    **dict.fromkeys((*SPECIAL_TOKENS, "pad"), int),
    "drop": list[int],
    "prompts": _PROMPTS,
}
TOKENS: dict[str, object] = {
    **REQUIRED_TOKENS,
    "video": int,
    "chat": {"start": list[int], "prompts": _PROMPTS},
}
MAX_PICTURE_TOKENS = 1 << 16


class HostedConfig(ModelConfig):
    """Base of the configs with a host.

    `host` holds the options of `build_qwen2_vl`. `tokens` is the result of `token_ids`.
    `image_size` is the side of the pictures in pixels.

    In `preset`, `patch_size` is the side in pixels of a token, which merges several patches of the
    vision tower. `host` updates the preset's host, part by part. A `host` with a `model_type`
    replaces the preset's host. Pictures then have 16 x 16 tokens unless `image_size` is given.
    """

    UNKNOWN: ClassVar[dict[str, Any]] = {  # placeholder, see ModelConfig
        "tokens": {
            **dict.fromkeys(SPECIAL_TOKENS, 0),
            "pad": 0,
            "drop": [],
            "prompts": dict.fromkeys(KINDS, []),
            "chat": {"start": [], "prompts": dict.fromkeys(KINDS, [])},
        }
    }

    if TYPE_CHECKING:
        host: Options
        tokens: Options | None
        image_size: int

    @classmethod
    def replaced(
        cls,
        values: dict[str, Any],
        changes: dict[str, Any],
        *,
        vocab_size: int | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
    ) -> dict[str, Any]:
        """Return the field ``values`` after ``changes``, which act on them as on a preset's."""
        check_sizes(vocab_size=vocab_size, image_size=image_size, patch_size=patch_size)
        result, old, host = {**values, **changes}, values["host"], changes.get("host", {})
        check_field("host", host, dict)
        for part in ("text_config", "vision_config"):
            check_field(f"host.{part}", host.get(part, {}), dict)
        if "model_type" in host:
            image_size = image_size or 16 * token_side(host.get("vision_config", {}))
        else:
            merge = old["vision_config"].get("spatial_merge_size", 2)
            if patch_size is not None and patch_size % merge:
                expected = f"a multiple of {merge}, the number of patches on a token's side"
                raise ValueError(f"patch_size: got {patch_size}, expected {expected}")
            text = {} if vocab_size is None else {"vocab_size": vocab_size}
            vision = {} if patch_size is None else {"patch_size": patch_size // merge}
            parts = {
                part: {**old[part], **sizes, **host.get(part, {})}
                for part, sizes in (("text_config", text), ("vision_config", vision))
            }
            result["host"] = {**old, **host, **parts}
        if image_size is not None and "image_size" not in changes:
            result["image_size"] = image_size
        return result

    @property
    def picture_size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.image_size

    @staticmethod
    def prepare_tokenizer(tokenizer: Any) -> Any:
        """Add the model's special tokens to the tokenizer in place, and return the tokenizer."""
        return add_vision_tokens(enclose_texts(tokenizer))

    @staticmethod
    def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of `preset` that depend on the tokenizer."""
        return {"vocab_size": len(tokenizer), "tokens": token_ids(tokenizer)}

    def check_host_and_tokens(self) -> None:
        """Require valid `host` options, all `tokens`, and an `image_size` of whole tokens."""
        check_host(self.host)
        if self.tokens is None:
            expected = "the result of mmfused.models.qwen.token_ids(tokenizer)"
            raise ValueError(f"tokens: got None, expected {expected}")
        check_fields("tokens", self.tokens, TOKENS)
        prompts = self.tokens.get("prompts") or {}
        _check_present("tokens", self.tokens, REQUIRED_TOKENS)
        _check_present("tokens.prompts", prompts, KINDS)
        chat = self.tokens.get("chat")
        if chat is not None:
            _check_present("tokens.chat", chat, ("start", "prompts"))
            _check_present("tokens.chat.prompts", chat["prompts"], KINDS)
        side = token_side(self.host["vision_config"])
        got = f"image_size: got {self.image_size}"
        if self.image_size % side:
            expected = f"a multiple of {side}, the side of a token in pixels"
            raise ValueError(f"{got}, expected {expected}")
        if (self.image_size // side) ** 2 > MAX_PICTURE_TOKENS:
            expected = f"at most {MAX_PICTURE_TOKENS} tokens of {side} x {side} pixels"
            raise ValueError(f"{got}, expected {expected}")


def _check_present(name: str, values: dict[str, Any], fields: Iterable[str]) -> None:
    """Require that a dict has a value for each of the fields."""
    lacking = [field for field in fields if values.get(field) is None]
    if lacking:
        raise ValueError(
            f"{name}: got a dict without {', '.join(lacking)}, expected {', '.join(fields)}"
        )
