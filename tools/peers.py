r"""Run other libraries' tests without and with mmfused, and list the tests that mmfused breaks.

    python tools/peers.py --checkouts FOLDER [SUITE ...]

FOLDER contains clones of these repositories, in folders named after the repositories:

    https://github.com/huggingface/sentence-transformers
    https://github.com/mlfoundations/open_clip
    https://github.com/huggingface/transformers

The suites of a missing clone are skipped. Each suite imports its library from the clone, but the
library's dependencies must be installed. In the clone of transformers, check out the tag of the
installed release. The tests also need

    pip install pytest-xdist pytest-env parameterized datasets requests httpx sentencepiece \
        webdataset

Nothing is downloaded: HF_HUB_OFFLINE is set, and tools/peers_models.py creates tiny models for the
tests of sentence-transformers. Only tests that pass plain, that is without mmfused, are compared.
The training tests of open_clip leave a folder `logs` in the clone.

The exit status is 1 if a test that passes plain fails twice with mmfused and is not listed in
EXCEPTIONS, if no test of a suite passes plain, or if no test of a suite ran an mmfused op. The exit
status is 2 if no clone is found.
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
    """Tests of one library.

    ``tests``: files and folders for pytest, relative to the clone.
    ``select``: expression for pytest's ``-k``.
    ``source``: folder of the clone from which the library is imported.
    ``inserts``: values of ``--peers-insert`` in tools/peers_plugin.py.
    """

    name: str
    checkout: str
    tests: tuple[str, ...]
    select: str = ""
    source: str = "src"
    inserts: tuple[str, ...] = ("fuse",)


# Leaves out some tests of transformers: tests that start processes, where mmfused would not be
# inserted; tests of attention functions; and the slowest tests.
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
        "transformers mixtures",  # OLMoE's test model uses SiLU, Mixtral's uses GELU
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

# Pattern of node ids -> reason why these tests may fail with mmfused.
EXCEPTIONS = {
    "*::test_eager_matches_batched_and_grouped_inference*": (
        "the test asserts that transformers' own grouped_mm and batched_mm functions are called"
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
    """Run the suite, or only the tests in ``only``; return ``tests`` of tools/peers_plugin.py."""
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
    label, end = f"{suite.name} (insert: {insert})", finished.stdout[-4000:]
    if not out.is_file():
        sys.exit(f"{end}\npeers: {label}: pytest exited with status {finished.returncode}.")
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
    """Return node id -> failure or outcome, for tests that pass plain but not with mmfused."""
    absent = {"outcome": "did not run", "failure": ""}
    found = {}
    for name, test in plain.items():
        other = inserted.get(name, absent)
        if test["outcome"] == "passed" != other["outcome"]:
            found[name] = other["failure"] or other["outcome"]
    return found


def matching_exception(name: str) -> str | None:
    return next((pattern for pattern in EXCEPTIONS if fnmatch(name, pattern)), None)


def compare(
    suite: Suite,
    checkout: Path,
    scratch: Path,
    workers: int,
) -> tuple[list[tuple], list[str], set[str]]:
    """Return the rows of the table, the faults, and the patterns of the exceptions used."""
    rows, faults, used = [], [], set()
    plain = run(suite, checkout, "nothing", scratch, workers)
    for insert in suite.inserts:
        label, tests = f"{suite.name}, {insert}", run(suite, checkout, insert, scratch, workers)
        found = differing(plain, tests)
        excepted = {name: matching_exception(name) for name in found}
        used |= set(filter(None, excepted.values()))
        broken = {name: failure for name, failure in found.items() if not excepted[name]}
        if broken:  # repeat these tests, because some are flaky
            again = run(suite, checkout, insert, scratch, workers, tuple(broken))
            for name in list(broken):
                if again.get(name, {}).get("outcome") == "passed":
                    print(f"{label}: {name} failed, but passed when repeated: {broken.pop(name)}")
        ran_op = sum(test["calls"] > 0 for test in tests.values())
        counts = passing(plain), passing(tests), ran_op, len(broken), len(found)
        rows.append((label, *map(str, counts)))
        faults += [f"{label}: {name}: {failure}" for name, failure in broken.items()]
        if not passing(plain):
            faults.append(f"{label}: no test passes plain.")
        elif not ran_op:
            faults.append(f"{label}: no test ran an mmfused op.")
    return rows, faults, used


def make_models(checkout: Path, scratch: Path) -> None:
    command = [sys.executable, TOOLS / "peers_models.py", scratch / "hf"]
    env = environment(checkout, scratch)
    made = subprocess.run(command, env=env, capture_output=True, text=True)
    if made.returncode:
        print(
            f"{made.stderr[-2000:]}\npeers: tools/peers_models.py failed, so some tests will too."
        )


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    all_names = ", ".join(suite.name for suite in SUITES)
    suite_help = f"part of the names of suites to run (default: all): {all_names}"
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=suite_help)
    parser.add_argument("--checkouts", type=Path, metavar="FOLDER", help="folder of the clones")
    workers_help = "processes of pytest-xdist (default: 2; 0: do not use pytest-xdist)"
    parser.add_argument("--workers", type=int, default=2, help=workers_help)
    args = parser.parse_args(argv)

    words = args.suites or [""]
    chosen = [suite for suite in SUITES if any(word in suite.name for word in words)]
    if not chosen:
        parser.error(f"SUITE: got {' '.join(words)}, expected part of one of {all_names}")
    names = list(dict.fromkeys(suite.checkout for suite in chosen))
    where = args.checkouts and args.checkouts.resolve()
    missing = [name for name in names if not where or not (where / name).is_dir()]
    if missing == names:
        print(
            f"peers: clone {', '.join(names)} into {where or 'one folder'}, then run "
            f"make peers CHECKOUTS={where or 'FOLDER'}"
        )
        return 2
    for name in missing:
        print(f"peers: {where / name} is missing; its suites are skipped.")

    rows = [("suite", "passed plain", "with mmfused", "ran an op", "broken", "with exceptions")]
    faults, used = [], set()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "sentence-transformers" in names and "sentence-transformers" not in missing:
            make_models(where / "sentence-transformers", scratch)
        for suite in chosen:
            if suite.checkout not in missing:
                found = compare(suite, where / suite.checkout, scratch, args.workers)
                rows += found[0]
                faults += found[1]
                used |= found[2]

    print_results(rows, faults, used)
    return 1 if faults else 0


def print_results(rows: list[tuple], faults: list[str], used: set[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    for pattern, reason in EXCEPTIONS.items():
        print(f"exception{'' if pattern in used else ' (not used)'} {pattern}: {reason}")
    for fault in faults:
        print(f"FAULT {fault}")


if __name__ == "__main__":
    sys.exit(main())
