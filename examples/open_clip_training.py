"""Train an open_clip model with open_clip's own loop, its loss and pooling fused.

The loop is open_clip_train's train_one_epoch with the arguments of its command line. It runs with
--accum-freq 1, and with 2, which caches the features of several batches for one loss. Each is
trained unchanged, and with mmfused.fuse(model) and mmfused.fuse(loss), from the same weights. The
losses must be equal up to rounding.

Run it on a CPU: python examples/open_clip_training.py
"""

import argparse
import copy
import sys

import open_clip
import torch
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mmfused

# float32 rounds to 6e-8. The fused loss adds up in another order than the matrix of logits, and
# each step of the optimizer passes the differences on.
TOLERANCE = 1e-4

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "width": 64,
    "layers": 2,
    "head_width": 16,
    "attentional_pool": True,
    "attn_pooler_queries": 4,
    "attn_pooler_heads": 4,
}
TEXT = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}


class Losses(list[float]):
    """A writer like TensorBoard's, which keeps the loss of each step."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            self.append(value)


class Pairs:
    """128 random images, each with a text of three words of its own, as open_clip_train reads data.

    open_clip_train.data.DataInfo is the same for webdataset, CSV files and ImageNet.
    """

    def __init__(self, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(128, 3, 32, 32, generator=generator)
        texts = torch.zeros(128, 8, dtype=torch.long)
        texts[:, :3] = torch.randint(1, 98, (128, 3), generator=generator)
        texts[:, 3] = 99  # the end of the text, which open_clip finds as the largest number
        self.dataloader = DataLoader(TensorDataset(images, texts), batch_size)
        self.dataloader.num_batches = len(self.dataloader)
        self.dataloader.num_samples = len(images)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, as the order is the same in each epoch."""


def arguments(accum_freq: int) -> argparse.Namespace:
    """Return the arguments of open_clip_train.main, with what it adds for one process."""
    args = parse_args(
        ["--batch-size", "16", "--accum-freq", str(accum_freq), "--precision", "fp32"]
        + ["--lr", "1e-3", "--epochs", "3", "--warmup", "2", "--log-every-n-steps", "1"]
    )
    args.device, args.rank, args.world_size, args.wandb, args.distill = "cpu", 0, 1, False, False
    return args


def train(model: open_clip.CLIP, loss: nn.Module, args: argparse.Namespace) -> list[float]:
    data = {"train": Pairs(args.batch_size)}
    steps = args.epochs * len(data["train"].dataloader) // args.accum_freq
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = cosine_lr(optimizer, args.lr, args.warmup, steps)
    losses = Losses()
    for epoch in range(args.epochs):
        train_one_epoch(
            model, data, loss, epoch, optimizer, None, scheduler, None, args, tb_writer=losses
        )
    return losses


def main() -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)
    fused_model = copy.deepcopy(model)
    print(mmfused.fuse(fused_model))
    differences = []
    for accum_freq in (1, 2):
        args = arguments(accum_freq)
        loss, fused_loss = open_clip.create_loss(args), open_clip.create_loss(args)
        print(mmfused.fuse(fused_loss))
        plain = train(copy.deepcopy(model), loss, args)
        fused = train(copy.deepcopy(fused_model), fused_loss, args)
        print(f"\n--accum-freq {accum_freq}\nstep     plain    fused")
        for step, (a, b) in enumerate(zip(plain, fused, strict=True)):
            print(f"{step:4}  {a:8.5f}  {b:8.5f}")
            differences.append(abs(b / a - 1))
    difference = torch.tensor(differences).max()  # unlike Python's max, passes NaN on
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE:.0e}.")
    print(f"The largest relative difference is {difference:.1e}.")


if __name__ == "__main__":
    main()
