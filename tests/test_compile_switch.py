"""Tests of the backend switch under torch.compile, without Triton's interpreter."""

import json

import pytest
from compiling import run_python

COMMON = """
import asyncio, threading
import torch, mmfused
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from mmfused.library import current_backend

FACTORS = {"auto": 1.0, "reference": 2.0, "composed": 3.0, "fused": 4.0}

def op(x):
    return x * FACTORS[current_backend()]

def compiled(function, backend="eager", **options):
    torch._dynamo.reset(), counters.clear()
    return torch.compile(function, backend=backend, **options)

def graphs():
    return counters["stats"]["unique_graphs"]

def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start(), thread.join()
    return results[0]

def check(got, want):
    assert got.tolist() == want, (got.tolist(), want)
    assert current_backend() == "auto", current_backend()

ONE = torch.ones(())
"""

TRACED = """
def nested(x):
    first = op(x)
    with mmfused.backend("reference"):
        second = op(x)
        again = mmfused.backend("composed")
        with again, mmfused.backend("auto"), again:
            third = op(x)
        fourth = op(x)
    return torch.stack([first, second, third, fourth, op(x)])

for dynamic in (None, True):
    run = compiled(nested, fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        check(run(ONE), [1, 2, 3, 2, 1])
    assert graphs() == 1
    mmfused.backend("fused")
    check(run(ONE), [1, 2, 3, 2, 1])

@torch.no_grad()
def caught(x):
    try:
        with mmfused.backend("reference"):
            x = op(x)
            raise KeyError
    except KeyError:
        return torch.stack([x, op(x)])

check(compiled(caught, fullgraph=True)(ONE), [2, 2])

def uncaught(x):
    with mmfused.backend("reference"):
        if op(x) > 0:
            raise KeyError

run = compiled(uncaught)
for _ in range(2):
    try:
        run(ONE)
        raise AssertionError("no error was raised")
    except KeyError:
        check(op(ONE), 1)

def sets(x):
    mmfused.set_backend("reference")
    return op(x)

assert compiled(sets, fullgraph=True)(ONE) == 2 and current_backend() == "reference"
mmfused.set_backend("auto")

def wrong(x):
    with mmfused.backend("fast"):
        return op(x)

try:
    compiled(wrong)(ONE)
    raise AssertionError("no error was raised")
except ValueError as error:
    assert "backend name: got 'fast', expected one of" in str(error)
"""

AROUND = """
for dynamic in (None, True):
    run = compiled(op, fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        check(run(ONE), 1)
        with mmfused.backend("fused"):
            assert run(ONE) == 4
            assert in_thread(lambda: run(ONE)) == 1
            with mmfused.backend("reference"):
                assert run(ONE) == 2
        mmfused.set_backend("composed")
        assert run(ONE) == 3 == in_thread(lambda: run(ONE))
        mmfused.set_backend("auto")
    assert graphs() == 4

seen = []

async def task(name):
    for _ in range(3):
        with mmfused.backend(name):
            await asyncio.sleep(0)
            seen.append((FACTORS[name], run(ONE).item()))

async def tasks():
    await asyncio.gather(*map(task, FACTORS))

asyncio.run(tasks())
assert len(seen) == 12 and all(want == got for want, got in seen), seen
assert graphs() == 6  # a backend has one graph as the default, and another in a with statement
"""

BREAKS = """
seen = []

@torch.compiler.disable
def plain(x):
    seen.append((current_backend(), in_thread(current_backend)))
    with mmfused.backend("composed"):
        return op(x)

def called(x):
    torch._dynamo.graph_break()
    return op(x)

def breaks(x):
    first = op(x)
    with mmfused.backend("reference"):
        second = op(x)
        torch._dynamo.graph_break()
        third, fourth, fifth = op(x), plain(x), called(x)
    return torch.stack([first, second, third, fourth, fifth, op(x)])

def outside(x):
    torch._dynamo.graph_break()
    with mmfused.backend("reference"):
        x = op(x)
    torch._dynamo.graph_break()
    return torch.stack([x, op(x)])

run = compiled(breaks)
for _ in range(3):
    check(run(ONE), [1, 2, 2, 3, 2, 1])
with mmfused.backend("fused"):
    assert run(ONE).tolist() == [4, 2, 2, 3, 2, 4]
assert set(seen) == {("reference", "auto")}
run = compiled(outside)
for _ in range(2):
    check(run(ONE), [2, 2])
"""

BACKWARD = """
x = torch.linspace(-1, 1, 7)

def layer(x):
    return op(x).sin() * op(x).cos()

def gradient(function, name, elsewhere):
    leaf = x.clone().requires_grad_()
    with mmfused.backend(name):
        loss = function(leaf).sum()
    if elsewhere == "thread":
        in_thread(loss.backward)
    else:
        with mmfused.backend("composed" if elsewhere else "auto"):
            loss.backward()
    return leaf.grad

def recomputed(function):
    return lambda x: checkpoint(function, x, use_reentrant=False)

kinds = {
    "compiled": lambda: compiled(layer, "aot_eager", fullgraph=True),
    "compiled checkpoint": lambda: compiled(recomputed(layer), "aot_eager", fullgraph=True),
    "in a checkpoint": lambda: recomputed(compiled(layer, "aot_eager", fullgraph=True)),
    "in two checkpoints": lambda: recomputed(
        recomputed(compiled(layer, "aot_eager", fullgraph=True))
    ),
}
for kind, make in kinds.items():
    function = make()
    for elsewhere in ("", "thread", "with"):
        for name in ("reference", "fused", "reference"):
            got, want = gradient(function, name, elsewhere), gradient(layer, name, "")
            torch.testing.assert_close(got, want, msg=f"{kind} {elsewhere}")
    assert current_backend() == "auto"

def with_inside(x):
    with mmfused.backend("reference"):
        with mmfused.backend("fused"):
            first = layer(x)
        return first + layer(x)

for function in (recomputed(with_inside), recomputed(recomputed(with_inside))):
    got = gradient(compiled(function, "aot_eager", fullgraph=True), "auto", "with")
    torch.testing.assert_close(got, gradient(with_inside, "auto", ""))
"""

OPS = """
torch.manual_seed(0)
pool = mmfused.QueryPooling(16, 3, 2, out_proj=True, bias=True)
moe = mmfused.TopKMoE(16, 8, 4)
both = mmfused.BidirectionalGatedCrossAttention(16, 2)
functions = {
    "query_pooling": lambda x: pool(x),
    "gated_cross_attention": lambda x: both(x, x + 1)[0],
    "masked_info_nce": lambda x: mmfused.masked_info_nce(x[:, 0], x[:, 1], temperature=0.5),
    "experts": lambda x: moe(x)[0],
}

def inside(function):
    def run(x):
        with mmfused.backend("reference"):
            first = function(x)
        with mmfused.backend("composed"):
            return first, function(x)

    return run

x = torch.randn(5, 6, 16)
for name, function in functions.items():
    want = inside(function)(x)
    got = compiled(inside(function), fullgraph=True)(x)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    run = compiled(function, fullgraph=True)
    for backend in ("reference", "composed", "reference"):
        with mmfused.backend(backend):
            torch.testing.assert_close(run(x), function(x), rtol=1e-5, atol=1e-5)
    assert graphs() == 2, name  # one for each backend
"""


PARTS = {
    "with in the function": TRACED,
    "around the call": AROUND,
    "graph breaks": BREAKS,
    "backward": BACKWARD,
    "ops": OPS,
}


@pytest.fixture(scope="module")
def errors():
    """Run all parts in one process, because imports take most of the time; return their errors."""
    code = f"""
import json, traceback

errors = {{}}
for name, part in {PARTS!r}.items():
    try:
        exec(compile({COMMON!r} + part, name, "exec"), {{"__name__": "__main__"}})
        errors[name] = None
    except BaseException:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""
    done = run_python("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PARTS)
def test_compiled_code_follows_the_backend_switch(name, errors):
    assert errors[name] is None, errors[name][-3000:]
