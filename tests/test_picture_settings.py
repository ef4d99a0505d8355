"""How training, validation and embedding read pictures, by the settings and the recipes."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from retrieval_models import SMALL
from training_runs import assert_same_run, fail_in_step, smaller_data

from mmfused.cli import main
from mmfused.cli.train import add_arguments
from mmfused.cli.train_options import config_options
from mmfused.models import MODELS, FLUIDConfig, UniECSConfig
from mmfused.training.checkpoint import newest
from mmfused.training.config import TrainConfig
from mmfused.training.initial import Start, load_start, model_config
from mmfused.training.load import load_trained
from mmfused.training.recipes import recipe
from mmfused.training.resume import Checkpoint
from mmfused.training.run import prepare, train

timm = pytest.importorskip("timm")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of four equal pictures, whose ends are bright and whose centre is black."""
    root = tmp_path_factory.mktemp("data")
    picture = np.zeros((32, 128, 3), np.uint8)
    picture[:, :32] = picture[:, 96:] = 255
    Image.fromarray(picture).save(root / "0.png")
    rows = "".join(f"0.png,thing {row},{row % 2}\n" for row in range(4))
    (root / "metadata.csv").write_text("file_name,text,label\n" + rows)
    return str(root)


def settings(folder, out, model="uniecs", **changes):
    options = {**SMALL["uniecs"], "resize": "stretch"} if model == "uniecs" else {}
    fields = {"data": folder, "val": folder, "max_length": 8, "image_size": 32, "steps": 2}
    fields |= {"batch_size": 2, "save_every": 1, "progress": False, **changes}
    fields["model_options"] = {**options, **changes.get("model_options", {})}
    return TrainConfig(str(out), model=model, **fields)


def means(*items):
    return [one.images.double().mean().item() for one in items]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train(settings(folder, out, products=folder))
    return out


def items_of(training):
    task = training.task
    return (
        *(task.batches.queries, task.batches.candidates),
        *(task.val_batches.items, task.product_batches.items),
    )


def test_training_and_validation_see_the_whole_picture(folder, tmp_path, run):
    config = settings(folder, tmp_path, products=folder)
    assert means(*items_of(prepare(config, None))) == pytest.approx([127.5] * 4, abs=1)
    crop = settings(folder, tmp_path, products=folder, model_options={"resize": "crop"})
    assert means(*items_of(prepare(crop, None))) == [0] * 4
    config.out = str(run)
    resumed = prepare(config, Checkpoint(*newest(run / "checkpoints")))
    assert means(*items_of(resumed)) == pytest.approx([127.5] * 4, abs=1)


def test_a_classifier_sees_the_whole_picture(folder, tmp_path):
    options = {"resize": "stretch", "resample": "bilinear"}
    config = settings(folder, tmp_path, "fluid", model_options=options, modalities="image")
    task = prepare(config, None).task
    found = [task.batches.items.images[0], task.val_batches.items.images[0]]
    picture = Image.open(f"{folder}/0.png").resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert all(torch.equal(image, expected) for image in found)


def test_evaluation_and_embedding_see_the_whole_picture(folder, run):
    """`mmfused eval` and `mmfused embed` take these batches."""
    _, batches = load_trained(str(run)).batches(folder)
    assert means(batches.items) == pytest.approx([127.5], abs=1)
    # Its batches of pictures that are not resized yet are the same.
    picture = torch.from_numpy(np.array(Image.open(f"{folder}/0.png"))).permute(2, 0, 1)
    item = {"image": picture, "image_present": True, "text": "", "label": 0}
    pixels, expected = batches.collate([item])["pixel_values"], next(iter(batches))["pixel_values"]
    assert (pixels[0] - expected[0]).abs().mean() < 0.05


def test_embed_does_not_go_on_with_pictures_resized_in_another_way(run):
    trained = load_trained(str(run))
    assert trained.identity["resize"] == "stretch" and trained.identity["resample"] == "bicubic"
    # The settings of earlier versions have no such fields, and their jobs go on.
    for name in ("resize", "resample"):
        trained.settings["model"].pop(name)
    assert list(trained.identity) == ["checkpoint"]


@pytest.mark.parametrize("saved", [None, True, False, "strong"])
def test_a_run_of_an_earlier_version_resumes_with_its_augmentation(
    tmp_path, monkeypatch, folder, saved
):
    monkeypatch.setattr("mmfused.data.GeneratedProducts", smaller_data())
    data = folder if saved is None else "generated"
    config = settings(data, tmp_path / "run", val=folder if saved is None else None, augment=saved)
    strength = "strong" if saved in (None, True, "strong") else "none"
    assert config.strength == strength and prepare(config, None).task.batches.collate.augment == (
        strength
    )
    old = {**config.to_dict(), "augment": saved}
    same = [strength, strength == "strong", *([None] if saved in (None, False) else [])]
    for value in (None, True, False, "none", "light", "strong"):
        again = TrainConfig.from_dict({**config.to_dict(), "augment": value})
        if value in same:
            again.check_same(old, "run")
            continue
        with pytest.raises(ValueError, match=f"resume: augment: got '.*', expected '{strength}'"):
            again.check_same(old, "run")


def test_augmentation_of_an_unknown_strength_is_refused(tmp_path):
    for value in ("hard", 1, []):
        with pytest.raises(ValueError, match="^augment: got .*, expected one of none, light, stro"):
            TrainConfig(str(tmp_path), augment=value)


def test_pictures_that_no_model_sees_are_not_augmented(folder, tmp_path):
    config = settings(folder, tmp_path, "fluid", modalities="text", augment="light")
    assert prepare(config, None).task.batches.collate.augment == "none"
    config = settings(folder, tmp_path, "fluid", augment="light")
    assert prepare(config, None).task.batches.collate.augment == "light"
    assert prepare(config, None).task.val_batches.collate.augment == "none"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Return a folder of an image encoder that declares means and deviations of 0.5."""
    path = tmp_path_factory.mktemp("encoder")
    arguments = {"img_size": 32, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    timm.models.save_for_hf(
        model,
        path,
        model_config={"mean": HALVES[0], "std": HALVES[1]},
        model_args=arguments,
        safe_serialization=True,
    )
    return str(path)


@pytest.mark.parametrize(
    ("model", "preset", "expected"),
    [
        ("fluid", "code", IMAGENET),
        ("uniecs", "code", CLIP),
        ("fluid", "paper", HALVES),
        ("uniecs", "paper", HALVES),
        ("fluid", "tiny", HALVES),
    ],
)
def test_the_public_codes_normalisation_wins_over_an_encoders(
    tmp_path, encoder, model, preset, expected
):
    def config(**changes):
        return TrainConfig(
            str(tmp_path), model=model, preset=preset, image_encoder=encoder, **changes
        )

    def normalisation(settings):
        described = model_config(settings, load_start(settings))
        return tuple(map(tuple, (described.pixel_mean, described.pixel_std)))

    assert normalisation(config()) == expected
    options = {"pixel_mean": [0.1, 0.2, 0.3]}
    assert normalisation(config(model_options=options)) == ((0.1, 0.2, 0.3), expected[1])


def test_an_encoder_beside_init_brings_its_normalisation(tmp_path):
    """With ``init``, the preset is the name of a recipe alone."""
    config = TrainConfig(str(tmp_path), model="fluid", preset="code", init="run")
    values = FLUIDConfig.preset("code").to_dict()
    pixels = {"pixel_mean": HALVES[0], "pixel_std": HALVES[1]}
    start = Start(values, pixels, {}, {}, None, None, Path("run"), None)
    described = model_config(config, start)
    assert (described.pixel_mean, described.pixel_std) == HALVES


def test_presets_resize_as_the_public_code():
    assert {
        name: {
            preset: (config.resize, config.resample)
            for preset in kind.config.PRESETS
            for config in [kind.config.preset(preset, **kind.config.UNKNOWN)]
            if (config.resize, config.resample) != ("crop", "bicubic")
        }
        for name, kind in MODELS.items()
    } == {
        **dict.fromkeys(MODELS, {}),
        "fluid": {"code": ("stretch", "bilinear")},
        "uniecs": {"code": ("stretch", "bicubic")},
        "unica": dict.fromkeys(("paper", "code"), ("shortest", "bicubic")),
    }


def test_a_saved_config_without_the_fields_crops():
    for kind, options in ((FLUIDConfig, {"num_classes": 2}), (UniECSConfig, {})):
        values = kind.preset("code", **options).to_dict()
        for name in ("resize", "resample"):
            values.pop(name)
        old = kind.from_dict(values)
        assert (old.resize, old.resample) == ("crop", "bicubic")


def test_recipes_of_the_public_code():
    assert recipe("fluid", "code")["augment"] == recipe("uniecs", "code")["augment"] == "none"
    assert recipe("unica", "code") == {**recipe("unica", "paper"), "augment": "light"}
    uniecs = TrainConfig("run", model="uniecs", preset="code", **recipe("uniecs", "code"))
    assert (uniecs.lr, uniecs.lr_image, uniecs.lr_text) == (1e-6, 1e-5, None)
    assert (uniecs.betas, uniecs.schedule, uniecs.epochs) == ((0.9, 0.98), "cosine", 50)
    for preset in ("paper", "code"):
        length = UniECSConfig.preset(preset).text_length
        assert recipe("uniecs", preset)["max_length"] == length == 64


def options_of(*given):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--model", "uniecs", "--preset", "code", "--data", "x", "--out", "y", *given]
    return config_options(parser.parse_args(arguments))


def test_options_of_the_command_come_before_the_recipe():
    assert options_of()["augment"] == "none" and options_of()["lr_image"] == 1e-5
    assert options_of("--augment", "light")["augment"] == "light"
    assert options_of("--lr-image", "0.1")["lr_image"] == 0.1
    # An image encoder that is not trained has no learning rate.
    for frozen in ('freeze=["image"]', "freeze=image", "freeze=null"):
        found = options_of("--option", frozen)
        assert ("lr_image" in found) == (frozen != 'freeze=["image"]')
    assert "lr_image" in options_of("--lora", "rank=2")
    assert "lr_image" not in options_of("--lora", "rank=2,targets=query")


def test_a_recipe_of_a_resumed_run_leaves_out_what_its_version_lacked(monkeypatch):
    saved = {"training": {"lr": 3e-6, "augment": None, "epochs": 1.0}}
    monkeypatch.setattr("mmfused.training.resume.resumed_settings", lambda out: saved)
    found = options_of("--resume", "--epochs", "2")
    assert (found["lr"], found["augment"], found["epochs"]) == (3e-6, None, 2.0)
    assert "lr_image" not in found and "batch_size" not in found


def test_a_run_goes_on_with_the_recipe_of_the_version_that_started_it(
    folder, tmp_path, monkeypatch, capsys
):
    """Earlier versions augmented, and had one learning rate."""
    old = {**recipe("uniecs", "code"), "augment": None, "lr_image": None, "steps": 3}
    old |= {"batch_size": 2, "epochs": 1.5, "preset": "code", "model_options": {"cross_layers": 1}}
    given = settings(folder, tmp_path / "run", **old, device="cpu", threads=1)
    train(settings(folder, tmp_path / "whole", **old, device="cpu", threads=1))
    with monkeypatch.context() as patch:
        fail_in_step(patch, 3)
        with pytest.raises(OSError, match="power failure"):
            train(given)
    arguments = [
        "train",
        "--model",
        "uniecs",
        "--preset",
        "code",
        "--data",
        folder,
        "--val",
        folder,
    ]
    for name in ("steps", "image_size", "save_every", "device", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    for name, value in given.model_options.items():
        arguments += ["--option", f"{name}={json.dumps(value)}"]
    assert main([*arguments, "--out", given.out, "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
