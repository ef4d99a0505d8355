"""Train peft's LoRA on a Q-Former and an attention pool, plain and with mmfused.

``mmfused.fuse(model)`` makes the cross-attention of transformers' Q-Former run on
``mmfused.query_pooling``, and ``mmfused.QueryPooling`` replaces a pool written by hand.
Both form the weights with the adapters, gradients included, and compute with these weights.
Adapters are added, trained and merged as before. Nothing is downloaded.

Run it on a CPU: python examples/peft_lora.py
"""

import sys

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

import mmfused

# float32 rounds to 6e-8; the sums differ in order, and AdamW can enlarge the difference.
TOLERANCE = 1e-4
CONFIG = Blip2QFormerConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    encoder_hidden_size=48,
    attention_probs_dropout_prob=0.0,  # the fused form would drop other weights
)


class AttentionPool(nn.Module):
    """One learned query attends to the tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, dim))
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(queries, self.k_proj(x), self.v_proj(x))


class Classifier(nn.Module):
    """A Q-Former reads the tokens of an image, a pool its outputs."""

    def __init__(self, fused: bool, dim: int = CONFIG.hidden_size):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 8, dim))
        self.q_former = Blip2QFormerModel(CONFIG)
        self.pool = mmfused.QueryPooling(dim, num_queries=1) if fused else AttentionPool(dim)
        self.classifier = nn.Linear(dim, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.queries.expand(len(tokens), -1, -1)
        x = self.q_former(queries, encoder_hidden_states=tokens).last_hidden_state
        return self.classifier(self.pool(x)[:, 0])


def train(fused: bool) -> tuple[list[float], PeftModel]:
    torch.manual_seed(0)
    model = Classifier(fused)
    if fused:
        print(mmfused.fuse(model))
    names = ["query", "key", "value", "k_proj", "v_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=names, modules_to_save=["classifier"])
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    prototypes, losses = torch.randn(10, 1, 48), []
    for _ in range(8):
        labels = torch.randint(10, (32,))
        loss = F.cross_entropy(model(prototypes[labels] + torch.randn(32, 40, 48)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def compare(plain: list[float], fused: list[float]) -> None:
    print("step     plain   mmfused")
    for step, (a, b) in enumerate(zip(plain, fused, strict=True), start=1):
        print(f"{step:4d}  {a:8.5f}  {b:8.5f}")
    losses = torch.tensor([plain, fused], dtype=torch.float64)
    difference = (losses[1] / losses[0] - 1).abs().max().item()
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE}.")
    print(f"The largest relative difference is {difference:.1e}.")


@torch.no_grad()
def compare_merged(plain: PeftModel, fused: PeftModel) -> None:
    """Merge the adapters; the outputs must stay the same, and the two models equal."""
    tokens = torch.randn(32, 40, 48)
    adapted = fused.eval()(tokens)
    plain, fused = plain.merge_and_unload(), fused.merge_and_unload()
    torch.testing.assert_close(fused(tokens), adapted, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(
        dict(fused.state_dict()), dict(plain.state_dict()), rtol=TOLERANCE, atol=TOLERANCE
    )
    print("The merged weights are equal, and the outputs are those of the adapters.")


if __name__ == "__main__":
    (plain, plain_model), (fused, fused_model) = train(fused=False), train(fused=True)
    compare(plain, fused)
    compare_merged(plain_model, fused_model)
