"""Twenty training steps of each tiny model, with every op on the compiled PTX (``pytest --ptx``).

The losses are compared with those of a float64 run of backend "reference": the same weights,
batches and dropout. Rounding errors grow over the steps: the weights keep them, AdamW divides small
gradients by their own size, and a decision of the router may flip. How fast they grow depends on
the model, so the budget is that of ``mmfused.testing``, with the drift of backend "reference" in
float32. One such run may be near the float64 run by chance; the drift of a step is therefore the
largest of three runs, two of which start from weights that are moved by half a rounding. The
learning rate is low enough that no decision flips in these runs, so that the budget stays strict.
"""

import copy
import re
from itertools import islice

import pytest
import torch

import mmfused
from mmfused.data import GeneratedProducts
from mmfused.kernels.recording import launches_made
from mmfused.library import INTERPRETED, KERNELS_ON_CPU
from mmfused.models import MODELS
from mmfused.testing import over_budget, relative_error
from mmfused.training.config import TrainConfig
from mmfused.training.initial import build_model, train_tokenizer
from mmfused.training.optimizer import make_optimizer
from mmfused.training.tasks import task_of

pytestmark = pytest.mark.skipif(
    INTERPRETED or not KERNELS_ON_CPU,
    reason="needs --ptx: the interpreter would take an hour",
)
STEPS = 20
# The ops of each model.
USED = {
    "fluid": {"query_pooling", "topk_routing", "grouped_mlp", "masked_info_nce"},
    "uniecs": {"gated_cross_attention", "masked_info_nce"},
    "unica": {"gated_cross_attention", "masked_info_nce"},
    "moon2": {"topk_routing", "grouped_mlp", "masked_info_nce"},
    "unite": {"masked_info_nce"},
}


class Training:
    """A tiny model in float32, and the batches of all steps.

    Args:
        name: the model.
        amp: train under bfloat16 autocast.
    """

    def __init__(self, name: str, amp: bool = False) -> None:
        self.config = TrainConfig(out="unused", model=name, batch_size=8, lr=1e-4)
        self.amp = amp
        products = GeneratedProducts(size=64)
        tokenizer = train_tokenizer(self.config, products)
        torch.manual_seed(0)
        self.model = build_model(self.config, products.num_classes, tokenizer)
        self.task = task_of(self.config, products)(
            self.config, tokenizer, 32, self.model.config, products, products, None, 0, 1
        )
        self.batches = list(islice(self.task.batches.stream(), STEPS))

    def steps(self, backend, dtype, *, moved=0):
        """Yield the loss of each step. ``moved`` is the seed with which weights are moved, or 0."""
        model = copy.deepcopy(self.model).to(dtype).train()
        if moved:
            move(model, moved)
        optimizer = make_optimizer(model, self.config)
        for number, batch in enumerate(self.batches):
            torch.manual_seed(number)
            optimizer.zero_grad()
            with mmfused.backend(backend):
                amp = self.amp and dtype != torch.float64
                loss, _ = self.task.gradients(model, [cast(batch, dtype)], 1, amp)
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.clip)
            optimizer.step()
            yield loss

    def curve(self, backend, dtype, **options):
        return torch.stack(list(self.steps(backend, dtype, **options)))

    def check(self, losses):
        """Check the losses of the first steps, and of all steps, against the budget."""
        exact = self.curve("reference", torch.float64)
        runs = [self.curve("reference", torch.float32, moved=seed) for seed in range(3)]
        plain = exact + (torch.stack(runs).double() - exact).abs().amax(0)
        assert exact[-1] < 0.9 * exact[0]  # the weights do change
        assert relative_error(plain, exact) < (0.02 if self.amp else 1e-5)  # a strict budget
        curves = [{n: curve[:n] for n in (5, STEPS)} for curve in (losses, exact, plain)]
        assert not over_budget(*curves)


@torch.no_grad()
def move(model, seed):
    """Move each weight by up to half a rounding."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(
            weight * (torch.rand(weight.shape, generator=generator) - 0.5),
            alpha=torch.finfo(weight.dtype).eps,
        )


def cast(batch, dtype):
    if isinstance(batch, dict):
        return {name: cast(value, dtype) for name, value in batch.items()}
    return batch.to(dtype) if batch.is_floating_point() else batch


def fused_curve(training, monkeypatch):
    """Return the losses on PTX, and the kernels of each step as pairs of module and name.

    After the first step, launches run once and in order: the kernels and their shapes are the same.
    """
    import triton
    from ptx.schedules import PLAIN

    losses, kernels = [], []
    steps = training.steps("fused", torch.float32)
    for _ in range(STEPS):
        with launches_made() as launches:
            losses.append(next(steps))
        kernels.append({(each.kernel.fn.__module__, each.name) for each in launches})
        monkeypatch.setattr(triton.runtime.driver.active.session, "schedules", (PLAIN,))
    return torch.stack(losses), kernels


def passes_of(kernels):
    """Return the (op, "forward" or "backward") that have kernels, by the modules' names."""
    names = (module.removeprefix("mmfused.kernels.") for module, _ in kernels)
    modules = {re.sub("attend_|hopper_|short_", "", name) for name in names}
    return {
        tuple(module.split(".")) for module in modules if module.endswith(("forward", "backward"))
    }


@pytest.mark.parametrize(
    ("name", "amp"),
    [*((name, False) for name in MODELS), ("fluid", True)],
    ids=[*MODELS, "fluid-bfloat16"],
)
def test_twenty_steps_stay_on_the_references_loss_curve(name, amp, monkeypatch):
    training = Training(name, amp)
    # Backend "fused" raises where it cannot launch kernels.
    losses, kernels = fused_curve(training, monkeypatch)
    assert all(each == kernels[0] for each in kernels)
    assert passes_of(kernels[0]) == {
        (op, part) for op in USED[name] for part in ("forward", "backward")
    }
    training.check(losses)
