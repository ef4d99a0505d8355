"""Train a LightningModule with mmfused's pooling and loss, and in plain PyTorch.

``mmfused.QueryPooling`` has the parameters of the attention pool that it replaces, so the
state dict of the plain model loads. ``mmfused.masked_info_nce`` replaces the matrix of
logits and its two cross-entropies. The Trainer does not change.

Run it on a CPU: python examples/lightning_module.py
"""

import sys

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mmfused

# float32 rounds to 6e-8; the sums differ in order, and AdamW can enlarge the difference.
TOLERANCE = 1e-4


class AttentionPool(nn.Module):
    """Let learned queries attend to the tokens, with four heads."""

    def __init__(self, dim: int, num_queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.queries.expand(len(x), -1, -1), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None])
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Retriever(lightning.LightningModule):
    def __init__(self, fused: bool, dim: int = 64, num_queries: int = 4):
        super().__init__()
        self.fused = fused
        self.image_encoder = nn.Sequential(nn.Linear(48, dim), nn.GELU())
        self.text_encoder = nn.EmbeddingBag(100, dim)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())
        if fused:
            self.pool = mmfused.QueryPooling(dim, num_queries, num_heads=4, out_proj=True)
        else:
            self.pool = AttentionPool(dim, num_queries)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        regions, padding, captions = batch
        image = F.normalize(self.pool(self.image_encoder(regions), padding).mean(1), dim=-1)
        text = F.normalize(self.text_encoder(captions), dim=-1)
        temperature = self.log_temperature.exp()
        if self.fused:
            loss = mmfused.masked_info_nce(image, text, temperature=temperature, symmetric=True)
        else:
            logits = image @ text.T / temperature
            labels = torch.arange(len(logits), device=self.device)
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model: Retriever) -> list[float]:
    lightning.seed_everything(1, verbose=False)  # the same data in the same order
    regions = torch.randn(128, 20, 48)
    lengths = torch.randint(5, 21, (128, 1))  # 5 to 20 regions in an image
    padding = torch.arange(20) >= lengths
    data = TensorDataset(regions, padding, torch.randint(100, (128, 8)))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    return model.losses


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
    lightning.seed_everything(0, verbose=False)
    plain, fused = Retriever(fused=False), Retriever(fused=True)
    fused.load_state_dict(plain.state_dict())
    compare(train(plain), train(fused))
