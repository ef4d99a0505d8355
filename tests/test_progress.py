"""The progress bar of training shows the pictures per second of all ranks."""

import json
import re

import pytest
import torch
from training_runs import few_products, small_run  # noqa: F401

from mmfused.training import loop
from mmfused.training.run import train


def test_pictures_are_counted_in_all_roles():
    one = {"image_present": torch.tensor([True, False, True]), "labels": torch.zeros(3)}
    two = {"image_present": torch.tensor([True]), "input_ids": torch.zeros(1, 4)}
    assert loop.count_pictures(one) == 2
    assert loop.count_pictures({"query": one, "candidate": two, "keys": torch.ones(3)}) == 3
    packed = {"image_grid_thw": torch.ones(5, 3), "code": torch.zeros(7)}
    assert loop.count_pictures({"query": packed, "candidate": {"code": torch.zeros(2)}}) == 5


def test_the_bar_shows_the_pictures_of_all_steps_since_the_last_record(tmp_path, monkeypatch):
    shown = []

    class Bar(loop.tqdm):
        def set_postfix_str(self, s="", refresh=True):
            shown.append(s)

    monkeypatch.setattr(loop, "tqdm", Bar)
    counts = []
    count_pictures = loop.count_pictures
    monkeypatch.setattr(
        loop, "count_pictures", lambda batch: counts.append(count_pictures(batch)) or counts[-1]
    )
    options = {"steps": 4, "log_every": 2, "accumulate": 2, "val_every": 4, "augment": "none"}
    train(small_run(tmp_path / "run", progress=True, **options))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines if "seconds" in line]
    assert len(counts) == 8 and len(shown) == len(seconds) == 2
    for text, step, of_record in zip(shown, seconds, (counts[:4], counts[4:]), strict=True):
        speed = re.fullmatch(r"loss \d+\.\d{3}.*, [\d.]+ s/step, (\S+) pictures/s", text)[1]
        assert float(speed) == pytest.approx(sum(of_record) / (2 * step), rel=1e-3)
