"""Tests of the CUDA C++ router and of its build.

The compiled kernels run on the PTX machine. On a GPU, the router is also compared with the Triton
router.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import csrc_cases
import csrc_machine
import pytest
import torch
from csrc_cases import CASES, expected, make, upstream

from mmfused import extension, library
from mmfused.ops.topk_routing import topk_routing_reference
from mmfused.random import uniform
from mmfused.testing import over_budget

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[1]
EXACT = ("indices", "counts", "order", "position", "offsets", "tiles")
CLOSE = ("weights", "losses", "d_logits")
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA GPU is visible")


def pick(tensors: dict, names=CLOSE) -> dict:
    return {name: tensors[name] for name in names}


# ---- the compiled kernels, on the PTX machine ----------------------------------------------------


@pytest.fixture(scope="session", params=csrc_machine.ARCHITECTURES, ids="sm_{}".format)
def router(request):
    return csrc_machine.compiled_router(request.param)


@pytest.mark.parametrize("blocks", [512, 2])
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, blocks, router):
    case = make(**CASES[name])
    gradients = upstream(case)
    out = router.forward(case, blocks=blocks)
    out["d_logits"] = router.backward(case, gradients, out)
    exact, plain = (
        expected(case, torch.float64, gradients),
        expected(case, torch.float32, gradients),
    )
    for key in EXACT:
        assert torch.equal(out[key], exact[key]), key
    assert over_budget(pick(out), pick(exact), pick(plain)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_accept_16_bit_dtypes_and_strided_logits(dtype, router):
    case = make(37, 12, 3, dtype=dtype, strided=True, masked=True, balance="gshard")
    gradients = upstream(case)
    out = router.forward(case)
    out["d_logits"] = router.backward(case, gradients, out)
    exact, plain = (
        expected(case, torch.float64, gradients),
        expected(case, torch.float32, gradients),
    )
    plain["d_logits"] = plain["d_logits"].to(dtype)
    assert all(torch.equal(out[key], exact[key]) for key in EXACT)
    assert over_budget(pick(out), pick(exact), pick(plain)) == []


def test_kernels_treat_missing_gradients_as_zero(router):
    case = make(90, 20, 4, segments=3, masked=True)
    gradients, out = upstream(case), router.forward(case)
    for kept in range(4):
        some = [g if i == kept else None for i, g in enumerate(gradients)]
        zero = [g if i == kept else torch.zeros_like(g) for i, g in enumerate(gradients)]
        d_logits = router.backward(case, some, out)
        assert torch.equal(d_logits, router.backward(case, zero, out))
        assert d_logits.abs().sum() > 0


def test_tiles_of_every_height_match_the_reference(router):
    for tokens in (20, 60, 130, 300):  # tiles of 16, 32, 64 and 128 rows
        case = make(tokens, 4, 2)
        out = router.forward(case)
        assert torch.equal(out["tiles"], expected(case, torch.float32)["tiles"])


def test_out_of_range_index_gives_its_token_a_nan_weight(router):
    case = make(20, 6, 2, replay=True)
    case["indices"][3, 1], case["indices"][7, 0] = -5, 2**40
    out = router.forward(case)
    assert out["weights"].isnan().any(1).nonzero().flatten().tolist() == [3, 7]
    assert out["order"].sort().values.tolist() == list(range(40))
    assert out["counts"].sum() == 40


# What is broken: the kind of the machine's first report, a word of the report, and the text that is
# replaced in the sources.
BROKEN = {
    "no barrier": (
        "race",
        "finish_kernel",
        "__syncthreads();\n  for (int e = threadIdx.x; e < width",
        "for (int e = threadIdx.x; e < width",
    ),
    "no barrier of a warp": ("race", "bar.warp.sync", "rank : 0;\n    __syncwarp();", "rank : 0;"),
    "no initial values": ("uninitialised read", "route_kernel", "shared[i] = 0;", ";"),
    "small workspace": ("out of bounds", "at ints+", "experts + 1) + p.num_ints;", "experts + 1);"),
    "lanes that skip a shuffle": (
        "divergence",
        "shfl.sync",
        "if (f.replay == nullptr) token.choose",
        "if (!exists) continue;\n    if (f.replay == nullptr) token.choose",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_machine_reports_a_broken_kernel(name, tmp_path):
    kind, word, old, new = BROKEN[name]
    folder = csrc_machine.build(csrc_machine.broken_sources(tmp_path, old, new), tmp_path)
    router = csrc_machine.CompiledRouter(folder, 90)
    _, faults = router.forward_once(make(45, 5, 2), csrc_machine.SCHEDULES[0])
    assert faults[0].kind == kind
    assert word in str(faults[0])


# ---- the arithmetic, in a loop on the host -------------------------------------------------------


@pytest.fixture(scope="session")
def module():
    if not extension.built() and (reasons := extension.why_not_build()):
        pytest.skip("; ".join(reasons))
    return extension.load()


HOST_ARGUMENTS = (
    "source",
    "k",
    "sigmoid",
    "renormalize",
    "selection_bias",
    "mask",
    "segments",
    "num_segments",
    "available",
    "indices",
)


def route_on_host(module, case) -> dict[str, torch.Tensor]:
    arguments = [case[name] for name in (*HOST_ARGUMENTS, "jitter", "jitter_seed")]
    return dict(
        zip(
            ("indices", "weights", "lse", "entropy", "probabilities"),
            module.route_tokens_on_host(*arguments),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_host_loop_matches_the_reference(name, module):
    case = make(**CASES[name])
    out, exact, plain = (
        route_on_host(module, case),
        expected(case, torch.float64),
        expected(case, torch.float32),
    )
    assert torch.equal(out["indices"], exact["indices"])
    assert (
        over_budget(pick(out, ["weights"]), pick(exact, ["weights"]), pick(plain, ["weights"]))
        == []
    )
    valid = torch.ones(len(out["lse"]), dtype=torch.bool) if case["mask"] is None else ~case["mask"]
    if valid.any():  # z loss and entropy are means over tokens
        means = torch.stack([out["lse"][valid].square().mean(), out["entropy"][valid].mean()])
        torch.testing.assert_close(means.double(), exact["losses"][1:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out["probabilities"][valid].sum(1), torch.ones(int(valid.sum())))


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradient_rows_match_autograd(sigmoid, renormalize, module):
    """The loss combines weights, probabilities, z loss and entropy with random coefficients."""
    case = make(12, 10, 3, sigmoid=sigmoid, renormalize=renormalize, segments=2, available=True)
    case["segments"] = torch.arange(12) % 2
    routed = route_on_host(module, case)
    d_weights, d_balance, d_z, d_entropy = upstream(case)
    coefficients = torch.cat([torch.randn(20), torch.tensor([1 / 12])])
    row = coefficients[:-1].view(2, 10)[case["segments"]]

    def gradient(dtype):
        logits = case["source"].to(dtype).requires_grad_()
        usable = logits.masked_fill(~case["available"][case["segments"]], float("-inf"))
        u = torch.nn.functional.logsigmoid(usable) if sigmoid else usable
        probs = u.softmax(-1)
        chosen = u.gather(1, routed["indices"])
        weights = (
            chosen.softmax(-1)
            if renormalize
            else chosen.exp()
            if sigmoid
            else probs.gather(1, routed["indices"])
        )
        loss = (
            (weights * d_weights).sum()
            + d_balance * (row * probs).sum()
            + d_z * usable.logsumexp(-1).square().mean()
        )
        log_probs = probs.clamp(min=1e-300 if dtype == torch.float64 else 1e-38).log()
        loss = loss - d_entropy * (probs * log_probs).sum(1).mean()
        return {"d_logits": torch.autograd.grad(loss, logits)[0]}

    actual = module.gradient_rows_on_host(
        d_weights,
        d_balance,
        d_z,
        d_entropy,
        case["source"],
        routed["indices"],
        routed["weights"],
        coefficients,
        sigmoid,
        renormalize,
        None,
        case["segments"],
        2,
        case["available"],
        "switch",
        0.0,
        None,
    )
    assert over_budget({"d_logits": actual}, gradient(torch.float64), gradient(torch.float32)) == []


def test_binding_accepts_strided_views(module):
    """Views whose last stride is 2 give the results of contiguous tensors."""
    case = make(12, 10, 3, segments=2, available=True, biased=True, masked=True, jitter=0.2)
    case["source"] = torch.randn(12, 10)
    gradients, coefficients = upstream(case), torch.randn(21)
    weights, indices = torch.rand(12, 3), torch.rand(12, 10).argsort(1)[:, :3].contiguous()

    def strided(value):
        return torch.stack((value, value + 1 if value.dtype != torch.bool else ~value), -1)[..., 0]

    def results(view):
        given = {
            n: view(x) if isinstance(x, torch.Tensor) and x.dim() else x for n, x in case.items()
        }
        replayed = given | dict(indices=view(indices))
        logits, *rest = (view(x) for x in (case["source"], indices, weights, coefficients))
        d_logits = module.gradient_rows_on_host(
            view(gradients[0]),
            *gradients[1:],
            logits,
            *rest,
            False,
            True,
            given["mask"],
            given["segments"],
            2,
            given["available"],
            "mse",
            0.2,
            given["jitter_seed"],
        )
        return [
            *route_on_host(module, given).values(),
            *route_on_host(module, replayed).values(),
            d_logits,
        ]

    for a, b in zip(results(strided), results(torch.clone), strict=True):
        assert torch.equal(a, b)


def test_ties_go_to_the_expert_with_the_lower_index(module):
    case = make(4, 40, 5)
    case["source"] = torch.zeros(4, 40)
    case["source"][1, ::2] = -0.0  # compares equal to 0.0
    case["source"][2, 33] = case["source"][2, 35] = 1.0
    case["source"][3] = torch.randint(0, 3, (40,)).float()
    out = route_on_host(module, case)
    assert out["indices"][:3].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [33, 35, 0, 1, 2]]
    assert torch.equal(out["indices"], topk_routing_reference(case["source"], 5).indices)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_tokens_with_nan_or_infinite_logits_choose_distinct_experts(sigmoid, renormalize, module):
    """All weights of a token are NaN if a logit of an available expert is NaN."""
    case = make(5, 6, 3, sigmoid=sigmoid, renormalize=renormalize, available=True, segments=1)
    case["available"] = torch.tensor([[True, True, False, True, True, True]])
    case["source"][1, 4] = case["source"][2, :] = float("nan")
    case["source"][3, 1:4] = float("-inf")
    case["source"][4, :] = float("-inf")
    out = route_on_host(module, case)
    # If all logits are -inf, softmax and renormalisation give NaN; sigmoid(-inf) alone is 0.
    assert out["weights"].isnan().all(1).tolist() == [
        False,
        True,
        True,
        False,
        renormalize or not sigmoid,
    ]
    assert all(len(set(row)) == 3 and 2 not in row for row in out["indices"].tolist())
    assert out["indices"][2].tolist() == out["indices"][4].tolist() == [0, 1, 3]  # all scores tie
    exact = topk_routing_reference(
        case["source"][3:4].double(),
        3,
        score="sigmoid" if sigmoid else "softmax",
        renormalize=renormalize,
        available=case["available"],
    )
    torch.testing.assert_close(out["weights"][3:4].double(), exact.weights, rtol=1e-6, atol=0)


def test_jitter_has_the_same_bits_as_in_python(module):
    """With one expert, the logsumexp is the jittered logit itself, so every bit is compared."""
    case = make(64, 1, 1, sigmoid=True, jitter=0.37)
    case["source"] = torch.full((64, 1), 3.0)
    for seed in (0, 1, 2**63 - 1, -5):
        case["jitter_seed"] = torch.tensor(seed)
        noise = 1 + torch.tensor(0.37) * (2 * uniform(case["jitter_seed"], 64, 1) - 1)
        assert torch.equal(route_on_host(module, case)["lse"], (3.0 * noise).flatten())
        assert noise.unique().numel() > 60


# ---- build and choice of the router --------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nvcc_compiles_the_kernels_without_spills(arch, pytestconfig, tmp_path):
    home = extension._cuda_home()
    if home is None:
        pytest.skip("nvcc not found: nothing to compile the CUDA sources with")
    source = extension.source_folder() / "topk_routing.cu"
    command = [
        str(home / "bin" / "nvcc"),
        *extension.NVCC_FLAGS,
        "-std=c++17",
        f"-arch=sm_{arch}",
        "-Xptxas=-v",
        "-cubin",
        str(source),
    ]
    recipe = hashlib.sha256(repr((command, os.path.realpath(command[0]))).encode())
    for path in sorted(source.parent.glob("topk_routing*")):
        recipe.update(path.read_bytes())
    # Cache the output of ptxas until the command or a source file changes.
    cache = getattr(pytestconfig, "cache", None)
    log = (
        Path(cache.mkdir("csrc")) if cache else tmp_path
    ) / f"ptxas_{arch}_{recipe.hexdigest()[:16]}.txt"
    if not log.is_file():
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        log.write_text(done.stderr)
    registers = {}
    for kernel in log.read_text().split("Compiling entry function")[1:]:
        name = re.search(r"([a-z]+_kernel)(?:I(\w+?)Li(\d+)ELi(\d+)E)?", kernel)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel, name
        registers[tuple(filter(None, name.groups()))] = int(
            re.search(r"Used (\d+) registers", kernel).group(1)
        )
    print(f"sm_{arch}:", {" ".join(name): count for name, count in registers.items()})
    assert len(registers) == 2 * 3 * 6 + 2  # passes * dtypes * shapes; scan and finish
    assert max(registers.values()) <= 255


def test_loading_twice_gives_the_same_module(module):
    assert extension.load() is module is sys.modules["mmfused._C"]
    assert extension.built()


def test_second_process_imports_the_existing_build(module):
    probe = (
        "import mmfused.extension as e; e.why_not_build = lambda: ['not allowed'];"
        "print(e.load().__file__)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == module.__file__, done.stderr


def test_the_ops_refuse_cpu_tensors(module):
    case = make(4, 6, 2)
    with pytest.raises(
        RuntimeError,
        match="mmfused::topk_routing_cuda_fwd takes CUDA tensors; on a CPU use backend 'composed'",
    ):
        torch.ops.mmfused.topk_routing_cuda_fwd(*case.values())
    weights = torch.zeros(4, 2)
    with pytest.raises(
        RuntimeError,
        match="mmfused::topk_routing_cuda_bwd takes CUDA tensors; on a CPU use backend 'composed'",
    ):
        torch.ops.mmfused.topk_routing_cuda_bwd(
            weights,
            None,
            None,
            None,
            case["source"],
            weights.long(),
            weights,
            torch.zeros(7),
            False,
            True,
            None,
            None,
            1,
            None,
            "switch",
            0.0,
            None,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokens=2, experts=600, k=2), "expected 1 to 512 experts"),
        (dict(tokens=2, experts=64, k=40), "expected k from 1 to 32"),
        (dict(tokens=2, experts=100, k=2, segments=50), "expected fewer segments or experts"),
    ],
)
def test_error_for_unsupported_shapes_suggests_the_triton_router(changes, message, module):
    with pytest.raises(ValueError, match=f"{message}.*router\\('triton'\\)"):
        route_on_host(module, make(**changes))


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """Hide earlier builds and the usual folder of the CUDA toolkit; return ``monkeypatch``."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setattr(extension, "USUAL_CUDA", tmp_path / "no_cuda")
    monkeypatch.delitem(sys.modules, "mmfused._C", raising=False)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_why_not_names_every_reason(unbuilt, tmp_path):
    if extension.built():
        pytest.skip("mmfused._C is installed: it need not be built")
    unbuilt.setenv("PATH", str(tmp_path))
    unbuilt.setattr(extension.sys, "executable", str(tmp_path / "python"))
    reasons = extension.why_not()
    assert {"nvcc not found", "ninja not found", "C++ compiler c++ not found"} <= set(reasons)
    assert ("no CUDA GPU is visible" in reasons) == (torch.version.cuda is not None and not CUDA)
    with pytest.raises(
        RuntimeError, match="cannot be built here: .*nvcc not found; ninja not found"
    ):
        extension.load()
    unbuilt.setenv("CUDA_HOME", "/nowhere")
    assert "CUDA_HOME is '/nowhere', which has no bin/nvcc" in extension.why_not()
    unbuilt.setattr(extension, "source_folder", lambda: tmp_path)
    assert f"the sources are not in {tmp_path}" in extension.why_not()


def test_failed_build_raises_and_restores_the_environment(unbuilt, tmp_path):
    if extension.built() or extension.why_not_build():
        pytest.skip("needs nvcc, ninja and a C++ compiler, and mmfused._C must not be installed")
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in extension.SOURCES:
        (sources / name).write_text("#error on purpose\n")
    unbuilt.setattr(extension, "source_folder", lambda: sources)
    unbuilt.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="(?s)could not be built in .*on purpose"):
        extension.load()
    assert dict(os.environ) == before
    assert not extension.built()


def test_the_router_is_chosen_by_name():
    assert library.current_router() in library.ROUTERS
    with library.router("cuda"):
        assert library.current_router() == "cuda"
        with library.router("triton"):
            assert library.current_router() == "triton"
        assert library.current_router() == "cuda"
    with pytest.raises(
        ValueError, match="router name: got 'metal', expected one of auto, triton, cuda"
    ):
        library.router("metal")
    command = [sys.executable, "-c", "import mmfused"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MMFUSED_ROUTER": "metal"},
        capture_output=True,
        text=True,
    )
    assert (
        done.stderr.splitlines()[-1]
        == "ValueError: MMFUSED_ROUTER: got 'metal', expected one of auto, triton, cuda"
    )


# ---- on a GPU ------------------------------------------------------------------------------------


def on_device(case: dict) -> dict:
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }


def run_ops(case: dict, gradients, suffix: str) -> dict[str, torch.Tensor]:
    names = (
        "logits",
        "indices",
        "weights",
        "counts",
        "losses",
        "order",
        "position",
        "offsets",
        "tiles",
        "coefficients",
    )
    forward, backward = (
        getattr(torch.ops.mmfused, f"topk_routing{suffix}_{way}") for way in ("fwd", "bwd")
    )
    out = dict(zip(names, forward(*case.values()), strict=True))
    if case["indices"] is not None:
        out["indices"] = case["indices"]
    options = [
        case[name]
        for name in ("sigmoid", "renormalize", "mask", "segments", "num_segments", "available")
    ]
    options += [case["balance"], case["jitter"], case["jitter_seed"]]
    gradients = [g.cuda() for g in gradients]
    out["d_logits"] = backward(
        *gradients, case["source"], out["indices"], out["weights"], out["coefficients"], *options
    )
    return out


@needs_cuda
@pytest.mark.parametrize("dtype", csrc_cases.DTYPES)
@pytest.mark.parametrize("tokens", [None, 20_000])
@pytest.mark.parametrize("name", CASES)
def test_cpp_matches_triton_on_a_gpu(name, tokens, dtype, module):
    options = CASES[name] | dict(dtype=dtype) | (dict(tokens=tokens) if tokens else {})
    case = make(**options)
    gradients = upstream(case)
    cpp, triton = (
        run_ops(on_device(case), gradients, "_cuda"),
        run_ops(on_device(case), gradients, ""),
    )
    # A selection bias is added to scores whose last bit depends on the implementation, so near
    # ties may be resolved differently.
    if case["selection_bias"] is None:
        for key in EXACT:
            a, b = cpp[key], triton[key]
            if key == "tiles":  # the row of an unused tile is undefined
                a, b = (tiles.masked_fill(tiles[:, :1] < 0, -1) for tiles in (a, b))
            assert torch.equal(a, b), key
    case["indices"] = cpp["indices"].cpu()
    exact, plain = (
        expected(case, torch.float64, gradients),
        expected(case, torch.float32, gradients),
    )
    plain["d_logits"] = plain["d_logits"].to(dtype)
    assert over_budget({k: v.cpu() for k, v in pick(cpp).items()}, pick(exact), pick(plain)) == []
    again = run_ops(on_device(case), gradients, "_cuda")  # with given indices
    assert all(torch.equal(cpp[key], again[key]) for key in (*EXACT, *CLOSE))


@needs_cuda
def test_cpp_runs_in_a_cuda_graph_and_on_offsets_above_2_31(module):
    case = on_device(make(3000, 16, 2))
    warm = run_ops(case, upstream(case), "_cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.mmfused.topk_routing_cuda_fwd(*case.values())
    graph.replay()
    assert torch.equal(out[1], warm["indices"]) and torch.equal(out[5], warm["order"])
    if torch.cuda.mem_get_info()[0] > 24 * 2**30:
        far = case | dict(
            source=torch.zeros(3, 2**31 // 2 + 16, device="cuda", dtype=torch.bfloat16)[:, -16:]
        )
        far["source"].copy_(torch.randn(3, 16))
        near = far | dict(source=far["source"].contiguous())
        gradients = upstream(far)
        for a, b in zip(
            *(run_ops(either, gradients, "_cuda").values() for either in (far, near)), strict=True
        ):
            assert torch.equal(a, b)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cpp_runs_on_the_device_of_its_tensors(module):
    case = {
        name: value.to("cuda:1") if isinstance(value, torch.Tensor) else value
        for name, value in make(30, 16, 2).items()
    }
    assert torch.ops.mmfused.topk_routing_cuda_fwd(*case.values())[1].device.index == 1
