"""The package as a wheel, sdist, editable install and clone, and next to a package "kernels"."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    ".ci",
    ".github",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "benchmarks",
    "csrc",
    "docs",
    "examples",
    "kernels",
    "mmfused",
    "pyproject.toml",
    "setup.py",
    "tests",
    "tools",
)
OPTIONAL = (
    "triton",
    "timm",
    "transformers",
    "tokenizers",
    "torchvision",
    "PIL",
    "numpy",
    "matplotlib",
    "tqdm",
)
INSTALLED = ("wheel", "sdist", "editable")


def run(*arguments: object, cwd: Path, pythonpath: tuple[Path, ...] = (), **variables: str) -> str:
    """Run `python *arguments` in `cwd` and return its standard output."""
    settings = ("PYTHONPATH", "PYTHONSAFEPATH", "TRITON_INTERPRET")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in settings and not name.startswith("MMFUSED_")
    }
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, pythonpath))} | variables
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Return a folder of links to all installed packages except mmfused."""
    folder = tmp_path_factory.mktemp("dependencies")
    for site in (
        Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")
    ):
        for item in site.iterdir():
            if "mmfused" not in item.name and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Return a copy of the checkout, so that builds do not change the checkout."""
    folder = tmp_path_factory.mktemp("clone") / "mmfused"
    folder.mkdir()
    for source in (ROOT / name for name in SOURCES):
        if source.is_dir():
            shutil.copytree(
                source,
                folder / source.name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "_build"),
            )
        else:
            shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="module")
def wheels(clone, tmp_path_factory) -> dict[str, Path]:
    """Build a wheel of the clone, a wheel of its sdist and an editable wheel, without a network."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("building a wheel without a network needs pip and setuptools installed")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77 or newer")
    out = {mode: tmp_path_factory.mktemp(mode) for mode in INSTALLED}
    build = (
        "import sys; from setuptools import build_meta as hooks; "
        "getattr(hooks, sys.argv[1])(sys.argv[2])"
    )
    for mode in ("sdist", "editable"):
        run("-c", build, f"build_{mode}", out[mode], cwd=clone)
    (sdist,) = out["sdist"].iterdir()
    for source, mode in ((clone, "wheel"), (sdist, "sdist")):
        offline = ("--no-build-isolation", "--no-deps", "--no-index")
        run("-m", "pip", "wheel", *offline, "--wheel-dir", out[mode], source, cwd=out[mode])
    return {mode: next(folder.glob("*.whl")) for mode, folder in out.items()}


@pytest.fixture(scope="module")
def site_folders(wheels, tmp_path_factory) -> dict[str, Path]:
    """Install each wheel into a separate folder, and return the folders."""
    folders = {mode: tmp_path_factory.mktemp(f"site_{mode}") for mode in wheels}
    for mode, wheel in wheels.items():
        run(
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--target",
            folders[mode],
            wheel,
            cwd=wheel.parent,
        )
    return folders


PROBE = """
import importlib.util, json, site, sys
site.addsitedir(sys.argv[1])  # reads the folder's .pth files, as in site-packages
import mmfused, mmfused.benchmarks, mmfused.kernels
if importlib.util.find_spec("triton"):
    importlib.import_module("mmfused.kernels.query_pooling")
assert all(hasattr(mmfused, name) for name in mmfused.__all__)
print(json.dumps([mmfused.__path__[0], mmfused.kernels.__path__[0], *mmfused.benchmarks.__path__]))
"""


def imported_from(cwd: Path, site: Path, dependencies: Path) -> list[Path]:
    """Return the folders from which Python in `cwd` imports mmfused, its kernels and benchmarks."""
    output = run("-S", "-c", PROBE, site, cwd=cwd, pythonpath=(dependencies,))
    return [Path(folder).resolve() for folder in json.loads(output)]


@pytest.mark.parametrize("mode", INSTALLED)
def test_installed_package_imports(mode, site_folders, clone, dependencies, tmp_path):
    site = site_folders[mode]
    from_clone = [clone / "mmfused", clone / "kernels", clone / "benchmarks"]
    from_site = [site / "mmfused", site / "mmfused" / "kernels", site / "mmfused" / "benchmarks"]
    assert imported_from(tmp_path, site, dependencies) == (
        from_clone if mode == "editable" else from_site
    )
    # The working directory takes precedence over installed packages.
    assert imported_from(clone, site, dependencies) == from_clone


def test_plain_clone_imports(clone, dependencies, tmp_path):
    from_clone = [clone / "mmfused", clone / "kernels", clone / "benchmarks"]
    assert imported_from(clone, tmp_path, dependencies) == from_clone
    assert imported_from(tmp_path, clone, dependencies) == from_clone


def test_the_wheel_contains_only_the_package(wheels, clone):
    package = {path.relative_to(clone) for path in (clone / "mmfused").rglob("*.py")} | {
        Path("mmfused/py.typed")
    }
    for folder in ("kernels", "benchmarks"):
        package |= {
            Path("mmfused") / path.relative_to(clone) for path in (clone / folder).rglob("*.py")
        }
    package |= {Path("mmfused") / path.relative_to(clone) for path in (clone / "csrc").iterdir()}
    for mode in ("wheel", "sdist"):
        names = [Path(name) for name in zipfile.ZipFile(wheels[mode]).namelist()]
        assert {name for name in names if not name.parts[0].endswith(".dist-info")} == package
        assert len({name.parts[0] for name in names}) == 2


def test_the_sdist_contains_all_sources(wheels, clone):
    (archive,) = wheels["sdist"].parent.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        packed = {Path(*Path(name).parts[1:]) for name in sdist.getnames()}
    added = {"__pycache__", "build", "mmfused.egg-info"}  # by builds and imports
    files = {path.relative_to(clone) for path in clone.rglob("*") if path.is_file()}
    assert {path for path in files - packed if not added & set(path.parts)} == set()


BUILD_WHEEL = "from setuptools import build_meta as hooks; print(hooks.build_wheel({!r}))"


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [
        ("import sys; sys.modules['torch'] = None", "the build environment has no torch"),
        ("import torch", "has no bin/nvcc"),
    ],
)
def test_the_cuda_extension_is_skipped_with_the_reason(prelude, reason, clone, wheels, tmp_path):
    settings = dict(MMFUSED_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    output = run("-c", f"{prelude}\n{BUILD_WHEEL.format(str(tmp_path))}", cwd=clone, **settings)
    (line,) = (line for line in output.splitlines() if line.startswith("mmfused: MMFUSED_CUDA=1"))
    assert "skipped" in line and reason in line
    assert output.splitlines()[-1].endswith("py3-none-any.whl")


def test_an_installed_package_contains_the_sources_of_the_cuda_extension(
    site_folders, dependencies, tmp_path
):
    probe = (
        "import site, sys; site.addsitedir(sys.argv[1]); from mmfused import extension as e;"
        " print(e.source_folder(), 'sources' in str(e.why_not()))"
    )
    for site in site_folders.values():
        folder, missing = run(
            "-S", "-c", probe, site, cwd=tmp_path, pythonpath=(dependencies,)
        ).split()
        assert (Path(folder) / "topk_routing.cu").is_file() and missing == "False"


def test_import_loads_no_optional_package():
    probe = (
        "import sys, torch; before = set(sys.modules); import mmfused; "
        "print(*set(sys.modules) - before)"
    )
    loaded = {name.split(".")[0] for name in run("-c", probe, cwd=ROOT).split()}
    assert "mmfused" in loaded
    assert sorted(loaded & set(OPTIONAL)) == []


def test_the_library_works_without_optional_packages():
    probe = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None: importing it raises ImportError
import mmfused, torch
x = torch.randn(2, 3, 8, requires_grad=True)
mmfused.QTransform(8, num_queries=2)(x).square().sum().backward()
assert x.grad.abs().sum() > 0
"""
    run("-c", probe, cwd=ROOT)


def test_the_kernels_folder_is_not_importable_as_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    probe = (
        'import importlib.util; spec = importlib.util.find_spec("kernels"); '
        "print(spec and spec.origin)"
    )
    origin = run("-c", probe, cwd=ROOT).strip()
    assert not Path(origin).is_relative_to(ROOT / "kernels")


def test_import_kernels_finds_the_hugging_face_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("hugging_face = True\n")
    probe = (
        "import mmfused.kernels, kernels; print(kernels.hugging_face, *mmfused.kernels.__path__)"
    )
    found, *folders = run("-c", probe, cwd=ROOT, pythonpath=(tmp_path,)).split()
    assert found == "True"
    assert {Path(folder).resolve() for folder in folders} == {ROOT / "kernels"}


def test_transformers_does_not_take_the_kernels_folder_for_the_package():
    pytest.importorskip("transformers", reason="transformers is not installed")
    run(
        "-c",
        "from transformers.utils import is_kernels_available as available; available()",
        cwd=ROOT,
    )


def test_each_op_has_a_kernel_a_test_and_a_benchmark_of_its_name():
    ops = {
        path.stem for path in (ROOT / "mmfused" / "ops").iterdir() if not path.name.startswith("_")
    }
    assert "query_pooling" in ops
    for op in ops:
        assert any(
            (ROOT / place).exists()
            for place in (f"kernels/{op}.py", f"kernels/{op}", f"csrc/{op}.cu")
        ), op
        assert (ROOT / "tests" / f"test_{op}.py").is_file()
        assert (ROOT / "benchmarks" / f"{op}.py").is_file()


def test_the_error_for_a_missing_package_names_the_pip_command():
    probe = """
import importlib, sys, mmfused
for module, package in %r:
    loaded = ("mmfused.data", "mmfused.training")
    for name in [name for name in sys.modules if name.startswith(loaded)]:
        del sys.modules[name]
    held, sys.modules[package] = sys.modules.pop(package, None), None
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(module, error)
    del sys.modules[package]
"""
    cases = {
        ("mmfused.data", "PIL"): "pillow",
        ("mmfused.data", "tokenizers"): "tokenizers",
        ("mmfused.training.run_folder", "safetensors.torch"): "safetensors",
        ("mmfused.training.run_folder", "matplotlib.figure"): "matplotlib",
        ("mmfused.training.loop", "tqdm"): "tqdm",
    }
    messages = run("-c", probe % [*cases], cwd=ROOT).splitlines()
    wanted = [
        f"{module} {package} is not installed: pip install 'mmfused[models]'"
        for (module, _), package in cases.items()
    ]
    assert messages == wanted
