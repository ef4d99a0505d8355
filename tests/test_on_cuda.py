"""Tests on a GPU: accuracy, host syncs, CUDA graphs, streams, repeated runs, devices, memory.

The cases are in on_cuda_cases.py. Without a GPU, only the tests of accuracy run, at tiny sizes, and
launches of the real sizes are recorded: they reach every kernel, and no host waits.
"""

import contextlib

import on_cuda_cases
import pytest
import torch
from on_cuda_cases import CASES as ALL_CASES
from on_cuda_cases import CUDA, HALF, info_nce, pooling

import mmfused
from mmfused import extension
from mmfused.cli.compiling import recorded_launches
from mmfused.library import KERNELS_ON_CPU
from mmfused.testing import over_budget, relative_error
from mmfused.tools.bounds.launch_cases import floats
from mmfused.tools.bounds.launches import recorded

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
ALL_DTYPES = (
    (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float16, torch.float32)
)
CASES = {name: case for name, case in ALL_CASES.items() if CUDA or not case.large}
FUSED = [name for name, case in CASES.items() if case.fused]
MODULES = [name for name, case in CASES.items() if case.module]
ON_DEVICE = [(name, "fused") for name in FUSED] + [
    (name, "composed") for name, case in CASES.items() if case.composed
]
WITHOUT_SYNCS = [
    (name, backend) for name, backend in ON_DEVICE if backend == "fused" or not CASES[name].waits
]


def label(value) -> str:
    return str(value).removeprefix("torch.")


def make(name, tiny=not CUDA):
    if name == "topk_routing in C++" and (reasons := extension.why_not()):
        pytest.skip("; ".join(reasons))
    torch.manual_seed(0)
    return ALL_CASES[name].make(tiny)


@contextlib.contextmanager
def on_backend(name, backend):
    with mmfused.backend(backend):
        yield


def values(problem) -> dict[str, torch.Tensor]:
    """Return all inputs and parameters of the problem."""
    return problem.leaves() | {name: x for name, x in problem.given.items()}


@torch.no_grad()
def write(problem, given: dict[str, torch.Tensor]) -> None:
    for name, target in values(problem).items():
        target.copy_(given[name])


def other_values_and_results(problem) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return other valid values and their results; the problem keeps its own values."""
    given = {name: x.detach().clone() for name, x in values(problem).items()}
    new = {name: x.flip(0) if x.dim() else x + 1 for name, x in given.items()}
    write(problem, new)
    wanted = problem.run()
    write(problem, given)
    return new, wanted


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, want in expected.items() if not torch.equal(actual[name], want)] == []
    assert all(torch.isfinite(x).all() for x in actual.values())


def faults(problem, dtype, backend, name, compiler=None) -> list[str]:
    """Return a sentence for each result whose error exceeds a multiple of plain PyTorch's error.

    Two kinds of results have more random errors and a larger tolerance: single numbers, and results
    that are 0 up to rounding, such as the gradient of a key bias.
    """
    with on_backend(name, "reference"):
        exact, plain = problem.run(), problem.to(dtype).run()
    tested = problem.to(dtype)
    with on_backend(name, backend):
        actual = tested.run(
            None
            if compiler is None
            else torch.compile(tested.module, fullgraph=True, backend=compiler)
        )
    random_errors = {
        key for key, want in exact.items() if want.numel() == 1 or want.abs().max() < 1e-9
    }
    judged = (
        {key: x for key, x in results.items() if key not in random_errors}
        for results in (actual, exact, plain)
    )
    # At a tiny size, all errors are somewhat random.
    found = over_budget(*judged, factor=2.0 if CUDA else 4.0)
    for key in random_errors:
        want = exact[key].where(exact[key].abs() > 1e-9, 0.0)
        allowed = 8 * relative_error(plain[key], want) + 64 * torch.finfo(actual[key].dtype).eps
        if not relative_error(actual[key], want) <= allowed:
            found.append(
                f"{key}: error {relative_error(actual[key], want):.3e}, allowed {allowed:.3e}."
            )
    return found


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.skipif(not (CUDA or KERNELS_ON_CPU), reason="needs kernels that run")
@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for name in FUSED
        for dtype in (ALL_DTYPES if CUDA and CASES[name].dtypes else [HALF])
    ],
    ids=label,
)
def test_kernels_are_as_accurate_as_plain_pytorch(name, dtype):
    assert faults(make(name), dtype, "fused", name) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.composed])
def test_composed_paths_are_as_accurate_as_plain_pytorch(name):
    dtype = HALF if CUDA else torch.float32
    assert faults(make(name), dtype, "composed", name) == []


@pytest.mark.skipif(not (CUDA or KERNELS_ON_CPU), reason="needs kernels that run")
@pytest.mark.parametrize("name", MODULES)
def test_compiled_modules_are_as_accurate_as_plain_pytorch(name, monkeypatch):
    """Each module compiles to one graph. Without a GPU, the graph runs without inductor."""
    monkeypatch.undo()  # the compiler would trace into conftest's patched torch.empty
    torch._dynamo.reset()
    dtype, compiler = (HALF, "inductor") if CUDA else (torch.float32, "aot_eager")
    assert (
        faults(make(name), dtype, "fused" if CASES[name].fused else "composed", name, compiler)
        == []
    )


# ---- the kernels that the cases reach -----------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="records launches of CPU tensors")
def test_cases_reach_every_kernel_without_a_wait(monkeypatch):
    """What the accuracy, the graphs and the repeated runs of this file check is every kernel."""
    monkeypatch.setattr(on_cuda_cases, "randn", lambda *shape, std=1.0: floats(*shape))
    reached = {80: set(), 90: set()}
    for name, case in ALL_CASES.items():
        if not case.fused or name == "topk_routing in C++":  # its kernels are not Triton's
            continue
        problem = make(name, tiny=False).to(torch.bfloat16)
        for arch, kernels in reached.items():
            with recorded(arch=arch) as launches, mmfused.backend("fused"):
                problem.run()
            assert [launch.name for launch in launches if launch.waits] == [], name
            made = [launch.kernel.kernel.fn for launch in launches if launch.kernel is not None]
            kernels |= {f"{kernel.__module__}.{kernel.__name__}" for kernel in made}
    for arch, kernels in reached.items():
        wanted = {f"{job.module}.{job.kernel}" for job in recorded_launches(f"sm_{arch}")}
        assert wanted <= kernels, sorted(wanted - kernels)


# ---- the host, graphs, streams and devices -------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("name, backend", WITHOUT_SYNCS, ids=label)
def test_a_run_needs_no_host_sync(name, backend):
    problem = make(name).to(HALF)
    with on_backend(name, backend):
        problem.run()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.run()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@needs_cuda
@pytest.mark.parametrize("name, backend", WITHOUT_SYNCS, ids=label)
def test_a_cuda_graph_replays_on_new_values(name, backend):
    problem = make(name).to(HALF)
    # The MATH backend, because torch's fused attention sums gradients in a varying order.
    with (
        on_backend(name, backend),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        new, wanted = other_values_and_results(problem)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            problem.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = problem.run()
    write(problem, new)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, wanted)


@needs_cuda
@pytest.mark.parametrize("name", FUSED)
def test_runs_are_bitwise_equal_while_another_stream_is_busy(name):
    problem, noise = make(name).to(HALF), torch.randn(4096, 4096, device="cuda")
    with on_backend(name, "fused"):
        first = problem.run()
        assert_same(problem.run(), first)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(20):
                noise = torch.tanh(noise @ noise)
        assert_same(problem.run(), first)
        torch.cuda.current_stream().wait_stream(side)


@needs_cuda
@pytest.mark.parametrize("name", FUSED)
def test_kernels_run_on_the_current_stream(name):
    """A launch on another stream would read the values before they are written."""
    problem = make(name).to(HALF)
    with on_backend(name, "fused"):
        new, wanted = other_values_and_results(problem)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)  # cycles, far longer than all launches
            write(problem, new)
            results = problem.run()
        torch.cuda.current_stream().wait_stream(side)
    assert_same(results, wanted)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("name", FUSED)
def test_tensors_may_be_on_a_device_other_than_the_current_one(name):
    problem = make(name).to(HALF)
    with on_backend(name, "fused"):
        wanted, results = problem.run(), problem.on(torch.device("cuda", 1)).run()
    for key, want in wanted.items():
        assert (
            results[key].device.index == 1
            and relative_error(results[key].to(want.device), want) < 1e-2
        ), key


# ---- memory --------------------------------------------------------------------------------------


def peak_bytes(call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@needs_cuda
def test_info_nce_of_32768_pairs_needs_less_than_a_gigabyte():
    """The matrix of logits alone would take 2 GiB in 16 bits."""
    inputs = {
        name: torch.randn(32768, 256, device="cuda", dtype=HALF).div_(16).requires_grad_()
        for name in ("query", "candidate")
    }
    problem = info_nce(symmetric=True)(True)
    problem.inputs = problem.to(HALF).inputs | inputs
    with mmfused.backend("fused"):
        assert peak_bytes(problem.run) < 2**30


@needs_cuda
def test_pooling_never_stores_keys_or_values():
    """The keys alone would be as large as x."""
    problem = pooling()(False).to(HALF)
    with mmfused.backend("fused"):
        assert peak_bytes(lambda: problem.module(**problem.inputs)) < problem.inputs["x"].nbytes / 2
