"""Loading a pretrained folder runs no code, opens no other files and allocates little memory."""

import json
import pickle

import pytest
import safetensors.torch
import torch

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from retrieval_models import HOST  # noqa: E402
from watching import Outside, Payload  # noqa: E402

from mmfused.models import qwen  # noqa: E402
from mmfused.models.pretrained import pretrained_text, pretrained_vit  # noqa: E402

BERT = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 90}
REMOTE_CODE = {"auto_map": {"AutoModel": "module.Model"}}


@pytest.fixture
def outside(tmp_path):
    return Outside(tmp_path / "outside")


def change(folder, name="config.json", **changes):
    values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**values, **changes}))


@pytest.fixture
def vit(tmp_path):
    arguments = {"img_size": 32, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    timm.models.save_for_hf(model, tmp_path / "vit", model_args=arguments, safe_serialization=True)
    return tmp_path / "vit"


@pytest.fixture
def bert(tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT, hidden_size=16))
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_references_to_code_and_other_files_are_ignored(vit, bert, outside):
    """The configs refer to code, adapters, a quantizer, other weights and other configs."""
    expected = safetensors.torch.load_file(bert / "model.safetensors")[
        "bert.embeddings.word_embeddings.weight"
    ]
    (bert / "module.py").write_text(outside.module.read_text())
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (bert / name).write_bytes(outside.pickle.read_bytes())
        (vit / name).write_bytes(outside.pickle.read_bytes())
    change(
        bert,
        **REMOTE_CODE,
        configuration_files=[f"config.{outside.folder}.json"],
        transformers_weights=str(outside.file),
    )
    change(
        bert,
        quantization_config={"quant_method": "bitsandbytes"},
        torch_dtype="load",
        _name_or_path=str(outside.folder),
    )
    change(
        bert, "adapter_config.json", base_model_name_or_path=str(outside.folder), peft_type="LORA"
    )
    change(bert, "generation_config.json", custom_generate=str(outside.module))
    pretrained = {
        "file": str(outside.pickle),
        "url": "http://localhost:9/x",
        "custom_load": True,
        "hf_hub_id": "some/model",
    }
    change(
        vit, pretrained_cfg={**pretrained, "source": "hf-hub", "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    with outside.untouched():
        fields, encoder = pretrained_text(str(bert))
        image, vision = pretrained_vit(str(vit))
    assert (
        torch.equal(encoder.embeddings.word_embeddings.weight, expected)
        and "auto_map" not in fields["text"]
    )
    assert image["pixel_std"] == (0.5, 0.5, 0.5)
    weights = safetensors.torch.load_file(vit / "model.safetensors")
    assert torch.equal(vision.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])


VIT_FOLDERS = [
    ({"model_args": {"checkpoint_path": "{pickle}"}}, "image: got a field 'checkpoint_path'"),
    ({"model_args": [1]}, "model_args: got"),
    ({"model_args": {"depth": 100}}, "got weights with"),
    (
        {"model_args": {"depth": 1, "img_size": 32, "reg_tokens": 3}},
        "holds the weights of another model|lacks 1 weights",
    ),
    (
        {"architecture": "hf-hub:some/model"},
        "architecture: got 'hf-hub:some/model', expected the name of a timm model",
    ),
    ({"architecture": "local-dir:{folder}"}, "architecture: got 'local-dir:"),
    ({"architecture": 3}, "architecture: got 3"),
    (
        {"architecture": "resnet18", "model_args": {}},
        "vit', a ResNet, expected timm's VisionTransformer",
    ),
    ({"pretrained_cfg": {"mean": 3}}, "mean: got 3, expected 3 finite numbers"),
    ({"pretrained_cfg": "x"}, "pretrained_cfg: got 'x'"),
]


@pytest.mark.parametrize(("changes", "match"), VIT_FOLDERS, ids=[match for _, match in VIT_FOLDERS])
def test_hostile_configs_of_an_image_encoder_are_refused(changes, match, vit, outside):
    text = (
        json.dumps(changes)
        .replace("{pickle}", str(outside.pickle))
        .replace("{folder}", str(outside.folder))
    )
    change(vit, **json.loads(text))
    outside.refuses(lambda: pretrained_vit(str(vit)), match)


TEXT_FOLDERS = [
    ({"model_type": "mine"}, "text.model_type: got 'mine', expected one of albert"),
    ({"model_type": None}, "text.model_type: got None"),
    ({"vocab_size": 10**8}, "got weights with"),
    ({"num_hidden_layers": 2}, "lacks 16 weights of bert"),
    ({"vocab_size": 89}, "holds the weights of another model"),
    ({"hidden_size": "16"}, "config.json: hidden_size: got '16'"),
    ({"hidden_act": "nothing"}, "hidden_act: got 'nothing', expected the name of an activation"),
    ({"num_attention_heads": 3}, "cannot build a 'bert'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected an integer from 1 to 1000"),
]


@pytest.mark.parametrize(
    ("changes", "match"), TEXT_FOLDERS, ids=[match for _, match in TEXT_FOLDERS]
)
def test_hostile_configs_of_a_text_encoder_are_refused(changes, match, bert, outside):
    change(bert, **changes)
    outside.refuses(lambda: pretrained_text(str(bert)), match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[" * 200_000, "is truncated or corrupt"),
        (b'{"a":' * 100_000, "is truncated or corrupt"),
        (b'{"model_type": "be', "is truncated or corrupt"),
        (b"\xff\xfe\x00", "is truncated or corrupt"),
        (b"[]", "holds list, expected an object"),
        (b'{"a": "' + b"x" * (5 << 20) + b'"}', "is larger than 4194304 bytes"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is truncated or corrupt"),
    ],
    ids=["lists", "objects", "cut", "bytes", "list", "large", "digits"],
)
@pytest.mark.parametrize("load", [pretrained_vit, pretrained_text, qwen.pretrained_qwen2_vl])
def test_an_invalid_config_json_is_refused(content, match, load, tmp_path, outside):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_bytes(content)
    outside.refuses(lambda: load(str(tmp_path)), match)


@pytest.mark.parametrize(
    "part", ["../outside/canary.safetensors", "{file}", 3, "weights.pt", "", "a\0.safetensors"]
)
def test_an_index_may_only_name_safetensors_in_its_folder(part, bert, outside):
    (bert / "model.safetensors").rename(bert / "part.safetensors")
    names = safetensors.torch.load_file(bert / "part.safetensors")
    index = dict.fromkeys(names, "part.safetensors")
    change(bert, "model.safetensors.index.json", weight_map=index)
    kept = pretrained_text(str(bert))[1].embeddings.word_embeddings.weight
    assert torch.equal(kept, names["bert.embeddings.word_embeddings.weight"])
    bad = part.replace("{file}", str(outside.file)) if isinstance(part, str) else part
    change(bert, "model.safetensors.index.json", weight_map={**index, next(iter(names)): bad})
    outside.refuses(
        lambda: pretrained_text(str(bert)),
        r"weight_map: got .*, expected names of \*.safetensors files in the same folder",
    )


def test_pickled_weights_are_refused_without_unpickling(vit, bert, outside):
    for folder, load in ((vit, pretrained_vit), (bert, pretrained_text)):
        (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(outside.marker)))
        outside.refuses(
            lambda load=load, folder=folder: load(str(folder)),
            "is truncated, corrupt or not a safetensors file",
        )


def test_hostile_configs_of_a_host_are_refused(tmp_path, outside):
    host = qwen.build_qwen2_vl(HOST | {"text_config": {**HOST["text_config"], "vocab_size": 90}})
    host.save_pretrained(tmp_path)
    change(tmp_path, **REMOTE_CODE)
    with outside.untouched():
        fields, loaded = qwen.pretrained_qwen2_vl(str(tmp_path))
    assert torch.equal(
        loaded.language_model.embed_tokens.weight, host.language_model.embed_tokens.weight
    )
    described = json.loads((tmp_path / "config.json").read_text())
    for changes, match in (
        ({"text_config": 3}, "text_config: got 3"),
        (
            {"text_config": {**described["text_config"], "intermediate_size": 2**20}},
            "got weights with",
        ),
        (
            {"vision_config": {**described["vision_config"], "patch_size": [4, 4]}},
            "patch_size: got",
        ),
    ):
        change(tmp_path, **{**described, **changes})
        outside.refuses(lambda: qwen.pretrained_qwen2_vl(str(tmp_path)), match)


def test_only_config_and_safetensors_are_downloaded_from_the_hub(bert, monkeypatch):
    import huggingface_hub

    requested = []

    def download(source, name):
        requested.append((source, name))
        if not (bert / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(bert / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pretrained_text("some/bert")
    assert requested == [("some/bert", "config.json"), ("some/bert", "model.safetensors")]
    (bert / "model.safetensors").rename(bert / "part.safetensors")
    names = safetensors.torch.load_file(bert / "part.safetensors")
    change(
        bert, "model.safetensors.index.json", weight_map=dict.fromkeys(names, "part.safetensors")
    )
    pretrained_text("some/bert")
    assert requested[-1] == ("some/bert", "part.safetensors")
    monkeypatch.undo()
    with pytest.raises(
        ValueError,
        match="text encoder: got '../nowhere', expected a folder, or the name of a hub model",
    ):
        pretrained_text("../nowhere")
