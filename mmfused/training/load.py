"""A trained model with all that measuring it needs: its tokenizer, its batches, how it computes."""

from __future__ import annotations

from pathlib import Path

import torch

from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.training.run_folder import load_saved, read_settings, sha256
from mmfused.training.setup import (
    VAL_BATCH_SIZE,
    check_backend,
    load_folder,
    make_collate,
    make_val_batches,
    pick_device,
    use_amp,
)


class Trained:
    """``settings`` as the run has them; ``model`` on its device, in evaluation mode."""

    def __init__(self, folder: Path, model, tokenizer, settings: dict, device: torch.device):
        self.name, self.task = (
            settings["training"]["model"],
            MODELS[settings["training"]["model"]].task,
        )
        self.folder, self.tokenizer, self.settings, self.device = (
            folder,
            tokenizer,
            settings,
            device,
        )
        self.model = model.to(device)
        self.amp = use_amp(settings["training"].get("amp", "off"), device)

    @property
    def digest(self) -> str:
        return sha256(self.folder / "model.safetensors")

    def must_retrieve(self, command: str) -> None:
        if self.task != "retrieval":
            raise ValueError(
                f"checkpoint: {self.folder} holds {self.name}, a classifier; {command} takes a retrieval model"
            )

    def batches(
        self,
        data: str,
        batch_size: int | None = None,
        text_column: str = "text",
        num_classes: int | None = None,
        name: str = "data",
    ) -> tuple[object, product_data.Batches]:
        """The items of a folder, or of the generated validation set, and batches of them in order.

        ``name`` is the argument's in errors. With ``num_classes``, rows of a label that is not
        below it are among the skipped ones."""
        if data == "generated":
            rows = product_data.GeneratedProducts("val")
        else:
            options = {
                "image_size": self.model.picture_size,
                "text_column": text_column,
                "num_classes": num_classes,
            }
            rows = load_folder(name, data, **options)
        collate = make_collate(
            self.tokenizer,
            self.model.picture_size,
            self.settings["training"]["max_length"],
            self.model.config,
        )
        return rows, make_val_batches(rows, collate, batch_size or VAL_BATCH_SIZE)


def load_trained(
    folder: str,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Trained:
    """Raises as :func:`mmfused.training.run_folder.load_run`, and ValueError for a backend or
    device that is not to be had.
    """
    where = pick_device(device)
    settings = read_settings(Path(folder))
    model, tokenizer = load_saved(Path(folder), settings)
    trained = Trained(Path(folder), model, tokenizer, settings, where)
    check_backend(backend, where, torch.bfloat16 if trained.amp else torch.float32)
    if threads:
        torch.set_num_threads(threads)
    return trained
