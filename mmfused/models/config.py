"""Base class of the models' configurations: presets, conversion to and from JSON, validation."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import Self

from mmfused.json_files import one_line
from mmfused.models.encoders import check_image, picture_size
from mmfused.models.fields import Options, check_field, shown
from mmfused.models.lora import add_lora
from mmfused.models.presets import Presets
from mmfused.models.text_padding import check_text_encoder
from mmfused.models.weights import on_meta

if TYPE_CHECKING:
    from mmfused.models import Kind

# The config fields that hold an encoder's options, and the functions that check the options.
ENCODER_CHECKS = {"image": check_image, "text": check_text_encoder}


class AbsentPart(ValueError):
    """Error for an ablation of a part that the model's other settings already exclude."""


def absent_part(part: str, setting: str, expected: str) -> AbsentPart:
    """Return the error for an ablation of ``part``, which ``setting`` already excludes."""
    return AbsentPart(
        f"without: got {part!r} with {setting}, which already excludes it, expected {expected}"
    )


class ModelConfig:
    """Base of the dataclasses that configure the models.

    The constructor raises ValueError if a field has a wrong type, is out of bounds or contradicts
    another field.

    Examples:
        >>> from mmfused.models import ModelConfig, UniECSConfig
        >>> config = UniECSConfig.preset("tiny", vocab_size=500, dim=64)
        >>> isinstance(config, ModelConfig), config.dim, config.text["vocab_size"]
        (True, 64, 500)
        >>> UniECSConfig.from_dict(config.to_dict()) == config  # to_dict is ready for JSON
        True
    """

    PRESETS: ClassVar[Presets]
    # Values that `picture_size_of` gives to required fields that depend on the data.
    UNKNOWN: ClassVar[dict[str, Any]] = {}

    if TYPE_CHECKING:
        pixel_std: tuple[float, float, float]

    @classmethod
    def preset(
        cls,
        name: str = "tiny",
        *,
        vocab_size: int | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        **overrides: Any,
    ) -> Self:
        """Return the named preset with some of its fields replaced.

        The dicts `image` and `text` update the preset's dicts; None removes the encoder. A dict
        with a `name` (of a timm model) or a `model_type` (of transformers) replaces the preset's
        dict, because the preset's sizes belong to another architecture.

        Args:
            name: "tiny", "paper", or "code" if the model has it.
            vocab_size: size of the text encoder's vocabulary.
            image_size: side of the pictures, in pixels.
            patch_size: side of a patch, in pixels.
            overrides: fields of the config, and `pad_token_id`, the id of PAD in the vocabulary of
                a text encoder (see `of_tokenizer`).

        Raises:
            ValueError: the preset is unknown, or a field is unknown or invalid.
        """
        return cls.from_dict(
            cls.replaced(
                cls.values_of(name),
                overrides,
                vocab_size=vocab_size,
                image_size=image_size,
                patch_size=patch_size,
            )
        )

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
        """Return the field ``values`` after ``changes``, which act on them as on a preset's.

        The result is not checked: `from_dict` does.
        """
        changes = dict(changes)
        words = {"vocab_size": vocab_size, "pad_token_id": changes.pop("pad_token_id", None)}
        check_sizes(**words, image_size=image_size, patch_size=patch_size)
        result = {**values, **changes}
        sizes_of = {
            "image": {"img_size": image_size, "patch_size": patch_size},
            "text": words,
        }
        for part, sizes in sizes_of.items():
            check_field(part, result.get(part), dict | None)
            if result.get(part) is None:
                continue
            options = changes.get(part, {})
            if "name" in options or "model_type" in options:
                result[part] = options
            else:
                sizes = {key: value for key, value in sizes.items() if value is not None}
                result[part] = {**(values.get(part) or {}), **sizes, **options}
        return result

    @classmethod
    def values_of(cls, preset: str) -> dict[str, Any]:
        """Return the field values of a preset."""
        if preset not in cls.PRESETS:
            names = ", ".join(cls.PRESETS)
            raise ValueError(f"preset: got {shown(preset)}, expected one of {names}")
        return cls.PRESETS[preset]

    @classmethod
    def picture_size_of(cls, preset: str = "tiny", **options: Any) -> int | None:
        """Return the `picture_size` of a preset, without knowledge of the data."""
        return cls.preset(preset, **{**cls.UNKNOWN, **options}).picture_size

    @property
    def picture_size(self) -> int | None:
        """Side in pixels of the image encoder's pictures; None without an image encoder."""
        config: Any = self
        if config.image is None or getattr(self, "modalities", "both") == "text":
            return None
        return picture_size(config.image_dim, config.image)

    @staticmethod
    def prepare_tokenizer(tokenizer: Any) -> Any:
        """Add the model's special tokens to the tokenizer in place, and return the tokenizer."""
        return tokenizer

    @staticmethod
    def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of `preset` that depend on the tokenizer."""
        return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}

    @property
    def truncation_side(self) -> Literal["left", "right"] | None:
        """Side on which texts that are too long are truncated; None: that of the tokenizer."""
        return None

    def format_text(self, text: str) -> str:
        """Return a text as the tokenizer should get it."""
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can store."""
        values = dataclasses.asdict(typing.cast(Any, self))
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert `to_dict`; raise ValueError for an unknown, missing or invalid field."""
        check_field("model", values, dict)
        fields = cls._fields_of(values)
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ValueError(
                    f"{name}: got nothing, expected a value: {cls.__name__} has no default for it"
                )
        return cls(**values)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Require that each option is a field of the config, and of the field's type."""
        cls._fields_of(options)
        kinds = typing.get_type_hints(cls)
        for name, value in options.items():
            check_field(name, value, kinds[name])

    @classmethod
    def _fields_of(cls, values: dict[str, Any]) -> dict[str, dataclasses.Field[Any]]:
        """Return the config's fields by name, which must include those of ``values``."""
        fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
        for name in values:
            if name not in fields:
                expected = ", ".join(fields)
                raise ValueError(f"{cls.__name__}: got a field {shown(name)}, expected {expected}")
        return fields

    def __post_init__(self) -> None:
        """Check the fields, and turn lists into tuples."""
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            check_field(field.name, value, kinds[field.name])
            if isinstance(value, list):
                setattr(self, field.name, tuple(value))
        for name, check in ENCODER_CHECKS.items():
            options: Options | None = getattr(self, name, None)
            if options is not None:
                check(options)
        if not min(self.pixel_std) > 0:
            raise ValueError(f"pixel_std: got {self.pixel_std}, expected 3 numbers above 0")

    def check_positive(self, *names: str) -> None:
        """Require that these fields are above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")

    def check_divisor(self, name: str, of: str) -> None:
        """Require that one field divides another."""
        got, total = getattr(self, name), getattr(self, of)
        if total % got:
            raise ValueError(f"{name}: got {got}, expected a divisor of {of}={total}")

    def check_frozen(self, names: tuple[str, ...]) -> None:
        """Require that the config has the encoders ``names``, which are to be frozen."""
        for name in names:
            if getattr(self, name) is None:
                got = f"{name!r} with {name} None"
                raise ValueError(f"freeze: got {got}, expected encoders that the config has")

    def check_at_most(self, name: str, of: str) -> None:
        """Require that one field is no larger than another."""
        got, most = getattr(self, name), getattr(self, of)
        if got > most:
            raise ValueError(f"{name}: got {got}, expected at most {of}={most}")


def check_sizes(**sizes: object) -> None:
    """Require that each size is None or within the bounds of the field of that name."""
    for name, size in sizes.items():
        check_field(name, size, int | None)


def shapes_of(
    kind: Kind,
    config: ModelConfig,
    lora: Options | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the state_dict of ``kind.model(config)`` without allocating the model.

    The model has adapters if ``lora`` holds the options of `add_lora`.

    Raises:
        ValueError: the model cannot be built from the config.
    """
    state = meta_model(kind, config, lora).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def meta_model(kind: Kind, config: ModelConfig, lora: Options | None = None) -> Any:
    """Return the model of `shapes_of` on the meta device; raise like `shapes_of`."""
    try:
        with on_meta():
            model = kind.model(config)
            return model if lora is None else add_lora(model, **lora)
    except (ImportError, ValueError):
        raise
    except Exception as error:
        name, reason = type(config).__name__, one_line(error)
        raise ValueError(f"model: got a {name} that cannot build a model: {reason}") from error
