"""What the models' configs have in common: plain values in and out, and presets with other values put in."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


class ModelConfig:
    """Base of the dataclasses that configure the models."""

    PRESETS: ClassVar[dict[str, dict]]

    @classmethod
    def preset(cls, name: str = "tiny", *, vocab_size=None, image_size=None, patch_size=None, **overrides):
        """The named preset with other values put in; `image` and `text` update the preset's dicts, or are None.

        With a `name` (of a timm model) or a `model_type` (of transformers) in it, a dict takes the preset's place.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"name must be one of {', '.join(cls.PRESETS)}, got {name!r}")
        values = {**cls.PRESETS[name], **overrides}
        given = {"image": {"img_size": image_size, "patch_size": patch_size}, "text": {"vocab_size": vocab_size}}
        for part, sizes in given.items():
            if values.get(part) is not None:
                sizes = {key: value for key, value in sizes.items() if value is not None}
                own = overrides.get(part, {})
                another = "name" in own or "model_type" in own  # another architecture: the preset's sizes are not its own
                values[part] = own if another else {**cls.PRESETS[name][part], **sizes, **own}
        return cls.from_dict(values)

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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict):
        """The inverse of `to_dict`; an unknown name raises ValueError."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} has no field named {', '.join(unknown)}")
        return cls(**values)

    def freeze_lists(self) -> None:
        """Lists, as JSON gives them back, become the tuples they were."""
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                setattr(self, field.name, tuple(getattr(self, field.name)))

    def check_choices(self, choices: dict[str, tuple]) -> None:
        """ValueError where a field is none of its choices; of a tuple, any of its values."""
        for name, allowed in choices.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one not in allowed:
                    verb = "takes some of" if isinstance(value, tuple) else "must be one of"
                    raise ValueError(f"{name} {verb} {', '.join(map(str, allowed))}, got {one!r}")

    def check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
