"""Train a fused mixture-of-experts language model in a loop with Accelerate.

The loop accumulates gradients, clips them and follows a schedule, as Accelerate's documentation
shows. It trains a small Mixtral twice from the same weights: unchanged, and after
mmfused.fuse(model). The losses must be equal up to rounding.

Run it on a CPU with either command, the second with several processes:

    python examples/accelerate_trainer.py
    torchrun --nproc-per-node 2 examples/accelerate_trainer.py
"""

import copy
import sys

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM, get_linear_schedule_with_warmup

import mmfused

EPOCHS, ACCUMULATE = 2, 2
# float32 rounds to 6e-8. The fused experts add up in another order, and each step of the optimizer
# passes the differences on. A token that went to another expert would change the loss by far more.
TOLERANCE = 1e-4


def token_loader() -> DataLoader:
    """Return batches of sentences that count upwards from a random number, modulo 64."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(64, (96, 1), generator=generator)
    sentences = (first + torch.arange(16)) % 64
    return DataLoader([{"input_ids": ids, "labels": ids} for ids in sentences], batch_size=8)


def train(model: nn.Module) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    loader = token_loader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = EPOCHS * len(loader) // ACCUMULATE
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    losses = []
    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,  # the loss has the term that balances the experts
    )
    model = MixtralForCausalLM(config)
    fused_model = copy.deepcopy(model)
    report = mmfused.fuse(fused_model)
    plain, fused = train(model), train(fused_model)

    # Unlike Python's max, torch's passes NaN on.
    difference = torch.tensor([abs(b / a - 1) for a, b in zip(plain, fused, strict=True)]).max()
    if PartialState().is_main_process:
        print(report)
        print("\nbatch    plain    fused")
        for step, (a, b) in enumerate(zip(plain, fused, strict=True)):
            print(f"{step:5} {a:8.5f} {b:8.5f}")
        print(f"The largest relative difference is {difference:.1e}.")
    if not difference <= TOLERANCE:
        sys.exit(f"The losses differ by {difference:.1e}, expected at most {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
