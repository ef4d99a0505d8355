"""fast_interpreter.py changes neither the results nor the errors of Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
CODE = """
import torch, triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
import fast_interpreter


@triton.jit
def scale(x, factor):
    return x * factor + 1


@triton.jit
def mixed(x, y, out, n, seed, HALF: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    rows = tl.load(x + at, mask=at < n, other=2.0)
    wide = tl.load(y + at.to(tl.int64), mask=at < n, other=0)
    word = (at.to(tl.uint32) * 2654435769) ^ (seed + 3)
    total = scale(rows[:, None], 2.0) * (wide[None, :] % 7).to(tl.float32)
    total = tl.where((word & 1)[:, None] != 0, total, -total).to(tl.float16) / 3
    half = tl.sum(total.to(tl.float32) * HALF, 1) + tl.rand(seed, at) + at // 3 - (at < 4)
    tl.store(out + at, half, mask=at < n)


@triton.jit
def bad_shape(out):
    tl.store(out + tl.arange(0, 4), tl.zeros([3], tl.float32))


@triton.jit
def bad_broadcast(out):
    tl.store(out + tl.arange(0, 4), tl.zeros([4], tl.float32) + tl.zeros([8], tl.float32))


@triton.jit
def bad_type(out):
    tl.store(out + tl.arange(0, 4), out + out)


@triton.jit
def bad_sign(out):
    tl.store(out + tl.arange(0, 4), tl.zeros([4], tl.uint32) + -1)


def computed():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        for kind in (torch.int32, torch.int64):
            x, out = torch.randn(37).to(dtype), torch.zeros(37)
            y = torch.randint(-(2**30), 2**30, (37,)).to(kind)
            seed = 2**31 + 5 if kind == torch.int32 else 12
            mixed[(3,)](x, y, out, 37, seed, 0.5, SIZE=16)
            yield out.tolist()


def refused():
    for bad in (bad_shape, bad_broadcast, bad_type, bad_sign) * 2:
        try:
            bad[(1,)](torch.zeros(4))
        except Exception as error:
            yield type(error).__name__ + str(error)


def types():
    made = [tl.int32, tl.uint32, tl.pointer_type(tl.int32), tl.pointer_type(tl.float16)]
    made += [tl.block_type(a, shape) for a in made for shape in ([4], [4, 8], [8, 4])]
    made += [tl.block_type(tl.int32, [tl.constexpr(4), 8])]
    shown = [(str(a), a.scalar, str(getattr(a, "shape", None))) for a in made]
    return shown, [bool(a == b) for a in made for b in made]


results = []
for _ in range(2):
    # Each error occurs twice: a refusal is not remembered as a result.
    results.append((list(computed()), list(refused()), types()))
    fast_interpreter.speed_up(interpreter)
plain, fast = results
assert plain == fast, results
assert len(plain[0]) == 4 and len(plain[1]) == 8, plain
assert interpreter.interpreter_builder.options.sanitize_overflow is False
print("done")
"""


def test_results_and_errors_are_those_of_the_unchanged_interpreter(tmp_path):
    program = tmp_path / "program.py"  # Triton reads the source of kernels
    program.write_text(CODE)
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-W", "ignore", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "done", done.stderr[-3000:]
