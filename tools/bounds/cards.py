"""The rates of GPUs that counts are divided by.

Rates of the multiprocessors are per cycle. ``matrix``, ``dram`` and ``l2`` are sustained rates of
the whole GPU: for the same task, our kernels and the baselines are divided by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU. ``sources`` says where each number comes from."""

    name: str
    arch: int
    multiprocessors: int
    hertz: float  # of the multiprocessors
    matrix: float  # FLOP/s of bfloat16 products
    float32: float  # FLOP/s of float32 products without tensor cores
    mma_share: float  # of ``matrix`` that mma.sync reaches; wgmma reaches all of it
    dram: float  # bytes/s
    l2: tuple[float, float]  # bytes/s from L2 to the multiprocessors: a low and a high estimate
    shared_bytes: int  # of a multiprocessor
    registers: int  # of a multiprocessor
    warps: int  # of a multiprocessor
    blocks: int  # of a multiprocessor
    sources: dict[str, str]

    @property
    def matrix_per_cycle(self) -> float:
        """FLOP per cycle of one multiprocessor."""
        return self.matrix / self.multiprocessors / self.hertz


_HOPPER = dict(
    arch=90,
    multiprocessors=132,
    hertz=1.755e9,
    matrix=790e12,
    float32=53.5e12,
    mma_share=0.63,
    l2=(5.5e12, 10e12),
    shared_bytes=228 << 10,
    registers=65536,
    warps=64,
    blocks=32,
)
_HOPPER_SOURCES = dict(
    multiprocessors="NVIDIA H100 Tensor Core GPU Architecture, SXM5",
    hertz="assumed under load; the SXM5 board boosts to 1.98 GHz",
    matrix="790 TFLOP/s, a bf16 product of random numbers on an H200; datasheet: 989",
    float32="datasheet 67 TFLOP/s, times the share that an H200 reaches of its bf16 products",
    mma_share="Luo et al. 2024, Dissecting the NVIDIA Hopper Architecture: mma.sync 62.9 %",
    l2="assumed: published measurements differ, from 5.5 to more than 7 on an H100 PCIe "
    "(Chips and Cheese 2023); 10 is 43 bytes a cycle and multiprocessor, of 64 that its port has",
    occupancy="CUDA C++ Programming Guide, technical specifications per compute capability",
)
H100 = Card(
    "H100",
    **_HOPPER,
    dram=3.0e12,
    sources=_HOPPER_SOURCES
    | dict(dram="datasheet 3.35 TB/s, times the share that an H200 reaches of its own"),
)
H200 = Card(
    "H200",
    **_HOPPER,
    dram=4.3e12,
    sources=_HOPPER_SOURCES | dict(dram="4.3 TB/s, a copy on an H200; datasheet: 4.8"),
)
A100 = Card(
    "A100",
    arch=80,
    multiprocessors=108,
    hertz=1.41e9,
    matrix=250e12,
    float32=15.6e12,
    mma_share=1.0,
    dram=1.7e12,
    l2=(3.5e12, 5.1e12),
    shared_bytes=164 << 10,
    registers=65536,
    warps=64,
    blocks=32,
    sources=dict(
        multiprocessors="NVIDIA A100 Tensor Core GPU Architecture, SXM4 80 GB",
        hertz="assumed under load: the boost clock of the datasheet",
        matrix="datasheet 312 TFLOP/s, times the share that an H200 reaches of its own",
        float32="datasheet 19.5 TFLOP/s, times the share that an H200 reaches of bf16 products",
        mma_share="all matrix instructions of sm_80 are mma.sync",
        dram="datasheet 2.04 TB/s, times 0.85",
        l2="5.1: NVIDIA A100 whitepaper, 5120 bytes a cycle at 1 GHz; 3.5: two thirds of it",
        occupancy="CUDA C++ Programming Guide, technical specifications per compute capability",
    ),
)
CARDS = {card.name: card for card in (H100, H200, A100)}
