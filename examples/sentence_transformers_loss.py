"""Train a SentenceTransformer with MultipleNegativesRankingLoss, plain and fused.

``mmfused.fuse(loss)`` before ``SentenceTransformerTrainer(...)`` is the only change. The
loss then runs on ``mmfused.masked_info_nce``, without a matrix of the scores of all pairs.
A small BERT with random weights and a tokenizer of a few words are made in a temporary
folder; nothing is downloaded.

Run it on a CPU: python examples/sentence_transformers_loss.py
"""

import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast, PrinterCallback

import mmfused

# float32 rounds to 6e-8; the sums differ in order, and AdamW can enlarge the difference.
TOLERANCE = 1e-4
COLORS = "red green blue black white brown grey pink".split()
THINGS = "shoe shirt lamp chair table phone watch bag".split()


def make_encoder(folder: Path) -> None:
    """Write a BERT with random weights and its tokenizer to ``folder``."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "in", *COLORS, *THINGS]
    folder.joinpath("vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.2,  # with smaller weights, all sentences start alike
    )
    BertModel(config).save_pretrained(folder)


def make_pairs() -> Dataset:
    pairs = [(f"{color} {thing}", f"a {thing} in {color}") for color in COLORS for thing in THINGS]
    random.Random(1).shuffle(pairs)
    anchors, positives = zip(*pairs, strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def train(folder: Path, fused: bool) -> list[float]:
    encoder = Transformer(str(folder))
    pooling = Pooling(encoder.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[encoder, pooling], device="cpu")
    loss = MultipleNegativesRankingLoss(model)
    if fused:
        print(mmfused.fuse(loss))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=8,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=make_pairs(), loss=loss
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
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        make_encoder(Path(name))
        compare(train(Path(name), fused=False), train(Path(name), fused=True))
