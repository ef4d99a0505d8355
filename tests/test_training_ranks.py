"""If the settings of two ranks differ or one rank fails, both ranks stop soon with an error."""

import csv
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from training_runs import records, small_run, smaller_data

import mmfused.training.tasks
from mmfused.training import loop as training
from mmfused.training import run as training_run
from mmfused.training.run import train

SECONDS = 60  # far below the half hour after which a process group stops waiting for a rank


def different_lr(rank, out, folder, patch):
    return small_run(out, lr=(0.1, 0.2)[rank])


def different_steps(rank, out, folder, patch):
    return small_run(out, steps=(4, 5)[rank])


def different_epochs(rank, out, folder, patch):
    return small_run(out, steps=None, epochs=(1, 2)[rank])


def different_data(rank, out, folder, patch):
    return small_run(out, data=str(folder / "data"), val=str(folder / ("val", "data")[rank]))


def different_rows(rank, out, folder, patch):
    """Use a data folder with the same name on both ranks, but with different texts."""
    os.chdir(folder / ("data", "val")[rank])
    return small_run(out, data=".", val=str(folder / "val"))


def missing_data(rank, out, folder, patch):
    os.chdir(folder if rank == 0 else folder / "data")
    return small_run(out, data="data", val=str(folder / "val"))


def files_of_another_program(rank, out, folder, patch):
    if rank == 0:
        out.mkdir()
        (out / "model.safetensors").write_text("mine")
    return small_run(out)


def non_finite_loss(rank, out, folder, patch):
    update = training.update

    def poisoned(*args):
        loss, terms = update(*args)
        return (loss * float("nan") if rank == 1 else loss), terms

    patch.setattr(training, "update", poisoned)
    return small_run(out)


def full_disk(rank, out, folder, patch):
    def full(*args, **options):
        raise OSError("disk full")

    patch.setattr("mmfused.training.checkpoint.write", full)
    return small_run(out)


def failing_validation(rank, out, folder, patch):
    def failing(*args):
        if rank == 1:
            raise RuntimeError("out of memory")
        return {"accuracy": 0.5, "val_loss": 1.0}

    patch.setattr("mmfused.training.tasks.evaluate_classifier", failing)
    return small_run(out)


def name_with_an_invalid_character(rank, out, folder, patch):
    return small_run(out, data="\udcff", val="x")


def signal_during_a_validation(rank, out, folder, patch):
    def signalled(model, batches, amp, stopped):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        return {"accuracy": 0.5, "val_loss": 1.0}

    patch.setattr("mmfused.training.tasks.evaluate_classifier", signalled)
    return small_run(out)


def metrics_that_cannot_be_opened(rank, out, folder, patch):
    prepare_folder = training_run.prepare_folder

    def spoiled(*args):
        prepare_folder(*args)
        (out / "metrics.jsonl").mkdir()

    patch.setattr(training_run, "prepare_folder", spoiled)
    return small_run(out)


def failing_forward(rank, out, folder, patch):
    def failing(*args):
        if rank == 1:
            raise RuntimeError("out of memory")
        return add_gradients(*args)

    add_gradients = mmfused.training.tasks.add_gradients
    patch.setattr("mmfused.training.tasks.add_gradients", failing)
    return small_run(out)


def full_disk_at_the_end(rank, out, folder, patch):
    def failing(*args):
        raise OSError("disk full")

    patch.setattr(training, "save_run", failing)
    return small_run(out, steps=1)


# case -> the beginnings of the errors on rank 0 and on rank 1
CASES = {
    different_lr: ("ValueError: lr: got 0.1 on rank 0 and 0.2 on rank 1, expected one value",) * 2,
    different_steps: ("ValueError: steps: got 4 on rank 0 and 5 on rank 1, expected one value",)
    * 2,
    different_epochs: ("ValueError: epochs: got 1 on rank 0 and 2 on rank 1, expected one value",)
    * 2,
    different_data: ("ValueError: val: got ",) * 2,
    different_rows: ("ValueError: data's rows: got ",) * 2,
    missing_data: (
        "OtherRankError: rank 1 of 2: data: got 'data', expected a folder",
        "FileNotFoundError: data: got 'data'",
    ),
    files_of_another_program: (
        "FileExistsError: out: ",
        ("OtherRankError: rank 0 of 2: out: ", "FileExistsError: out: "),
    ),
    non_finite_loss: (
        "OtherRankError: rank 1 of 2: the loss is nan at step 1",
        "RuntimeError: the loss is nan at",
    ),
    full_disk: ("OSError: disk full", "OtherRankError: rank 0 of 2: disk full"),
    failing_validation: (
        "OtherRankError: rank 1 of 2: out of memory",
        "RuntimeError: out of memory",
    ),
    name_with_an_invalid_character: ("FileNotFoundError: data: got '\\udcff'",) * 2,
    signal_during_a_validation: ("Stopped: stopped by SIGTERM after step 4",) * 2,
    metrics_that_cannot_be_opened: ("IsADirectoryError: ", "OtherRankError: rank 0 of 2: "),
    failing_forward: (
        "OtherRankError: rank 1 of 2: out of memory",
        "RuntimeError: out of memory",
    ),
    full_disk_at_the_end: ("OSError: disk full", "OtherRankError: rank 0 of 2: disk full"),
}


def run_rank(rank, port, folder):
    """Run all cases in one process group, which must stay usable after each error."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_PORT": str(port),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    outcomes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfused.training.setup.product_data.GeneratedProducts", smaller_data())
        for case in CASES:
            begun = time.monotonic()
            with patch.context() as case_patch:
                config = case(rank, folder / case.__name__, folder, case_patch)
                try:
                    train(config)
                    outcome = "nothing"
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
            outcomes[case.__name__] = outcome, time.monotonic() - begun
        train(small_run(folder / "good", augment=False))
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))


def write_rows(folder, texts):
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label"])
        writer.writerows(["", text, row % 2] for row, text in enumerate(texts))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_rows(folder / "data", [f"a red mug {i}" for i in range(16)])
    write_rows(folder / "val", [f"a blue pot {i}" for i in range(16)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = mp.spawn(run_rank, (port, folder), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    while not ranks.join(1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            pytest.fail("a rank did not finish within 240 s")
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_both_ranks_stop_and_report_the_error(outcomes, case):
    for outcome, expected in zip(
        [rank[case.__name__] for rank in outcomes[1]], CASES[case], strict=True
    ):
        assert outcome[0].startswith(expected) and "\n" not in outcome[0], outcome
        assert outcome[1] < SECONDS


def test_the_group_can_train_after_the_errors(outcomes):
    assert [record["step"] for record in records(outcomes[0] / "good") if "loss" in record] == list(
        range(1, 10)
    )


def test_refused_settings_leave_no_folder(outcomes):
    for case in (different_lr, different_steps, different_data, different_rows, missing_data):
        assert not (outcomes[0] / case.__name__).exists()
    left = (outcomes[0] / "files_of_another_program").iterdir()
    assert [path.name for path in left] == ["model.safetensors"]
