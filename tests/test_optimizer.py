"""Learning rates by part and schedule, the optimizer's groups, and the recipes."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import safetensors.torch
import training_runs
from retrieval_models import NAMES, small_model
from training_runs import assert_same_run, fail_in_step, records, small_run

from mmfused.cli import main
from mmfused.cli.train import add_arguments
from mmfused.cli.train_options import config_options
from mmfused.models import MODELS
from mmfused.training.checkpoint import saved
from mmfused.training.config import TrainConfig
from mmfused.training.optimizer import learning_rate, make_optimizer, set_rates
from mmfused.training.recipes import recipe
from mmfused.training.run import train

few_products = training_runs.few_products
stopped_run = training_runs.stopped_run
whole_run = training_runs.whole_run
OWN = {"lr_image": 1e-5, "lr_text": 1e-4}
PREFIXES = {
    "lr_image": ("image_encoder.", "host.visual."),
    "lr_text": ("text_encoder.", "host.language_model."),
}


def options_of(*given):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_options(parser.parse_args(["--data", "x", "--out", "y", *given]))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1, 0.75, 0.5, 0.25, 0]), ("constant", [0.5, 1, 1, 1, 1, 1])],
)
def test_after_the_warm_up_the_rate_follows_the_schedule(schedule, expected):
    rates = [learning_rate(step, 6, 2.0, 1 / 3, schedule) for step in range(6)]
    assert rates == pytest.approx([2 * rate for rate in expected])


def test_without_warm_up_the_first_step_has_the_peak():
    assert [learning_rate(0, 5, 3.0, 0.0, name) for name in ("cosine", "linear")] == [3.0, 3.0]


def grouped(model, config):
    """Return (setting, decays, names) of each group of the optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (group["rate"], group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in make_optimizer(model, config).param_groups
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_groups_parameters_by_part_and_decay(name):
    model, plain = small_model(name), TrainConfig("x", model=name, weight_decay=0.1)
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    decayed = [
        path
        for path, p in model.named_parameters()
        if p.ndim > 1 and "norm" not in path and not path.endswith("bias")
    ]
    rest = [path for path in trained if path not in decayed]
    assert grouped(model, plain) == [("lr", 0.1, decayed), ("lr", 0.0, rest)]
    groups = grouped(model, TrainConfig("x", model=name, weight_decay=0.1, **OWN))
    assert [group[:2] for group in groups] == [
        (setting, decay) for setting in ("lr", *OWN) for decay in (0.1, 0.0)
    ]
    for setting, decay, names in groups:
        of_part = [path for path in trained if path.startswith(PREFIXES.get(setting, ()))]
        if setting == "lr":
            of_part = [path for path in trained if not path.startswith(sum(PREFIXES.values(), ()))]
        assert names == [path for path in of_part if (path in decayed) == (decay > 0)]
        assert names or setting == "lr"


def test_the_rates_of_parts_follow_the_schedule_from_their_own_peaks():
    model = small_model("uniecs")
    config = TrainConfig("x", model="uniecs", lr=1e-3, warmup=0.4, schedule="linear", **OWN)
    optimizer = make_optimizer(model, config)
    for step, share in enumerate((1 / 2, 1, 2 / 3, 1 / 3, 0)):
        rates = set_rates(optimizer, config, step, 5)
        expected = {"lr": 1e-3 * share, "lr_image": 1e-5 * share, "lr_text": 1e-4 * share}
        assert rates == pytest.approx(expected)
        assert [group["lr"] for group in optimizer.param_groups] == [
            rates[setting] for setting in ("lr", "lr", "lr_image", "lr_image", "lr_text", "lr_text")
        ]


def test_a_run_records_the_rates_and_moves_its_parts_by_them(tmp_path):
    changes = {"steps": 2, "save_every": 1, "weight_decay": 0.0, "warmup": 0.0}
    changes |= {"schedule": "constant", "lr": 1e-3}
    train(small_run(tmp_path / "run", **changes, lr_image=1e-6))
    for record in records(tmp_path / "run")[:2]:
        assert (record["lr"], record["lr_image"]) == (1e-3, 1e-6) and "lr_text" not in record
    first, second = (
        safetensors.torch.load_file(path / "model.safetensors")
        for path in saved(tmp_path / "run" / "checkpoints")
    )
    moved = {name: float((second[name] - first[name]).abs().max()) for name in first}
    image = [moved[name] for name in moved if name.startswith("image_encoder.blocks")]
    text = [moved[name] for name in moved if name.startswith("text_encoder.encoder")]
    assert 0 < max(image) < 2e-6 and max(text) > 2e-4


def test_a_run_with_rates_of_parts_resumes_bit_for_bit(tmp_path, monkeypatch):
    changes = {**OWN, "schedule": "linear", "warmup": 0.3}
    train(small_run(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        fail_in_step(patch, 6)
        with pytest.raises(OSError, match="power failure"):
            train(small_run(tmp_path / "resumed", **changes))
    train(small_run(tmp_path / "resumed", resume=True, **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_a_checkpoint_of_an_earlier_version_resumes_with_the_defaults(
    stopped_run, whole_run, tmp_path
):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    (checkpoint,) = saved(out / "checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("lr_image", "lr_text", "schedule"):
        del state["settings"]["training"][name]
    (checkpoint / "state.json").write_text(json.dumps(state))
    message = "resume: schedule: got 'linear', expected 'cosine', with which"
    with pytest.raises(ValueError, match=message):
        train(small_run(out, resume=True, schedule="linear"))
    train(small_run(out, resume=True))
    weights = [(run / "model.safetensors").read_bytes() for run in (out, whole_run)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("model", "given", "setting"),
    [
        ("unite", ["--lr-image", "1e-5", "--option", 'freeze=["vision"]'], "lr_image"),
        ("moon2", ["--lr-text", "1e-5", "--option", 'freeze=["language"]'], "lr_text"),
        ("unica", ["--lr-text", "1e-5", "--option", 'freeze=["text"]'], "lr_text"),
        ("fluid", ["--lr-image", "1e-5", "--modalities", "text"], "lr_image"),
    ],
)
def test_a_rate_of_a_part_that_is_not_trained_is_refused_before_data_is_read(
    tmp_path, capsys, monkeypatch, model, given, setting
):
    monkeypatch.setattr("mmfused.training.run.load_data", None)
    command = ["train", "--data", "generated", "--model", model, "--out", str(tmp_path / "run")]
    assert main([*command, *given]) == 2
    assert f"{setting}: got 1e-05, expected None: the model trains no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_passes_the_settings_of_the_optimizer():
    given = (
        "--lr-image 1e-5 --lr-text 1e-6 --warmup 0.2 --schedule linear --betas 0.8,0.95 --clip 2"
    )
    options = options_of(*given.split(), "--model", "uniecs", "--micro-batch", "8")
    config = TrainConfig(**options)
    assert (config.lr_image, config.lr_text, config.warmup) == (1e-5, 1e-6, 0.2)
    assert (config.schedule, config.betas, config.clip) == ("linear", (0.8, 0.95), 2.0)
    assert config.grad_cache == 8 == options_of("--grad-cache", "8")["grad_cache"]
    for wrong in ("0.9", "0.9,x", "0.9,0.9,0.9"):
        with pytest.raises(ValueError, match=f"betas: got '{wrong}', expected two numbers"):
            options_of("--betas", wrong)
    for name in ("lr_image", "lr_text"):
        with pytest.raises(ValueError, match=f"{name}: got 0.0, expected a number above 0"):
            TrainConfig("x", **{name: 0.0})
    with pytest.raises(ValueError, match="schedule: got 'step', expected one of cosine, linear, c"):
        TrainConfig("x", schedule="step")


def test_the_recipe_of_unite_is_that_of_the_public_scripts():
    common = {"weight_decay": 0.0, "warmup": 0.03, "schedule": "cosine", "betas": (0.9, 0.999)}
    common |= {"clip": 1.0, "epochs": 1, "batch_size": 4096, "max_length": 2048}
    common |= {"grad_checkpointing": True}
    unite = ["--model", "unite", "--preset", "code"]
    for stages, lr, alpha in ((["stage=1"], 1e-4, 16), (["stage=2"], 2e-5, 64), ([], 2e-5, 64)):
        options = options_of(*unite, *(part for stage in stages for part in ("--option", stage)))
        expected = {**common, "lr": lr, "lora": {"rank": 8, "alpha": alpha, "dropout": 0.05}}
        assert {name: options[name] for name in expected} == expected
        TrainConfig(**options)
    assert options_of(*unite, "--lr", "1e-3", "--lora", "none")["lr"] == 1e-3
    assert TrainConfig(**options_of(*unite, "--lora", "none")).lora is None
    paper = recipe("unite", "paper", 1)
    assert paper.keys() == {"epochs", "batch_size", "max_length", "lr", "lora"}
    assert (paper["batch_size"], paper["lora"]["alpha"]) == (4096, 16)
    assert recipe("unite", "tiny", 1) == recipe("unite", "tiny") == {}


def test_the_stage_of_the_recipe_is_that_of_the_run_to_continue(tmp_path):
    config = MODELS["unite"].config
    values = config.preset("tiny", **config.UNKNOWN, stage=1).to_dict()
    training = TrainConfig("x", model="unite", preset="code").to_dict()
    settings = {"mmfused": "0", "training": training, "model": values, "image_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    given = ["--model", "unite", "--init", str(tmp_path)]
    assert options_of(*given)["lr"] == 1e-4
    assert options_of(*given, "--option", "stage=2")["lr"] == 2e-5


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_is_made_of_valid_settings(model):
    for preset in MODELS[model].config.PRESETS:
        for stage in (1, 2):
            TrainConfig("x", model=model, preset=preset, **recipe(model, preset, stage))


def test_a_resumed_run_does_not_need_the_run_that_it_continued(tmp_path):
    given = ["train", "--data", "generated", "--max-length", "8", "--batch-size", "8", "--device"]
    given += ["cpu", "--steps", "1", "--model", "fluid", "--modalities", "text"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*given, "--out", str(one)]) == 0
    given = [*given[:-2], "--init", str(one), "--out", str(two)]
    assert main(given) == 0
    shutil.rmtree(one)
    assert main([*given, "--resume"]) == 0
    (two / "config.json").unlink()
    (two / "model.safetensors").unlink()
    assert main([*given, "--resume"]) == 0 and (two / "config.json").is_file()
