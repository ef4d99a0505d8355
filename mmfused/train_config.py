"""What a training run can be told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

MODALITIES = ("both", "image", "text")
PRECISIONS = ("auto", "bf16", "off")
# What may differ when a run goes on: where it runs and how much of it is shown or kept, not what it computes.
# The papers' own settings, where a preset has any; what is given on the command line goes before them.
RECIPES = {
    name: {"lr": 2e-5, "weight_decay": 0.01, "epochs": 15, "batch_size": 128, "max_length": 512} for name in ("paper", "code")
}
FREE = {"out", "threads", "device", "progress", "overwrite", "resume", "save_every", "keep"}


@dataclass
class TrainConfig:
    """What one run needs; ``out`` is its folder. Lengths of training: ``steps``, or else ``epochs``.

    A step is one update of the weights, from ``accumulate`` batches of ``batch_size``. ``amp``: "bf16" computes under
    autocast, "auto" does so on CUDA cards that have bf16. A checkpoint every ``save_every`` steps (None: at every
    validation) and at the end; the ``keep`` newest stay. ``resume`` goes on from the newest one, if there is any.
    ``image_encoder`` and ``text_encoder``: pretrained ones to begin with, folders or names (:mod:`mmfused.models.encoders`).
    Raises ValueError for values out of range.
    """

    out: str
    data: str = "generated"
    val: str | None = None
    model: str = "fluid"
    preset: str = "tiny"
    model_options: dict = field(default_factory=dict)
    image_encoder: str | None = None
    text_encoder: str | None = None
    backend: str = "auto"
    amp: str = "auto"
    modalities: str = "both"
    steps: int | None = None
    epochs: float = 60
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    augment: bool | None = None
    swap_text: float = 0.0
    drop_image: float = 0.0
    drop_text: float = 0.0
    image_size: int | None = None
    patch_size: int | None = None
    max_length: int = 64
    vocab_size: int = 2000
    tokenizer: str | None = None
    threads: int | None = None
    device: str = "auto"
    log_every: int = 1
    val_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    progress: bool = True
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self):
        if self.model != "fluid":
            raise ValueError(f"model: got {self.model!r}, takes 'fluid'")
        for name, choices in (("modalities", MODALITIES), ("amp", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes one of {', '.join(choices)}")
        positive = "steps epochs batch_size accumulate lr clip image_size patch_size threads log_every val_every save_every keep"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, takes a number above 0")
        for name in ("swap_text", "drop_image", "drop_text", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a fraction from 0 to 1")
        if self.drop_image + self.drop_text > 1:
            raise ValueError(f"drop_image and drop_text: got {self.drop_image} and {self.drop_text}, take a sum of at most 1")
        for name, absent in (("image_encoder", "text"), ("text_encoder", "image")):
            if getattr(self, name) and self.modalities == absent:
                raise ValueError(f"{name}: got {getattr(self, name)!r} with modalities {absent!r}, takes modalities that use it")
        if self.image_encoder and self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size} with image_encoder, takes none: the encoder has its own")
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume: got both, take one: a run is begun anew or gone on with")

    def to_dict(self) -> dict:
        """Plain values that JSON holds and gives back the same."""
        return json.loads(json.dumps(asdict(self)))

    def check_same(self, saved: dict, where) -> None:
        """Raises ValueError naming the first value that differs from ``saved``, the ``to_dict`` of the run in ``where``."""
        for name, value in self.to_dict().items():
            if name in saved and name not in FREE and saved[name] != value:
                raise ValueError(f"resume: {name} is {value!r}, but {where} was trained with {saved[name]!r}; take that one")
