"""User code in which type checkers must report exactly the lines marked ``# error``."""

import torch
from torch import Tensor, nn

import mmfused

x = torch.randn(2, 5, 16)
mask = torch.zeros(2, 5, dtype=torch.bool)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = mmfused.QueryPooling(16, 4, num_heads=2, dropout=0.1)
        self.cross = mmfused.GatedCrossAttention(16, 4, gate="token", missing="zero")
        self.both = mmfused.BidirectionalGatedCrossAttention(16, 4, share_weights=True)
        self.moe = mmfused.TopKMoE(16, 32, num_experts=4, top_k=2, activation="swiglu")
        self.loss = mmfused.MaskedInfoNCE(0.1, symmetric=True, gather=None)

    def forward(self, x: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor]:
        pooled: Tensor = self.pool.forward(x, ignore)
        crossed: Tensor = self.cross.forward(x, pooled, context_key_padding_mask=None)
        a, b = self.both.forward(crossed, pooled)
        y, routing = self.moe.forward(a)
        loss: Tensor = self.loss.forward(y.mean(1), b.mean(1))
        return loss + routing.balance_loss, y


report: mmfused.FuseReport = mmfused.fuse(Head(), only="pooling")
swapped: dict[str, str] = report.swapped
names: list[str] = mmfused.unfuse(Head())
logits = torch.randn(6, 4)
routing = mmfused.topk_routing(logits, 2, balance="switch")
out: Tensor = mmfused.grouped_mlp(
    torch.randn(6, 16),
    routing,
    torch.randn(4, 32, 16),
    torch.randn(4, 16, 32),
    activation="gelu",
)
nce: Tensor = mmfused.masked_info_nce(x[:, 0], x[:, 1], temperature=0.1, same_id="mean")
pooled: Tensor = mmfused.query_pooling(x, x[0], torch.eye(16), torch.eye(16), form="absorbed")
with mmfused.backend("composed"):
    mmfused.set_backend("auto")

mmfused.QueryPooling("16", 4)  # error
mmfused.QueryPooling(16, 4, num_haeds=2)  # error
mmfused.GatedCrossAttention(16, 4, gate="chanel")  # error
mmfused.BidirectionalGatedCrossAttention(16, 4, share_weight=True)  # error
mmfused.TopKMoE(16, 32, num_experts=4, capacity=1.25)  # error
mmfused.TopKMoE(16, 32, num_experts=4, balance="swich")  # error
mmfused.MaskedInfoNCE(symetric=True)  # error
mmfused.MaskedInfoNCE(gather="globl")  # error
mmfused.masked_info_nce(x, x)  # error
mmfused.masked_info_nce(x, x, temperature=0.1, same_id="dorp")  # error
mmfused.query_pooling(x, x, x, x, form="absorbd")  # error
mmfused.topk_routing(logits, 2, score="softmin")  # error
mmfused.backend("fuzed")  # error
mmfused.set_backend("fuzed")  # error
mmfused.fuse(Head(), onyl="pooling")  # error
