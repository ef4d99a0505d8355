"""What the models' configs have in common: plain values in and out, and presets with other values
put in.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import ClassVar

from mmfused.json_files import one_line
from mmfused.models.encoders import check_image, check_text, picture_size
from mmfused.models.fields import check_field, shown
from mmfused.models.weights import on_meta


class AbsentPart(ValueError):
    """A part is to be left out that the other settings leave no place for anyway."""


class ModelConfig:
    """Base of the dataclasses that configure the models."""

    PRESETS: ClassVar[dict[str, dict]]
    UNKNOWN: ClassVar[
        dict
    ] = {}  # stands for what is known only with the data: number of classes, tokens

    @classmethod
    def preset(
        cls,
        name: str = "tiny",
        *,
        vocab_size=None,
        image_size=None,
        patch_size=None,
        **overrides,
    ):
        """The named preset with other values put in; `image` and `text` update the preset's dicts,
        or are None.

        With a `name` (of a timm model) or a `model_type` (of transformers) in it, a dict takes the
        preset's place."""
        usual = cls.values_of(name)
        check_sizes(vocab_size=vocab_size, image_size=image_size, patch_size=patch_size)
        values = {**usual, **overrides}
        given = {
            "image": {"img_size": image_size, "patch_size": patch_size},
            "text": {"vocab_size": vocab_size},
        }
        for part, sizes in given.items():
            check_field(part, values.get(part), dict | None)
            if values.get(part) is not None:
                sizes = {key: value for key, value in sizes.items() if value is not None}
                own = overrides.get(part, {})
                another = (
                    "name" in own or "model_type" in own
                )  # another architecture: the preset's sizes are not its own
                values[part] = own if another else {**usual[part], **sizes, **own}
        return cls.from_dict(values)

    @classmethod
    def values_of(cls, preset: str) -> dict:
        if preset not in cls.PRESETS:
            raise ValueError(
                f"preset: got {shown(preset)}, expected one of {', '.join(cls.PRESETS)}"
            )
        return cls.PRESETS[preset]

    @classmethod
    def picture_size_of(cls, preset: str = "tiny", **options) -> int | None:
        """`picture_size` of what :meth:`preset` gives, before the data and the tokenizer are known."""
        return cls.preset(preset, **{**cls.UNKNOWN, **options}).picture_size

    @property
    def picture_size(self) -> int | None:
        """Side of the pictures that the model's image encoder takes, None: it has none."""
        if self.image is None or getattr(self, "modalities", "both") == "text":
            return None
        return picture_size(self.image_dim, self.image)

    @staticmethod
    def prepare_tokenizer(tokenizer):
        """The tokenizer with the special tokens that the model needs."""
        return tokenizer

    @staticmethod
    def of_tokenizer(tokenizer) -> dict:
        """What `preset` has to know of the tokenizer."""
        return {"vocab_size": len(tokenizer)}

    def to_dict(self) -> dict:
        """Plain values that JSON can hold."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict):
        """The inverse of `to_dict`; ValueError for a field that there is not, that lacks, or whose
        value is none it takes.
        """
        check_field("model", values, dict)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(
                    f"{cls.__name__}: got a field {shown(name)}, expected {', '.join(fields)}"
                )
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ValueError(f"{name}: got nothing, and {cls.__name__} has no default for it")
        return cls(**values)

    def __post_init__(self) -> None:
        """Lists, as JSON gives them back, become the tuples they were; ValueError for a value of
        another type or out of bounds.
        """
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_field(field.name, value, kinds[field.name])
            if isinstance(value, list):
                setattr(self, field.name, tuple(value))
        for name, check in (("image", check_image), ("text", check_text)):
            if getattr(self, name, None) is not None:
                check(getattr(self, name))
        if not min(self.pixel_std) > 0:
            raise ValueError(f"pixel_std: got {self.pixel_std}, expected 3 numbers above 0")

    def check_choices(self, choices: dict[str, tuple]) -> None:
        """ValueError where a field is none of its choices; of a tuple, any of its values."""
        for name, allowed in choices.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one not in allowed:
                    takes = "some of" if isinstance(value, tuple) else "one of"
                    raise ValueError(
                        f"{name}: got {shown(one)}, expected {takes} {', '.join(map(str, allowed))}"
                    )

    def check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")


def check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        check_field(name, size, int | None)


def shapes_of(kind, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the state_dict of ``kind.model(config)``, `kind` one of `mmfused.models.MODELS`,
    without its memory.

    To compare with a file's before either is in memory. ValueError where the config makes no model.
    """
    try:
        with on_meta():
            model = kind.model(config)
    except (ImportError, ValueError):
        raise
    except Exception as error:
        raise ValueError(
            f"model: got a {type(config).__name__} that makes none: {one_line(error)}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
