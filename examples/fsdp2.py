"""Shard a model with mmfused modules by FSDP2 (fully_shard).

The model fuses pictures and texts with gated cross-attention, a mixture of experts and query
pooling. Each of two ranks trains it in plain PyTorch, on both halves of a batch in turn, and then
sharded, on its own half. The losses must be equal up to rounding.

Run it on a CPU with either command:

    python examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mmfused

RANKS, BATCH, STEPS = 2, 16, 12  # BATCH is that of one rank
PATCHES, WORDS, DIM, CLASSES = 9, 5, 32, 10
# float32 rounds to 6e-8. FSDP2 adds up the gradients of the ranks in another order, and each step
# of the optimizer passes the differences on. A rank whose gradient is lost costs far more.
TOLERANCE = 1e-4


class Block(nn.Module):
    """Each modality reads the other; then all tokens pass the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = mmfused.BidirectionalGatedCrossAttention(DIM, num_heads=4)
        self.norm = nn.LayerNorm(DIM)
        self.moe = mmfused.TopKMoE(DIM, 2 * DIM, num_experts=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat(self.fusion(*x.split([PATCHES, WORDS], dim=1)), dim=1)
        out, routing = self.moe(self.norm(x))
        return x + out, routing.balance_loss


class Model(nn.Module):
    """A classifier of tokens (B, PATCHES + WORDS, DIM)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.pool = mmfused.QueryPooling(DIM, num_queries=4, num_heads=4, out_proj=True)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        balance_loss = 0.0
        for block in self.blocks:
            x, loss = block(x)
            balance_loss = balance_loss + loss
        logits = self.head(self.pool(x).mean(1))
        return F.cross_entropy(logits, labels) + 0.01 * balance_loss


def train(sharded: bool) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    ranks = [dist.get_rank()] if sharded else range(dist.get_world_size())
    if sharded:
        # Without a mesh, fully_shard chooses the GPU if there is one.
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for rank in ranks:
            torch.manual_seed(1000 * step + rank + 1)  # the batch of this rank
            labels = torch.randint(CLASSES, (BATCH,))
            x = F.one_hot(labels, DIM)[:, None] + torch.randn(BATCH, PATCHES + WORDS, DIM)
            loss = model(x, labels)
            (loss / len(ranks)).backward()
            total += loss.detach() / len(ranks)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        dist.all_reduce(total)  # the mean over ranks is the loss of the whole batch
        losses.append(total.item() / dist.get_world_size())
    return losses


def compare() -> None:
    with mmfused.backend("reference"):  # each module's equations in plain PyTorch
        plain = train(sharded=False)
    sharded = train(sharded=True)
    # Unlike Python's max, torch's passes NaN on.
    difference = torch.tensor([abs(b / a - 1) for a, b in zip(plain, sharded, strict=True)]).max()
    if dist.get_rank() == 0:
        print("step     plain  fully_shard")
        for step, (a, b) in enumerate(zip(plain, sharded, strict=True)):
            print(f"{step:4}  {a:8.5f}  {b:11.5f}")
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
