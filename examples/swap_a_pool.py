"""Replace the attention pooling of your own classifier, by hand and with mmfused.fuse.

The classifier pools its patches with learned queries and nn.MultiheadAttention. It is trained three
times from the same weights: unchanged, with mmfused.QueryPooling in place of its own pooling
module, and after mmfused.fuse(model). The losses must be equal up to rounding.

Run it on a CPU: python examples/swap_a_pool.py
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfused

DIM, HEADS, QUERIES, CLASSES, STEPS = 64, 4, 8, 10, 15
# float32 rounds to 6e-8. The poolings add up in different orders, and each step of the optimizer
# passes the differences on. A weight copied to the wrong place changes the loss by far more.
TOLERANCE = 1e-4


class AttentionPool(nn.Module):
    """Your own module: learned queries read the tokens (B, N, DIM)."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES, DIM))
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return self.attention(queries, x, x, need_weights=False)[0]


class Classifier(nn.Module):
    """A small vision transformer for pictures of 32 x 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, kernel_size=4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(64, DIM))
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1)
        self.pool = AttentionPool()
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(self.patches(images).flatten(2).transpose(1, 2) + self.position)
        return self.head(self.pool(x).mean(1))


def to_query_pooling(old: AttentionPool) -> mmfused.QueryPooling:
    """Return the same pooling as a QueryPooling, with a copy of the weights."""
    new = mmfused.QueryPooling(
        DIM, num_queries=QUERIES, num_heads=HEADS, q_proj=True, out_proj=True, bias=True
    )
    attention = old.attention.state_dict()
    state = {"queries": old.queries}
    for kind in ("weight", "bias"):
        # nn.MultiheadAttention holds the three input projections in one tensor.
        q, k, v = attention[f"in_proj_{kind}"].chunk(3)
        state |= {f"q_proj.{kind}": q, f"k_proj.{kind}": k, f"v_proj.{kind}": v}
        state[f"out_proj.{kind}"] = attention[f"out_proj.{kind}"]
    new.load_state_dict(state)
    return new


def train(model: nn.Module) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(CLASSES, 3, 32, 32, generator=generator)  # one picture per class
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (16,), generator=generator)
        images = prototypes[labels] + torch.randn(16, 3, 32, 32, generator=generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    plain = Classifier()
    by_hand, fused = copy.deepcopy(plain), copy.deepcopy(plain)
    by_hand.pool = to_query_pooling(plain.pool)
    print(mmfused.fuse(fused))

    runs = [train(model) for model in (plain, by_hand, fused)]
    print("\nstep     plain  QueryPooling  fuse(model)")
    for step, (a, b, c) in enumerate(zip(*runs, strict=True)):
        print(f"{step:4}  {a:8.5f}  {b:12.5f}  {c:11.5f}")
    # Unlike Python's max, torch's passes NaN on.
    difference = torch.tensor(
        [abs(x / a - 1) for a, *xs in zip(*runs, strict=True) for x in xs]
    ).max()
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE:.0e}.")
    print(f"The largest relative difference is {difference:.1e}.")


if __name__ == "__main__":
    main()
