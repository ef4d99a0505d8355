"""Run other libraries' tests plain and with this library inserted: what passes plain must pass.

    python tools/peers.py --checkouts FOLDER [SUITE ...]     suites whose names contain such a word

FOLDER holds clones of https://github.com/huggingface/sentence-transformers,
https://github.com/mlfoundations/open_clip and https://github.com/huggingface/transformers, under
these names; one that is missing is skipped. Their sources are run, not what is installed, so this
interpreter needs what those depend on, in versions that suit them: where the installed transformers
is another release than the clone, check out its tag. Of their tests' requirements it takes

    pip install pytest-xdist pytest-env parameterized datasets requests httpx sentencepiece \
        webdataset

Nothing is downloaded: Hugging Face's libraries are told to be offline and find tiny models made by
tools/peers_models.py. Tests that need a network do not pass plain and so do not count, nor do those
that need a GPU where there is none. open_clip's trainings leave a folder `logs` in its clone.

Exit status 1 where a test differs and is not among EXCEPTIONS, or a suite ran no op of ours; 2
where no checkout is found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


@dataclass
class Suite:
    """``tests`` and ``select`` (-k) go to pytest; ``source`` is the folder to import from.

    ``inserts``: the ways of inserting the library, as named in tools/peers_plugin.py.
    """

    name: str
    checkout: str
    tests: tuple[str, ...]
    select: str = ""
    source: str = "src"
    inserts: tuple[str, ...] = ("fuse",)


# Of transformers' tests, leave out those that start processes (into which nothing is inserted),
# those of its attention functions, and the slowest ones of compiled generation.
SELECT = (
    "not fsdp2 and not tensor_parallel and not eager_matches_sdpa and not bc_torch_dtype"
    " and not no_recompile and not compilation_all_outputs"
)
SUITES = (
    Suite(
        "sentence-transformers losses",
        "sentence-transformers",
        ("tests/sentence_transformer/losses",),
        source=".",
    ),
    Suite(
        "open_clip losses",
        "open_clip",
        (
            "tests/test_loss.py",
            "tests/test_clap_task.py",
            "tests/test_naflexclap.py",
            "tests/test_task_base_unit.py",
            "tests/test_task_specific_unit.py",
            "tests/test_training_simple.py",
        ),
        "not training_coca",
    ),
    Suite(
        "transformers mixtures",  # OLMoE's tiny model has SiLU, Mixtral's has GELU
        "transformers",
        (
            "tests/models/olmoe/test_modeling_olmoe.py",
            "tests/models/mixtral/test_modeling_mixtral.py",
        ),
        f"{SELECT} and not (Mixtral and compile)",
        inserts=("fuse", "experts"),
    ),
    Suite(
        "transformers siglip",
        "transformers",
        ("tests/models/siglip/test_modeling_siglip.py",),
        f"(SiglipVisionModelTest or SiglipModelTest) and {SELECT}",
    ),
)

# Patterns of tests that may fail with the library -> why that is not the library's fault.
EXCEPTIONS = {
    "*::test_eager_matches_batched_and_grouped_inference*": (
        "asserts that transformers' own grouped_mm and batched_mm functions are called"
    ),
}


def run(
    suite: Suite,
    checkout: Path,
    insert: str,
    scratch: Path,
    workers: int,
    only: tuple[str, ...] = (),
) -> dict[str, dict]:
    """Run the suite, or only these tests: node id -> what tools/peers_plugin.py records."""
    started, out = time.monotonic(), scratch / "tests.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "peers_plugin", "--peers-insert", insert, "--peers-out", str(out)]
    if only:
        command += only
    else:
        command += suite.tests
        if suite.select:
            command += ["-k", suite.select]
        if workers and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
    finished = subprocess.run(
        command,
        cwd=checkout,
        env=environment(checkout / suite.source, scratch),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    label, end = f"{suite.name}, {insert} inserted", finished.stdout[-4000:]
    if not out.is_file():
        sys.exit(f"{end}\npeers: {label}: pytest ended with status {finished.returncode}.")
    tests = json.loads(out.read_text())
    passed, seconds = passing(tests), time.monotonic() - started
    if not passed and not only:
        print(end)
    print(f"{label}: {passed} of {len(tests)} tests pass, {seconds:.0f} s", flush=True)
    return tests


def passing(tests: dict[str, dict]) -> int:
    return sum(test["outcome"] == "passed" for test in tests.values())


def environment(source: Path, scratch: Path) -> dict[str, str]:
    path = [source, TOOLS, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
    }


def differing(plain: dict[str, dict], inserted: dict[str, dict]) -> dict[str, str]:
    """Return the tests that pass plain but not with the library, and how they ended."""
    lost = {"outcome": "did not run", "failure": ""}
    found = {}
    for name, test in plain.items():
        other = inserted.get(name, lost)
        if test["outcome"] == "passed" != other["outcome"]:
            found[name] = other["failure"] or other["outcome"]
    return found


def exception(name: str) -> str | None:
    return next((pattern for pattern in EXCEPTIONS if fnmatch(name, pattern)), None)


def compare(
    suite: Suite,
    checkout: Path,
    scratch: Path,
    workers: int,
) -> tuple[list[tuple], list[str], set[str]]:
    """Return rows of the table, faults, and the exceptions that occurred."""
    rows, faults, met = [], [], set()
    plain = run(suite, checkout, "nothing", scratch, workers)
    for insert in suite.inserts:
        label, tests = f"{suite.name}, {insert}", run(suite, checkout, insert, scratch, workers)
        found = differing(plain, tests)
        excepted = {name: exception(name) for name in found}
        met |= set(filter(None, excepted.values()))
        mine = {name: what for name, what in found.items() if not excepted[name]}
        if mine:  # some tests fail now and then without any cause here
            again = run(suite, checkout, insert, scratch, workers, tuple(mine))
            for name in [name for name in mine if again.get(name, {}).get("outcome") == "passed"]:
                print(f"{label}: {name} failed once, not when repeated: {mine.pop(name)}")
        ops = sum(test["calls"] > 0 for test in tests.values())
        counts = passing(plain), passing(tests), ops, len(mine), len(found)
        rows.append((label, *map(str, counts)))
        faults += [f"{label}: {name}: {what}" for name, what in mine.items()]
        if not passing(plain):
            faults.append(f"{label}: no test passes plain.")
        elif not ops:
            faults.append(f"{label}: no test ran an op of this library.")
    return rows, faults, met


def make_models(checkout: Path, scratch: Path) -> None:
    """Make the models that sentence-transformers' tests load by name."""
    command = [sys.executable, TOOLS / "peers_models.py", scratch / "hf"]
    env = environment(checkout, scratch)
    made = subprocess.run(command, env=env, capture_output=True, text=True)
    if made.returncode:
        print(f"{made.stderr[-2000:]}\npeers: no tiny models; tests that load one will not pass.")


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    known = ", ".join(suite.name for suite in SUITES)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"words of {known}; default all")
    parser.add_argument("--checkouts", type=Path, help="the folder of the clones")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2; 0: this one)")
    args = parser.parse_args(argv)

    words = args.suites or [""]
    chosen = [suite for suite in SUITES if any(word in suite.name for word in words)]
    if not chosen:
        parser.error(f"SUITE: got {' '.join(words)}, expected words of {known}")
    names = list(dict.fromkeys(suite.checkout for suite in chosen))
    where = args.checkouts and args.checkouts.resolve()
    missing = [name for name in names if not where or not (where / name).is_dir()]
    if missing == names:
        print(
            f"peers: clone {', '.join(names)} into {where or 'one folder'} and give that folder: "
            f"make peers CHECKOUTS={where or 'folder'}"
        )
        return 2
    for name in missing:
        print(f"peers: {where / name} is missing; its suites are skipped.")

    rows = [("suite", "passed plain", "with library", "ran an op", "differ", "with exceptions")]
    faults, met = [], set()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "sentence-transformers" in names and "sentence-transformers" not in missing:
            make_models(where / "sentence-transformers", scratch)
        for suite in chosen:
            if suite.checkout not in missing:
                parts = compare(suite, where / suite.checkout, scratch, args.workers)
                rows += parts[0]
                faults += parts[1]
                met |= parts[2]

    print_results(rows, faults, met)
    return 1 if faults else 0


def print_results(rows: list[tuple], faults: list[str], met: set[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    for pattern, reason in EXCEPTIONS.items():
        print(f"exception{'' if pattern in met else ' without a case here'} {pattern}: {reason}")
    for fault in faults:
        print(f"FAULT {fault}")


if __name__ == "__main__":
    sys.exit(main())
