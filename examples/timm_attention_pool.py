"""Train timm's SigLIP image encoder as a classifier, plain and fused.

``mmfused.fuse(model)`` after ``timm.create_model(...)`` is the only change. The attention
pool then runs on ``mmfused.query_pooling``; optimizer, scheduler, EMA and state dict do not
change. The model is small and has random weights; nothing is downloaded.

Run it on a CPU: python examples/timm_attention_pool.py
"""

import sys

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed

import mmfused

# float32 rounds to 6e-8; the sums differ in order, and AdamW can enlarge the difference.
TOLERANCE = 1e-4
STEPS, CLASSES = 12, 10


def train(fused: bool) -> list[float]:
    """Return the loss of each step, then the EMA model's loss on one more batch."""
    random_seed(0)
    model = timm.create_model(
        "vit_base_patch16_siglip_224",  # global_pool="map": an attention pool
        img_size=64,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=4,
        num_classes=CLASSES,
    )
    if fused:
        print(mmfused.fuse(model))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=STEPS, warmup_epochs=2, warmup_lr=1e-3
    )
    ema = ModelEmaV3(model, decay=0.5)  # a copy, which is fused too
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=CLASSES)
    loss_fn = SoftTargetCrossEntropy()

    random_seed(1)
    prototypes = torch.randn(CLASSES, 3, 64, 64)
    losses = []
    model.train()
    for step in range(STEPS):
        labels = torch.randint(CLASSES, (32,))
        images, targets = mixup(prototypes[labels] + torch.randn(32, 3, 64, 64), labels)
        loss = loss_fn(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=1.0)
        optimizer.step()
        ema.update(model, step=step)
        scheduler.step(step + 1)
        losses.append(loss.item())
    labels = torch.randint(CLASSES, (32,))
    with torch.no_grad():
        logits = ema(prototypes[labels] + torch.randn(32, 3, 64, 64))
    return [*losses, torch.nn.functional.cross_entropy(logits, labels).item()]


def compare(plain: list[float], fused: list[float]) -> None:
    print("step     plain   mmfused")
    for step, (a, b) in enumerate(zip(plain, fused, strict=True), start=1):
        print(f"{step if step <= STEPS else 'EMA':>4}  {a:8.5f}  {b:8.5f}")
    losses = torch.tensor([plain, fused], dtype=torch.float64)
    difference = (losses[1] / losses[0] - 1).abs().max().item()
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE}.")
    print(f"The largest relative difference is {difference:.1e}.")


if __name__ == "__main__":
    compare(train(fused=False), train(fused=True))
