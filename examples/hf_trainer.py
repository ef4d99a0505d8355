"""Train a SigLIP model with transformers' Trainer, plain and fused.

``mmfused.fuse(model)`` before ``Trainer(model, ...)`` is the only change. The pooling head
of the image encoder then runs on ``mmfused.query_pooling``. Names of parameters and
checkpoints do not change. The model is small and has random weights; nothing is downloaded.

Run it on a CPU: python examples/hf_trainer.py
"""

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainingArguments,
)

import mmfused

# float32 rounds to 6e-8; the sums differ in order, and AdamW can enlarge the difference.
TOLERANCE = 1e-4


class CaptionedImages(Dataset):
    """Random images, each with a random caption of eight tokens."""

    def __init__(self, size: int):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(size, 3, 32, 32, generator=generator)
        self.captions = torch.randint(2, 100, (size, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "input_ids": self.captions[index]}


def collate(examples: list[dict[str, torch.Tensor]]) -> dict:
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    return {**batch, "return_loss": True}


def train(fused: bool) -> list[float]:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = SiglipConfig(
        text_config={
            **sizes,
            "vocab_size": 100,
            "max_position_embeddings": 8,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config)
    if fused:
        print(mmfused.fuse(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=8,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model, arguments, train_dataset=CaptionedImages(64), data_collator=collate
        )
        trainer.remove_callback(PrinterCallback)  # compare() prints the losses
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compare(plain: list[float], fused: list[float]) -> None:
    print("step     plain   mmfused")
    for step, (a, b) in enumerate(zip(plain, fused, strict=True), start=1):
        print(f"{step:4d}  {a:8.5f}  {b:8.5f}")
    losses = torch.tensor([plain, fused], dtype=torch.float64)
    difference = (losses[1] / losses[0] - 1).abs().max().item()
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE}.")
    print(f"The largest relative difference is {difference:.1e}.")


if __name__ == "__main__":
    compare(train(fused=False), train(fused=True))
