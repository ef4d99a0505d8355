"""Base class of the models in model_steps.py and hosted_model_steps.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Step(nn.Module, ABC):
    """A model with the labels, masks and ids of one batch; ``forward`` returns the loss of inputs.

    With inputs in 16 bits, the parameters are float32 and the model runs under autocast, as in the
    library's training.

    Args:
        models: namespace of the model classes: ``mmfused.models`` or ``torch_modules.models()``.
        batch: number of samples.
        small: use a small model, for a CPU.
        device: device of the model and of the data.
        dtype: dtype of the inputs.
    """

    def __init__(
        self,
        models: Any,
        batch: int,
        small: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.batch, self.small = batch, small
        wide = torch.promote_types(dtype, torch.float32)
        with torch.device(device):
            self.model = self.build(models).to(wide)
        self.autocast = {"device_type": device.type, "dtype": dtype} if dtype != wide else None
        self.generator = torch.Generator().manual_seed(1)
        for name, tensor in self.data().items():
            self.register_buffer(name, tensor.to(device))

    def forward(self, *inputs: Tensor) -> Tensor:
        with nullcontext() if self.autocast is None else torch.autocast(**self.autocast):
            return self.loss(*inputs)

    @abstractmethod
    def build(self, models: Any) -> nn.Module:
        """Build the model from the classes in ``models``."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs by name, in the order in which ``loss`` takes them."""

    def data(self) -> dict[str, Tensor]:
        """Return labels, masks and ids on the CPU, which become buffers of the module."""
        return {}

    @abstractmethod
    def loss(self, *inputs: Tensor) -> Tensor:
        """Return the loss of the inputs."""

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Draw random inputs in float32."""
        generator = torch.Generator(device).manual_seed(2)
        return {
            name: torch.randn(shape, generator=generator, device=device)
            for name, shape in self.shapes().items()
        }

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def padding(self, length: int) -> Tensor:
        """Return a padding mask (B, length) of random texts of at least ``length // 4`` tokens."""
        return torch.arange(length) >= self.randint(length // 4, length + 1, self.batch, 1)
