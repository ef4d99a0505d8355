"""Train a CLIP model under DistributedDataParallel without the matrix of logits.

Two processes train twice from the same weights: with the usual loss, which gathers the embeddings
with their gradients and computes all logits on each rank, and with mmfused.MaskedInfoNCE, which
gathers them itself. The losses must be equal up to rounding.

Run it on a CPU with either command, with one or several ranks:

    python examples/clip_loss_ddp.py
    torchrun --nproc-per-node 2 examples/clip_loss_ddp.py
"""

import math
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mmfused

RANKS, BATCH, EPOCHS = 2, 32, 4  # BATCH is that of one rank
# float32 rounds to 6e-8. The two losses add up in different orders, and each step of the optimizer
# passes the differences on. A gradient that lacks the rows of the other rank costs far more.
TOLERANCE = 1e-4


class GatheredClipLoss(nn.Module):
    """The usual loss: each rank computes the logits of all pairs of images and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        # torch 2.14 warns about all_gather here; torch 2.11 does not have its successor yet.
        image, text = (
            torch.cat(torch.distributed.nn.all_gather(F.normalize(x, dim=-1)))
            for x in (image, text)
        )
        logits = self.log_scale.exp() * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Clip(nn.Module):
    """Two encoders and the loss, in one module so that DDP averages the scale's gradient too."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.EmbeddingBag(100, 128), nn.GELU(), nn.Linear(128, 32))
        self.loss = loss

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.loss(self.image(image), self.text(text))


def train(loss: nn.Module) -> list[float]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Clip(loss))
    pairs = TensorDataset(torch.randn(256, 64), torch.randint(100, (256, 6)))
    sampler = DistributedSampler(pairs)
    loader = DataLoader(pairs, BATCH, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for image, text in loader:
            loss = model(image, text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # The mean over ranks is the loss of the whole batch. A rank's MaskedInfoNCE covers its
            # own rows; the usual loss is the same on all ranks.
            loss = loss.detach()
            dist.all_reduce(loss)
            losses.append(loss.item() / dist.get_world_size())
    return losses


def compare() -> None:
    plain = train(GatheredClipLoss())
    fused = train(
        mmfused.MaskedInfoNCE(learnable_temperature=True, symmetric=True, gather="global")
    )
    # Unlike Python's max, torch's passes NaN on.
    difference = torch.tensor([abs(b / a - 1) for a, b in zip(plain, fused, strict=True)]).max()
    if dist.get_rank() == 0:
        print("step     plain  MaskedInfoNCE")
        for step, (a, b) in enumerate(zip(plain, fused, strict=True)):
            print(f"{step:4}  {a:8.5f}  {b:13.5f}")
        print(f"The largest relative difference is {difference:.1e}.")
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE:.0e}.")
    dist.barrier()  # a rank that leaves while others still talk to it can abort


def run_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    compare()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        compare()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run_rank, (f"file://{folder}/store",), RANKS)
