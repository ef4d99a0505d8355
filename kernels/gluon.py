"""Names of Gluon's functions that differ by Triton version, and small helpers for its kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 has other names.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
sync = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def barriers(number: gl.constexpr, count: gl.constexpr):
    """Return mbarriers that ``count`` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars
