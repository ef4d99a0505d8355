"""The code around Qwen2-VL agrees with the processors and models of transformers."""

import json

import pytest
import safetensors.torch
import torch
import transformers

from mmfused.data.text import train_tokenizer
from mmfused.models import qwen

x64 = torch.float64
TOKENS = {"vision_start": 90, "vision_end": 91, "image": 92, "end": 93, "pad": 0, "drop": [2, 3]}
# The prompts have unequal lengths.
TOKENS["prompts"] = {kind: list(range(80, 83 + i)) for i, kind in enumerate(qwen.KINDS)}
CHAT = {
    "start": [70, 71, 72],
    "prompts": {kind: list(range(73, 75 + i)) for i, kind in enumerate(qwen.KINDS)},
}
TOKENS["chat"] = CHAT
VIDEO_PAD = 94
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "window_size": 16,
    },
}
VISION["qwen2_5_vl"]["fullatt_block_indexes"] = [1]
IDS = {
    "image_token_id": 92,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": 90,
    "vision_end_token_id": 91,
}


def options(kind="qwen2_vl") -> dict:
    return {"model_type": kind, "text_config": TEXT, "vision_config": VISION[kind], **IDS}


def host(kind="qwen2_vl", **given) -> torch.nn.Module:
    torch.manual_seed(0)
    return qwen.build_qwen2_vl(options(kind), **given).double().eval()


def items(*shape) -> dict:
    """Return five items; item 2 has no picture, item 3 no text, and item 4 neither.

    Absent pictures are NaN. Texts start with [CLS] = 2 and end with [SEP] = 3.
    """
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(5, *(shape or (3, 16, 24)), generator=generator, dtype=x64)
    present = torch.tensor([True, True, False, True, False])
    pixels[~present] = float("nan")
    lengths = torch.tensor([9, 5, 7, 2, 2])
    ids = torch.randint(4, 80, (5, 9), generator=generator)
    ids[:, 0] = 2
    ids[torch.arange(5), lengths - 1] = 3
    mask = (torch.arange(9) < lengths[:, None]).long()
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "image_present": present,
    }


def run_host(model, batch, view="both", **given):
    video = batch["pixel_values"].ndim == 5
    pictures, grid = qwen.picture_tokens(model, batch["pixel_values"], batch["image_present"])
    words = (batch["input_ids"], batch["attention_mask"], batch["image_present"])
    sequence = qwen.assemble(TOKENS, grid, *words, view, video=video, **given)
    return sequence, qwen.hidden_states(model, sequence, pictures)


def expected_sequence(batch, i, view, count, prompt="plain") -> list[int]:
    """Return the sequence of item i without padding, token by token."""
    image = bool(batch["image_present"][i]) and view != "text"
    words = (
        [] if view == "image" else batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
    )
    words = [word for word in words if word not in (2, 3)]
    kind = {(0, 0): "text", (0, 1): "text", (1, 0): "image", (1, 1): "image and text"}[
        image, bool(words)
    ]
    kind = kind.replace("image", "video") if batch["pixel_values"].ndim == 5 else kind
    sequence = ([90] + [92] * count + [91] if image else []) + words
    if prompt == "chat":
        return CHAT["start"] + sequence + CHAT["prompts"][kind] + [93]
    return sequence + TOKENS["prompts"][kind] + [93] if prompt else sequence or [93]


# --- patches ---


@pytest.mark.parametrize(("patch", "merge"), [(8, 2), (4, 2), (4, 1), (8, 3)])
def test_patches_equal_the_image_processors(patch, merge):
    pixels = torch.randn(2, 3, 48, 96)
    sizes = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": 2}
    processor = transformers.Qwen2VLImageProcessor(
        **sizes, do_resize=False, do_rescale=False, do_normalize=False
    )
    expected = processor(images=list(pixels), do_convert_rgb=False, return_tensors="pt")
    rows, grid = qwen.patches(pixels, patch, 2, merge)
    assert torch.equal(rows, expected["pixel_values"]) and torch.equal(
        grid, expected["image_grid_thw"]
    )


def test_patches_of_videos_equal_the_video_processors():
    frames = torch.randint(0, 256, (2, 4, 3, 32, 48), dtype=torch.uint8)
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    raw = {
        "do_resize": False,
        "do_rescale": False,
        "do_normalize": False,
        "do_sample_frames": False,
    }
    expected = transformers.Qwen2VLVideoProcessor(**sizes, **raw)(
        videos=list(frames), return_tensors="pt"
    )
    rows, grid = qwen.patches(frames, 8, 2, 2)
    assert torch.equal(rows.float(), expected["pixel_values_videos"].float())
    assert torch.equal(grid, expected["video_grid_thw"])


# --- sequences ---


@pytest.mark.parametrize("view", ["image", "text", "both"])
@pytest.mark.parametrize("prompt", ["plain", "chat", None])
def test_assemble_gives_the_expected_sequences(view, prompt):
    batch, grid = items(), (1, 2, 3)
    words = (batch["input_ids"], batch["attention_mask"], batch["image_present"])
    sequence = qwen.assemble(TOKENS, grid, *words, view, prompt=prompt)
    for i in range(5):
        expected = expected_sequence(batch, i, view, 6, prompt)
        padding = sequence.input_ids.shape[1] - len(expected)
        assert sequence.input_ids[i].tolist() == [0] * padding + expected
        assert sequence.attention_mask[i].tolist() == [0] * padding + [1] * len(expected)
        slots = [k for k in sequence.picture_slot[i].tolist() if k >= 0]
        assert slots == (list(range(6)) if 92 in expected else [])
        assert all(
            (k >= 0) == (token == 92)
            for k, token in zip(sequence.picture_slot[i], sequence.input_ids[i], strict=True)
        )
    assert sequence.has_image.tolist() == [
        view != "text" and bool(present) for present in batch["image_present"]
    ]
    assert sequence.has_text.tolist() == [view != "image" and i < 3 for i in range(5)]


def test_each_item_may_have_its_own_view():
    batch = items()
    words = (batch["input_ids"], batch["attention_mask"], batch["image_present"])
    mixed = qwen.assemble(TOKENS, (1, 2, 3), *words, torch.tensor([0, 1, 2, 1, 2]))
    for i, view in enumerate(("image", "text", "both", "text", "both")):
        alone = qwen.assemble(TOKENS, (1, 2, 3), *words, view)
        assert all(
            torch.equal(a[..., i, :], b[..., i, :])
            for a, b in zip(mixed[:4], alone[:4], strict=True)
        )


def test_without_masks_all_tokens_and_pictures_are_used():
    batch = items()
    sequence = qwen.assemble({**TOKENS, "drop": []}, (1, 2, 3), batch["input_ids"], None, None)
    assert (
        sequence.attention_mask.sum(1).tolist()
        == [8 + 9 + len(TOKENS["prompts"]["image and text"]) + 1] * 5
    )


@pytest.mark.parametrize(
    ("kind", "shape", "view"),
    [
        ("qwen2_vl", (3, 16, 24), "both"),
        ("qwen2_vl", (3, 24, 8), "image"),
        ("qwen2_vl", (3, 16, 16), "text"),
        ("qwen2_vl", (4, 3, 16, 24), "both"),
        ("qwen2_5_vl", (3, 16, 24), "both"),
    ],
)
def test_hidden_states_agree_with_the_hosts_own_forward(kind, shape, view):
    """The host's forward gets one item at a time, computes positions and inserts pictures."""
    model, batch = host(kind), items(*shape)
    sequence, states = run_host(model, batch, view)
    for i in range(5):
        ids = torch.tensor(
            [
                expected_sequence(
                    batch, i, view, shape[-1] * shape[-2] // 64 * (len(shape) == 4 and 2 or 1)
                )
            ]
        )
        given = {}
        if 92 in ids:
            rows, grid = qwen.patches(batch["pixel_values"][i : i + 1], 4, 2, 2)
            names = (
                ("pixel_values", "image_grid_thw")
                if len(shape) == 3
                else ("pixel_values_videos", "video_grid_thw")
            )
            ids[ids == 92] = 92 if len(shape) == 3 else VIDEO_PAD
            types = (ids == 92).int() + 2 * (ids == VIDEO_PAD).int()
            given = dict(zip(names, (rows, grid), strict=True)) | {"mm_token_type_ids": types}
        model.rope_deltas = None
        expected = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **given
        ).last_hidden_state[0]
        assert (states[i, -len(expected) :] - expected).abs().max() < 1e-12
    assert states.isfinite().all()


def test_a_batch_without_pictures_trains():
    model, batch = host().train(), items()
    batch["image_present"][:], batch["pixel_values"][:] = False, float("nan")
    run_host(model, batch)[1][:, -1].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name.startswith("language_model") or not parameter.grad.any(), name


def test_only_present_pictures_have_gradients():
    model, batch = host(), items()
    batch["pixel_values"] = batch["pixel_values"].nan_to_num(5.0).requires_grad_()
    run_host(model, batch)[1][:, -1].square().sum().backward()
    assert batch["pixel_values"].grad.flatten(1).any(1).tolist() == batch["image_present"].tolist()


def test_sequences_and_the_language_model_compile_without_a_graph_break():
    """The vision tower is left out, because its loop over pictures breaks the graph."""
    model, batch = host(), items()
    pictures, grid = qwen.picture_tokens(model, batch["pixel_values"], batch["image_present"])
    batch.pop("pixel_values")

    def step(pictures, view, **words):
        return qwen.hidden_states(
            model, qwen.assemble(TOKENS, grid, *words.values(), view), pictures
        )

    arguments = (pictures, torch.tensor([0, 1, 2, 1, 2]))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(
            compiled(*arguments, **batch), step(*arguments, **batch), rtol=0, atol=1e-12
        )


# --- tokens ---


def test_token_ids_of_a_trained_tokenizer(tmp_path):
    tokenizer = train_tokenizer(
        ["red wool coat above the knee", "one word: summary in text and image or video"], 200
    )
    with pytest.raises(
        ValueError, match=r"tokenizer: got a vocabulary without <\|vision_start\|>, expected the "
    ):
        qwen.token_ids(tokenizer)
    before = len(tokenizer)
    assert qwen.add_vision_tokens(tokenizer) is tokenizer and len(tokenizer) == before + 4
    assert len(qwen.add_vision_tokens(tokenizer)) == before + 4
    ids = qwen.token_ids(tokenizer)
    assert sorted(ids[name] for name in ("vision_start", "vision_end", "image", "end")) == list(
        range(before, before + 4)
    )
    assert (
        ids["drop"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
        and ids["pad"] == tokenizer.pad_token_id
    )
    assert (
        tokenizer.decode(ids["prompts"]["image and text"]).replace(" :", ":")
        == "summary above image and text in one word:"
    )
    assert len({tuple(prompt) for prompt in ids["prompts"].values()}) == len(qwen.KINDS)
    assert json.loads(json.dumps(ids)) == ids
    assert tokenizer("a coat <|image_pad|>")["input_ids"].count(ids["image"]) == 1
    tokenizer.save_pretrained(tmp_path)
    assert qwen.token_ids(transformers.AutoTokenizer.from_pretrained(tmp_path)) == ids


# --- the host ---


@pytest.mark.parametrize(("kind", "name"), [("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL")])
@pytest.mark.parametrize("part", ["Model", "ForConditionalGeneration"])
def test_saved_hosts_load_with_the_same_weights(tmp_path, kind, name, part):
    saved = getattr(transformers, name + part)(qwen.build_qwen2_vl(options(kind)).config)
    saved.save_pretrained(tmp_path)
    fields, loaded = qwen.pretrained_qwen2_vl(str(tmp_path))
    inner = saved if part == "Model" else saved.model
    for key, value in inner.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    processor = transformers.Qwen2VLImageProcessor()
    assert fields["pixel_mean"] == tuple(processor.image_mean) and fields["pixel_std"] == tuple(
        processor.image_std
    )
    rebuilt = qwen.build_qwen2_vl(json.loads(json.dumps(fields["host"])))
    rebuilt.load_state_dict(loaded.state_dict())
    batch = items()
    assert torch.equal(
        run_host(rebuilt.double().eval(), batch)[1], run_host(loaded.double().eval(), batch)[1]
    )


def test_a_host_with_weights_missing_is_refused(tmp_path):
    host().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"host: .* lacks 3 weights of qwen2_vl: .*layers.1.mlp.down_proj.weight, .*up_proj",
    ):
        qwen.pretrained_qwen2_vl(str(tmp_path))


def test_a_folder_with_pickled_weights_is_refused(tmp_path):
    host().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError,
        match=r"host: .* lacks a file, expected config.json and \*.safetensors",
    ):
        qwen.pretrained_qwen2_vl(str(tmp_path))


def test_frozen_parts_stay_in_evaluation_mode():
    model = host(frozen=("language",)).train()
    assert model.visual.training and not model.language_model.training
    assert {parameter.requires_grad for parameter in model.language_model.parameters()} == {False}


def test_other_model_types_are_refused(tmp_path):
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ValueError, match="model_type: got 'bert', expected one of qwen2_vl, qwen2_5_vl"
    ):
        qwen.pretrained_qwen2_vl(str(tmp_path))
    with pytest.raises(
        ValueError, match="host.model_type: got 'llava', expected one of qwen2_vl, qwen2_5_vl"
    ):
        qwen.build_qwen2_vl({**options(), "model_type": "llava"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pixel_values": torch.zeros(5, 3, 16, 20)},
            "2 frames of 16 x 20, expected sides in multiples of 8 and frames in multiples of 2",
        ),
        (
            {"pixel_values": torch.zeros(5, 3, 3, 16, 16)},
            "got 3 frames of 16 x 16, expected .* frames in multiples of 2",
        ),
        (
            {"pixel_values": torch.zeros(5, 1, 16, 16)},
            r"pixel_values: got shape \(5, 1, 16, 16\), expected \(batch, 3, H, W\) or",
        ),
        (
            {"image_present": torch.ones(5)},
            r"image_present: got torch.float32 .*, expected bool \(5,\)",
        ),
        (
            {"input_ids": torch.zeros(5, dtype=torch.long)},
            r"input_ids and attention_mask: got shapes",
        ),
        ({"attention_mask": torch.ones(5, 8)}, r"got shapes \(5, 9\) and \(5, 8\), expected"),
        (
            {"input_ids": torch.full((5, 9), 100)},
            r"input_ids: got a value out of range, expected values in \[0, 99\]",
        ),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_host(host(), {**items(), **changes})


def test_videos_require_qwen2_vl():
    with pytest.raises(
        ValueError,
        match="got videos with model_type 'qwen2_5_vl', expected model_type 'qwen2_vl'",
    ):
        qwen.picture_tokens(host("qwen2_5_vl"), torch.zeros(1, 2, 3, 16, 16), None)
