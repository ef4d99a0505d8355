"""Base of the models' configurations: presets, JSON values in and out, checks of the fields."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from mmfused.json_files import one_line
from mmfused.models.encoders import check_image, check_text, picture_size
from mmfused.models.fields import Options, check_field, shown
from mmfused.models.presets import Presets
from mmfused.models.weights import on_meta

if TYPE_CHECKING:
    from mmfused.models import Kind

# The parts of a config that hold options of an encoder, and their checks.
ENCODERS = {"image": check_image, "text": check_text}


class AbsentPart(ValueError):
    """An ablation removes a part that the model does not have with its other settings."""


def absent_part(part: str, setting: str, expected: str) -> AbsentPart:
    """Return the error for an ablation that these settings make meaningless."""
    return AbsentPart(
        f"without: got {part!r} with {setting}, which has none anyway, expected {expected}"
    )


class ModelConfig:
    """Base of the dataclasses that configure the models.

    Constructors raise ValueError for a field of another type, out of bounds, or that does not fit
    the others.
    """

    PRESETS: ClassVar[Presets]
    # Stands for what is known only with the data: the number of classes, token ids.
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
        """Return the named preset with other values of its fields.

        The dicts `image` and `text` update those of the preset, or are None. With a `name` (of a
        timm model) or a `model_type` (of transformers) in it, a dict replaces the preset's: the
        preset's sizes belong to another architecture.
        """
        usual = cls.values_of(name)
        check_sizes(vocab_size=vocab_size, image_size=image_size, patch_size=patch_size)
        values = {**usual, **overrides}
        given = {
            "image": {"img_size": image_size, "patch_size": patch_size},
            "text": {"vocab_size": vocab_size},
        }
        for part, sizes in given.items():
            check_field(part, values.get(part), dict | None)
            if values.get(part) is None:
                continue
            own = overrides.get(part, {})
            if "name" in own or "model_type" in own:
                values[part] = own
            else:
                sizes = {key: value for key, value in sizes.items() if value is not None}
                values[part] = {**usual[part], **sizes, **own}
        return cls.from_dict(values)

    @classmethod
    def values_of(cls, preset: str) -> dict[str, Any]:
        """Return a preset's values."""
        if preset not in cls.PRESETS:
            names = ", ".join(cls.PRESETS)
            raise ValueError(f"preset: got {shown(preset)}, expected one of {names}")
        return cls.PRESETS[preset]

    @classmethod
    def picture_size_of(cls, preset: str = "tiny", **options: Any) -> int | None:
        """Return `picture_size` of a preset before the data and the tokenizer are known."""
        return cls.preset(preset, **{**cls.UNKNOWN, **options}).picture_size

    @property
    def picture_size(self) -> int | None:
        """Side of the pictures that the image encoder takes; None without an image encoder."""
        config: Any = self
        if config.image is None or getattr(self, "modalities", "both") == "text":
            return None
        return picture_size(config.image_dim, config.image)

    @staticmethod
    def prepare_tokenizer(tokenizer: Any) -> Any:
        """Return the tokenizer with the special tokens that the model needs."""
        return tokenizer

    @staticmethod
    def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of `preset` that depend on the tokenizer."""
        return {"vocab_size": len(tokenizer)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        values = dataclasses.asdict(typing.cast(Any, self))
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert `to_dict`; ValueError for an unknown or missing field, or a wrong value."""
        check_field("model", values, dict)
        fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
        for name in values:
            if name not in fields:
                expected = ", ".join(fields)
                raise ValueError(f"{cls.__name__}: got a field {shown(name)}, expected {expected}")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ValueError(
                    f"{name}: got nothing, expected a value: {cls.__name__} has no default for it"
                )
        return cls(**values)

    def __post_init__(self) -> None:
        """Check each field's type and bounds; lists, as JSON returns them, become tuples."""
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            check_field(field.name, value, kinds[field.name])
            if isinstance(value, list):
                setattr(self, field.name, tuple(value))
        for name, check in ENCODERS.items():
            options: Options | None = getattr(self, name, None)
            if options is not None:
                check(options)
        if not min(self.pixel_std) > 0:
            raise ValueError(f"pixel_std: got {self.pixel_std}, expected 3 numbers above 0")

    def check_positive(self, *names: str) -> None:
        """Require fields above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")

    def check_divisor(self, name: str, of: str) -> None:
        """Require that one field divides another."""
        got, total = getattr(self, name), getattr(self, of)
        if total % got:
            raise ValueError(f"{name}: got {got}, expected a divisor of {of}={total}")

    def check_frozen(self, names: tuple[str, ...]) -> None:
        """Require that the encoders to freeze exist."""
        for name in names:
            if getattr(self, name) is None:
                got = f"{name!r} with {name} None"
                raise ValueError(f"freeze: got {got}, expected a config with that encoder")

    def check_at_most(self, name: str, of: str) -> None:
        """Require that one field is no larger than another."""
        got, most = getattr(self, name), getattr(self, of)
        if got > most:
            raise ValueError(f"{name}: got {got}, expected at most {of}={most}")


def check_sizes(**sizes: object) -> None:
    """Require sizes within their bounds, or None."""
    for name, size in sizes.items():
        check_field(name, size, int | None)


def shapes_of(kind: Kind, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state_dict of ``kind.model(config)`` without allocating it.

    For comparison with a file before either is in memory. ValueError where the config makes no
    model.
    """
    try:
        with on_meta():
            model = kind.model(config)
    except (ImportError, ValueError):
        raise
    except Exception as error:
        name, reason = type(config).__name__, one_line(error)
        raise ValueError(f"model: got a {name} that makes none: {reason}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
