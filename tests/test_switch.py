"""The backend and the router: a default per process, overridden by ``with`` per thread and task."""

import asyncio
import sys
import threading

import pytest
import torch
from strided_views import DEVICE
from torch.utils.checkpoint import checkpoint

import mmfused
from mmfused import library
from mmfused.library import current_backend, current_router


@pytest.fixture(autouse=True)
def process_default():
    before = current_backend(), current_router()
    yield
    mmfused.set_backend(before[0])
    library.set_router(before[1])


SWITCHES = [
    (mmfused.backend, mmfused.set_backend, current_backend, ("auto", "reference", "composed")),
    (library.router, library.set_router, library.current_router, ("auto", "cuda", "triton")),
]


@pytest.mark.parametrize(("choice", "set_default", "current", "names"), SWITCHES)
def test_a_choice_holds_only_inside_with_and_can_be_nested(choice, set_default, current, names):
    first, second, third = names
    assert current() == first
    choice(second)
    assert current() == first
    with choice(second):
        assert current() == second
        with choice(third):
            assert current() == third
            set_default(second)
            assert current() == third
        assert current() == second
    assert current() == second
    set_default(third)
    assert current() == third


@pytest.mark.parametrize(("choice", "set_default", "current", "names"), SWITCHES)
def test_a_choice_is_reusable_and_reentrant(choice, set_default, current, names):
    again = choice(names[1])
    for _ in range(2):
        with again, choice(names[2]), again:
            assert current() == names[1]
        assert current() == names[0]


def test_an_error_inside_with_restores_the_default():
    with pytest.raises(KeyError), mmfused.backend("reference"):
        raise KeyError
    assert current_backend() == "auto"


@pytest.mark.parametrize("name", ["fast", None, 1])
def test_an_unknown_name_is_refused_and_changes_nothing(name):
    sentence = f"backend name: got {name!r}, expected one of auto, reference, composed, fused"
    for choose in (mmfused.backend, mmfused.set_backend):
        with pytest.raises(ValueError, match=sentence):
            choose(name)
    assert current_backend() == "auto"


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    assert results, "the thread failed"
    return results[0]


def test_threads_keep_their_own_choice():
    """Two threads with overlapping contexts each see their own choice."""
    entered, left, seen = threading.Event(), threading.Event(), []

    def first():
        with mmfused.backend("reference"):
            entered.set()
            assert left.wait(10)
            seen.append(current_backend())

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    assert current_backend() == "auto"
    with mmfused.backend("composed"):
        left.set()
        thread.join()
        assert current_backend() == "composed"
    assert current_backend() == "auto" and seen == ["reference"]


def test_a_default_holds_in_all_threads_and_a_with_only_in_its_own():
    mmfused.set_backend("composed")
    with mmfused.backend("reference"):
        assert in_thread(current_backend) == "composed"


def test_interleaved_tasks_keep_their_own_choice():
    seen = []

    async def task(name):
        for _ in range(3):
            with mmfused.backend(name):
                await asyncio.sleep(0)
                seen.append((name, current_backend()))

    async def both():
        await asyncio.gather(task("reference"), task("composed"))

    asyncio.run(both())
    assert len(seen) == 6 and all(name == got for name, got in seen)


def test_generators_that_end_out_of_order_restore_the_default():
    def holding(name):
        with mmfused.backend(name):
            yield

    first, second = holding("reference"), holding("composed")
    next(first), next(second)
    first.close()
    assert current_backend() == "composed"
    second.close()
    assert current_backend() == "auto"


# ---- backward ------------------------------------------------------------------------------------

WIDTH = 16


def pool(x):
    return mmfused.query_pooling(x[None], x[:3], x[:WIDTH], x[:WIDTH], num_heads=2)


def contrast(x):
    return mmfused.masked_info_nce(x[:10], x[10:], temperature=0.3, symmetric=True)


def route_to_experts(x):
    routing = mmfused.topk_routing_from_input(x, x[:4], 2)
    out = mmfused.grouped_mlp(
        x,
        routing,
        x[None, :8].expand(4, -1, -1),
        x.T[None, :, :8].expand(4, -1, -1),
        activation="swiglu",
        w_gate=x[None, 8:16].expand(4, -1, -1),
    )
    return out.sum() + routing.balance_loss + routing.z_loss + routing.entropy


def cross_attend(x):
    torch.manual_seed(0)
    layer = mmfused.BidirectionalGatedCrossAttention(WIDTH, 2, dropout=0.1).to(DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    return torch.cat(layer(x[None, :5], x[None, 5:], dropout_seed=seed), 1)


OPS = {
    "query_pooling": pool,
    "masked_info_nce": contrast,
    "routing and experts": route_to_experts,
    "cross-attention": cross_attend,
}


@pytest.fixture
def chosen(monkeypatch):
    """Record the backend that each call of an op chooses."""
    calls = []
    # Every module of an op that chooses a backend imports ``choose``.
    for name, module in list(sys.modules.items()):
        if not name.startswith("mmfused.ops.") or not hasattr(module, "choose"):
            continue

        def recorded(*args, _choose=module.choose, **options):
            calls.append(_choose(*args, **options))
            return calls[-1]

        monkeypatch.setattr(module, "choose", recorded)
    return calls


def tokens():
    drawn = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1))
    return drawn.to(DEVICE).requires_grad_()


def gradient(op, backend, around=lambda function, x: function(x), backward=None):
    """Return the gradient of the tokens.

    ``backward`` is called outside of ``with``. By default, loss.backward() runs inside ``with``.
    """
    x = tokens()
    with mmfused.backend(backend):
        loss = around(op, x).square().sum()
        if backward is None:
            loss.backward()
    if backward is not None:
        backward(loss)
    return x.grad


def in_another_thread(loss):
    """Run the backward in another thread, under another default backend."""
    mmfused.set_backend("composed")
    in_thread(lambda: loss.backward() or True)


def inside_another_with(loss):
    with mmfused.backend("composed"), library.router("cuda"):
        loss.backward()


BACKWARDS = pytest.mark.parametrize(
    "backward", [torch.Tensor.backward, in_another_thread, inside_another_with]
)


@BACKWARDS
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("op", OPS)
def test_a_backward_keeps_the_backend_of_its_forward(op, backend, backward, chosen):
    want = gradient(OPS[op], backend)
    calls = len(chosen)
    got = gradient(OPS[op], backend, backward=backward)
    assert torch.equal(got, want)
    # Two forwards chose a backend, and no backward did.
    assert set(chosen) == {backend} and len(chosen) == 2 * calls
    # Backends give different bits; otherwise the comparison above would prove nothing.
    assert not torch.equal(want, gradient(OPS[op], "composed"))


def checkpointed(depth):
    def around(function, x):
        for _ in range(depth):
            function = lambda x, inner=function: checkpoint(inner, x, use_reentrant=False)  # noqa: E731
        return function(x)

    return around


@BACKWARDS
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("op", OPS)
def test_a_recomputation_keeps_the_backend_of_its_forward(op, depth, backward, chosen):
    backend = "reference"  # the other backends give different bits
    want = gradient(OPS[op], backend)
    chosen.clear()
    got = gradient(OPS[op], backend, checkpointed(depth), backward)
    assert torch.equal(got, want)
    assert len(chosen) > 1 and set(chosen) == {backend}


def test_a_recomputation_keeps_the_default_of_its_forward(chosen):
    mmfused.set_backend("reference")
    x = tokens()
    loss = checkpoint(pool, x, use_reentrant=False).sum()
    in_another_thread(loss)
    assert chosen == ["reference"] * 2


def test_a_recomputation_keeps_the_router_of_its_forward():
    seen = []

    def layer(x):
        seen.append(current_router())
        return x.sin().cos()

    x = tokens()
    with library.router("cuda"):
        loss = checkpoint(layer, x, use_reentrant=False).sum()
    loss.backward()
    assert seen == ["cuda", "cuda"]


@BACKWARDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_with_inside_a_checkpoint_takes_precedence(reentrant, backward):
    seen = []

    def layer(x):
        with mmfused.backend("reference"):
            seen.append(current_backend())
            x = x.sin()
        return x.cos()

    x = tokens()
    with mmfused.backend("fused"):
        loss = checkpoint(layer, x, use_reentrant=reentrant).sum()
    backward(loss)
    assert seen == ["reference"] * 2


@BACKWARDS
def test_nested_checkpoints_keep_the_choices_of_their_forwards(backward):
    seen = []

    def inner(x):
        seen.append(current_backend())
        return x.sin().cos()

    def layer(x):
        seen.append(current_backend())
        with mmfused.backend("reference"):
            x = checkpoint(inner, x.sin(), use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():  # its hooks hide those of the checkpoint
            seen.append(current_backend())
        return x.sin().cos()

    x = tokens()
    with mmfused.backend("fused"):
        loss = checkpoint(layer, x, use_reentrant=False).sum()
    assert seen == ["fused", "reference", "fused"]
    seen.clear()
    backward(loss)
    # The last entry comes from the recomputation of ``inner``.
    assert seen == ["fused", "reference", "fused", "reference"]


def test_reading_the_backend_keeps_the_hooks_on_saved_tensors():
    packed = []

    def hooks(name):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: packed.append(name) or x, lambda x: x
        )

    x = tokens()
    with hooks("outer"):
        with hooks("inner"):
            assert current_backend() == "auto"
            x.sin()
        x.sin()
    assert packed == ["inner", "outer"]


def test_checkpoints_work_if_torch_does_not_expose_its_hooks(monkeypatch):
    monkeypatch.setattr(mmfused.switch, "_top_hooks", lambda ignore_tracing: None)
    x = tokens()
    with mmfused.backend("reference"):
        checkpoint(pool, x, use_reentrant=False).sum().backward()
        assert current_backend() == "reference"
