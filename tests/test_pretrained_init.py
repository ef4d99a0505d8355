"""``--init`` and ``--checkpoint`` take a pretrained folder as they take a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import training_runs
from starting_parts import (
    HOSTED,
    SPARE,
    TEXTS,
    assert_equal,
    initial_weights,
    save_parts,
    settings,
)
from test_published_layouts import visualized_bge, write_state

from mmfused.cli import main
from mmfused.data import GeneratedProducts, train_tokenizer
from mmfused.models import MODELS
from mmfused.training.initial import is_pretrained, load_start
from mmfused.training.load import load_pretrained
from mmfused.training.run import prepare, train

transformers = pytest.importorskip("transformers")

few_products = training_runs.few_products
ENCODER_MODELS = [name for name in MODELS if name not in HOSTED]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return the folder of a small Chinese-CLIP of transformers, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "clip"
    tokenizer = train_tokenizer(TEXTS, vocab_size=200)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    text = {**sizes, "vocab_size": len(tokenizer) + SPARE, "max_position_embeddings": 64}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=vision)
    for part in (transformers.ChineseCLIPModel(config), tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model", ENCODER_MODELS)
def test_the_parts_of_a_folder_are_those_that_are_named_alone(tmp_path, clip, model):
    named = settings(model, tmp_path / "a", image_encoder=clip, text_encoder=clip)
    expected = initial_weights(named)
    assert_equal(initial_weights(settings(model, tmp_path / "b", init=clip)), expected)


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def vista(request, tmp_path_factory):
    """Return the folder of a small Visualized BGE, with a tokenizer, and its parts."""
    state, *parts = visualized_bge(request.param)
    folder = write_state(tmp_path_factory.mktemp("vista") / "vista", state)
    train_tokenizer(["a"], vocab_size=60).save_pretrained(folder)
    return folder, *parts


def test_all_weights_of_vista_come_from_the_folder(vista):
    """The preset "code" is VISTA, whose tokens of an image are those before the last norm."""
    folder, vit, text, linear = vista
    model = load_pretrained("unica", folder, device="cpu").model
    parts = {"image_encoder": vit, "text_encoder": text, "visual_proj": linear}
    expected = {
        f"{name}.{key}": value.float()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
        if not (name == "image_encoder" and key.startswith(("norm.", "head.")))
        and "pool" not in key
    }
    assert_equal(model.state_dict(), expected)
    assert model.config.image["final_norm"] is False and not model.bica


def test_training_adds_cross_attention_to_vista(tmp_path, vista):
    """With pre-norm, Bi-CA is the identity at first."""
    folder = vista[0]
    options = {"bica_norm": "pre"}
    start = load_pretrained("unica", folder, preset="paper", options=options, device="cpu")
    expected = load_pretrained("unica", folder, device="cpu").model
    assert len(start.model.bica) == 1 and start.model.config.bica_heads == 2
    size = start.model.picture_size
    ids = torch.tensor([[2, 7, 8, 3]])
    items = {"pixel_values": torch.randn(1, 3, size, size), "input_ids": ids}
    with torch.no_grad():
        found = start.model.embed(("image", "both"), **items)
        for view, embedding in expected.embed(("image", "both"), **items).items():
            assert torch.equal(found[view], embedding), view


def test_a_part_beside_vista_leaves_out_the_layer_between(tmp_path, vista):
    """The layer is made for both encoders of the folder."""
    folder, bert = vista[0], save_parts("unica", tmp_path / "parts", width=128)["text_encoder"]
    start = load_start(settings("unica", tmp_path / "a", init=folder, text_encoder=bert))
    assert list(start.sources) == ["image_encoder", "text_encoder"]
    start = load_start(settings("uniecs", tmp_path / "a", init=folder))
    assert list(start.modules) == ["image_encoder", "text_encoder"]


@pytest.mark.parametrize("model", HOSTED)
def test_a_host_is_taken_by_init(tmp_path, model):
    host = save_parts(model, tmp_path / "host")["host"]
    expected = initial_weights(settings(model, tmp_path / "a", host=host))
    assert_equal(initial_weights(settings(model, tmp_path / "b", init=host)), expected)


def test_a_part_that_is_named_replaces_that_of_the_folder(tmp_path, clip):
    parts = save_parts("uniecs", tmp_path / "parts")
    found = initial_weights(settings("uniecs", tmp_path / "a", init=clip, **parts))
    expected = initial_weights(settings("uniecs", tmp_path / "b", **parts))
    assert_equal(found, expected)
    del parts["text_encoder"]
    found = initial_weights(settings("uniecs", tmp_path / "c", init=clip, **parts))
    text = initial_weights(settings("uniecs", tmp_path / "d", text_encoder=clip))
    for name, tensor in found.items():
        if name.startswith(("image_encoder.", "text_encoder.")):
            source = expected if name.startswith("image_encoder.") else text
            assert torch.equal(tensor, source[name]), name


def test_a_folder_with_a_text_encoder_alone_has_its_tokenizer(tmp_path):
    bert = save_parts("uniecs", tmp_path / "parts")["text_encoder"]
    expected = initial_weights(settings("uniecs", tmp_path / "a", text_encoder=bert))
    assert_equal(initial_weights(settings("uniecs", tmp_path / "b", init=bert)), expected)


def test_a_folder_with_an_image_encoder_alone_leaves_the_tokenizer_to_the_data(tmp_path):
    vit = save_parts("uniecs", tmp_path / "parts")["image_encoder"]
    expected = initial_weights(settings("uniecs", tmp_path / "a", image_encoder=vit))
    assert_equal(initial_weights(settings("uniecs", tmp_path / "b", init=vit)), expected)
    with pytest.raises(ValueError, match="tokenizer: got None with .* holds no text enc"):
        load_pretrained("uniecs", vit, preset="tiny", device="cpu")


def test_modalities_leave_out_a_part(tmp_path, clip):
    model = settings("fluid", tmp_path / "a", init=clip, modalities="text")
    assert not any(name.startswith("image_") for name in initial_weights(model))


def test_a_run_from_a_folder_is_resumed_without_it(tmp_path, clip):
    source = shutil.copytree(clip, tmp_path / "clip")
    run = settings("fluid", tmp_path / "run", init=str(source), steps=2)
    train(run)
    shutil.rmtree(source)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002", ignore_errors=True)
    again = settings("fluid", tmp_path / "run", init=str(source), steps=2, resume=True)
    assert train(again)["steps"] == 2
    assert train(again)["steps"] == 2  # the finished run is read, and not trained


@pytest.mark.parametrize("model", ENCODER_MODELS)
def test_a_folder_is_the_model_with_which_training_starts(tmp_path, clip, model):
    expected = initial_weights(settings(model, tmp_path / "run", init=clip))
    classes = GeneratedProducts("train", size=60).num_classes
    options = {"num_classes": classes} if model == "fluid" else {}
    loaded = load_pretrained(model, clip, preset="tiny", options=options, device="cpu")
    assert_equal(loaded.model.state_dict(), expected)


def test_eval_and_embed_take_the_folder(tmp_path, clip, capsys):
    given = ["--checkpoint", clip, "--data", "generated", "--device", "cpu", "--preset", "tiny"]
    scores = tmp_path / "scores.json"
    assert main(["eval", *given, "--model", "uniecs", "--out", str(scores)]) == 0
    assert json.loads(scores.read_text())["checkpoint"] == clip
    assert main(["embed", *given, "--model", "unica", "--out", str(tmp_path / "a.npz")]) == 0
    capsys.readouterr()
    assert main(["eval", *given, "--model", "unite"]) == 2
    assert "got 'chinese_clip', expected one of qwen2_vl" in capsys.readouterr().err
    run = ["--data", "generated", "--out", str(tmp_path / "run")]
    train = ["train", "--model", "unite", "--init", clip, *run]
    assert main(train) == 2
    message = "which holds image_encoder and text_encoder, expected host for model 'unite'"
    assert message in capsys.readouterr().err
    assert main(["eval", *given]) == 2
    message = f"model: got None with '{clip}', expected fluid, uniecs, unica, moon2, unite"
    assert message in capsys.readouterr().err


def test_runs_are_not_pretrained_folders(tmp_path, clip, capsys):
    train(settings("fluid", tmp_path / "run", init=clip, steps=1))
    given = ["eval", "--data", "generated", "--checkpoint", tmp_path / "run", "--model", "fluid"]
    message = f"model: got 'fluid' with the run '{tmp_path / 'run'}', expected it only with host"
    assert message in error_of(capsys, *given)
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    assert is_pretrained(tmp_path / "run") is is_pretrained(checkpoint) is False
    (tmp_path / "run" / "config.json").unlink()  # a damaged run
    assert not is_pretrained(tmp_path / "run")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "run" / "model.safetensors"):
        assert not is_pretrained(path)


def test_parts_that_a_folder_lacks_are_told(tmp_path, clip, vista, caplog):
    def told(call, *arguments, **options):
        caplog.clear()
        call(*arguments, **options)
        return [record.message for record in caplog.records if "random" in record.message]

    vit = save_parts("uniecs", tmp_path / "parts")["image_encoder"]
    expected = [f"{vit} has no text_encoder, which is random at first"]
    assert told(prepare, settings("uniecs", tmp_path / "a", init=vit), None) == expected
    assert not told(prepare, settings("uniecs", tmp_path / "a", init=clip), None)
    assert not told(prepare, settings("uniecs", tmp_path / "a", text_encoder=clip), None)
    assert not told(load_pretrained, "unica", vista[0], device="cpu")
    (message,) = told(load_pretrained, "unica", clip, preset="tiny", device="cpu")
    assert message == f"{clip} has no visual_proj, bica, which is random at first"


def test_random_parts_are_part_of_what_embeddings_depend_on(clip):
    first, second = (
        load_pretrained("uniecs", clip, preset="tiny", device="cpu", seed=seed) for seed in (0, 1)
    )
    assert not torch.equal(first.model.image_map.weight, second.model.image_map.weight)
    assert first.identity != second.identity


def error_of(capsys, *arguments):
    """Return the message of a refused command, which is one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmfused: error: ") and error.count("\n") == 1
    return error


def test_a_text_encoder_without_words_is_refused(tmp_path, capsys):
    """From a config.json alone, transformers makes a tokenizer of five special tokens."""
    bert = save_parts("uniecs", tmp_path / "parts")["text_encoder"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(bert, name).unlink()
    given = ["--model", "uniecs", "--data", "generated", "--device", "cpu"]
    train = ["train", *given, "--out", tmp_path / "run"]
    hint = "it has a tokenizer without words; the setting tokenizer names another"
    assert hint in error_of(capsys, *train, "--text-encoder", bert)
    assert hint in error_of(capsys, *train, "--init", bert)
    assert hint in error_of(capsys, "eval", *given, "--checkpoint", bert)
    message = error_of(capsys, *train, "--init", bert, "--tokenizer", bert)
    assert f"tokenizer: got '{bert}', expected a tokenizer" in message
    assert message.endswith("it has a tokenizer without words\n")


@pytest.mark.parametrize("model", ENCODER_MODELS)
def test_texts_that_the_model_cannot_read_are_refused_before_the_data(tmp_path, clip, model):
    """The encoder has 64 positions; 16 of them are UniCA's image tokens."""
    most = 48 if model == "unica" else 64
    start = settings(model, tmp_path / "run", init=clip, max_length=most)
    assert prepare(start, None).model.longest_text == most
    for length in (most + 1, 4000):
        with pytest.raises(ValueError, match=f"^max_length: got {length}, expected at most {most}"):
            train(settings(model, tmp_path / "run", init=clip, max_length=length))
    assert not (tmp_path / "run").exists()


def test_a_padded_length_is_the_longest_text(tmp_path, clip):
    """Cut texts would lose their [SEP]."""
    padded = {"text_mask": False, "text_length": 20}
    for model in ("fluid", "uniecs"):
        if model == "uniecs":
            padded["text_padding"] = "encoded"
        changes = {"init": clip, "model_options": padded}
        run = settings(model, tmp_path / "a", max_length=21, **changes)
        with pytest.raises(ValueError, match="^max_length: got 21, expected at most 20,"):
            prepare(run, None)
        run = settings(model, tmp_path / "a", max_length=20, **changes)
        assert prepare(run, None).model.longest_text == 20


def test_pictures_that_leave_no_place_for_a_text_are_refused(tmp_path, clip):
    run = settings("unica", tmp_path / "run", init=clip, image_size=64)
    with pytest.raises(ValueError, match="^image: got 64 image tokens, expected at most 62"):
        prepare(run, None)


def test_pictures_that_the_patches_do_not_fill_are_refused(tmp_path, clip):
    run = settings("uniecs", tmp_path / "run", init=clip, image_size=36)
    with pytest.raises(ValueError, match="^image_size: got 36, expected a multiple of pat"):
        prepare(run, None)


def test_a_path_that_is_no_folder_is_told(tmp_path, clip, capsys):
    given = ["--model", "uniecs", "--data", "generated"]
    embed = ["eval", *given, "--checkpoint"]
    torch.save({}, tmp_path / "a.pt")
    assert "nowhere holds no finished run" in error_of(capsys, *embed, tmp_path / "nowhere")
    message = "a.pt is a pickle, which can run any code when it is loaded; only safetensors are"
    assert message in error_of(capsys, *embed, tmp_path / "a.pt")
    weights = Path(clip, "model.safetensors")
    assert "is a file, expected the folder of a run" in error_of(capsys, *embed, weights)
    train = ["train", *given, "--out", tmp_path / "run"]
    for name in ("image", "text"):
        message = error_of(capsys, *train, f"--{name}-encoder", tmp_path / "a.pt")
        assert f"{name} encoder: got the file '{tmp_path / 'a.pt'}', expected a folder" in message
        assert message.endswith("mmfused convert writes safetensors\n")


def test_weights_in_their_authors_names_may_lie_beside_another_config(tmp_path, vista):
    folder = shutil.copytree(vista[0], tmp_path / "vista")
    (folder / "config.json").write_text('{"note": 1}')
    assert is_pretrained(folder) and load_pretrained("unica", str(folder), device="cpu")


def test_a_damaged_folder_is_told_as_such(tmp_path, vista, capsys):
    folder = Path(shutil.copytree(vista[0], tmp_path / "vista"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9])
    given = ["--model", "unica", "--data", "generated"]
    train = ["train", *given, "--out", tmp_path / "run", "--init", folder]
    reason = f"{folder / 'model.safetensors'} is truncated, corrupt or not a safetensors file"
    assert f"init: {reason}" in error_of(capsys, *train)
    assert f"checkpoint: {reason}" in error_of(capsys, "eval", *given, "--checkpoint", folder)
    safetensors.torch.save_file({"odd.weight": torch.ones(1)}, folder / "model.safetensors")
    expected = "with odd.weight, expected a folder with safetensors of a known layout"
    assert expected in error_of(capsys, *train)
