"""UNITEProcessor and complete sequences, against transformers' tokenizer, processor and model."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from mmfused.models import UNITE, UNITEConfig, UNITEProcessor, qwen
from mmfused.models.qwen_export import save_host
from mmfused.models.unite_inputs import sample_frames
from mmfused.training.gradients import add_cached_gradients, add_gradients
from mmfused.training.setup import make_collate

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# How Qwen2's tokenizer splits a text; a sign of punctuation takes the line breaks after it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = " in one word:<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
PICTURE = "<|vision_start|>{}<|vision_end|>"


def make_tokenizer():
    """Return a byte-level tokenizer with Qwen2's rules, in which punctuation merges with breaks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, ".Ċ", "!Ċ"])}
    merges = [(".", "Ċ"), ("!", "Ċ")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    return fast


TOKENIZER = UNITEConfig.prepare_tokenizer(make_tokenizer())


def make_config(**options) -> UNITEConfig:
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), range(3, 7), strict=True))
    host = {f"{name}_token_id": token for name, token in ids.items()}
    host["text_config"] = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    host["vision_config"] = {"depth": 1, "embed_dim": 16, "patch_size": 4}
    sizes = UNITEConfig.of_tokenizer(TOKENIZER)
    released = {"prompt": "chat", "positions": "1d", "host": host, "image_size": 16}
    return UNITEConfig.preset("tiny", **{**sizes, **released, **options})


def make_model(**options) -> UNITE:
    torch.manual_seed(0)
    model = UNITE(make_config(**options)).double().eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    return model


def processor_of(model, **options) -> UNITEProcessor:
    return UNITEProcessor(TOKENIZER, model.config, **{"picture_tokens": (1, 16), **options})


def picture(height=16, width=16, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def video(frames=4, height=16, width=16, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def read(batch, row=0) -> str:
    """Return the text of a sequence without its padding."""
    real = batch["attention_mask"][row] == 1
    return TOKENIZER.decode(batch["input_ids"][row][real])


ITEMS = [
    {"text": "a mug."},
    {"image": picture(16, 32), "text": "red", "instruction": "Find this in another colour:"},
    {"image": [picture(seed=1), picture(8, 24, 2)], "text": "<|IMAGE|> beside <|IMAGE|>!"},
    {"video": video(6)},
    {"video": video(seed=3), "image": picture(seed=4), "text": "as on <|IMAGE|> <|VIDEO|>"},
]
CODES = [1, 3, 3, 4, 7]


# --- sequences ---


@pytest.mark.parametrize(
    "text", ["red mug", "A mug.", " two\n\nlines! ", "naïve 茶杯 ☕", "user", "1,5 l?", "it's"]
)
def test_ids_are_those_of_the_whole_sequence(text):
    """The text is tokenized alone, so its end must not differ from that inside the sequence."""
    batch = processor_of(make_model())([{"text": text}])
    whole = f"{START}{text.strip()}\nSummary above sentence{END}"
    assert read(batch) == whole
    expected = TOKENIZER(whole, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == expected
    model = make_model()
    enclosed = TOKENIZER([model.config.format_text(text)], return_tensors="pt")
    grid, present = (1, 2, 2), torch.tensor([False])
    sequence = qwen.assemble(
        model.config.tokens, grid, *enclosed.values(), present, prompt="chat", positions="1d"
    )
    assert sequence.input_ids[0][sequence.attention_mask[0] == 1].tolist() == expected


@pytest.mark.parametrize(
    ("item", "inside"),
    [
        ({"image": picture()}, "{i}\nSummary above image"),
        ({"video": video()}, "{v}{v}\nSummary above video"),
        ({"image": picture(), "text": "red."}, "{i}red.\nSummary above sentence and image"),
        (
            {"text": "<|IMAGE|>\nred", "image": picture()},
            "{i}\nred\nSummary above sentence and image",
        ),
        (
            {"text": "see <|IMAGE|>", "image": picture()},
            "see {i}\nSummary above sentence and image",
        ),
        ({"text": "<|IMAGE|>", "image": picture()}, "{i}\nSummary above image"),
        ({"video": video(), "text": "red"}, "{v}{v}red\nSummary above sentence and video"),
        ({"image": picture(), "video": video()}, "{i}{v}{v}\nSummary above image and video"),
        (
            {"image": [picture(), picture()], "instruction": "Compare.", "text": "red"},
            "{i}{i}Compare.\nred\nSummary above sentence and image",
        ),
    ],
)
def test_pictures_stand_where_the_text_puts_them(item, inside):
    batch = processor_of(make_model(), picture_tokens=(4, 4))([item])
    tokens = {"i": PICTURE.format("<|image_pad|>" * 4)}
    # The tokens of a video's two pairs of frames are adjacent.
    inside = inside.replace("{v}{v}", PICTURE.format("<|video_pad|>" * 8))
    assert read(batch) == START + inside.format(**tokens) + END


def test_the_plain_prompt_has_no_template():
    batch = processor_of(make_model(prompt="plain"))([{"text": "red", "image": picture()}])
    picture_tokens = PICTURE.format("<|image_pad|>" * 4)
    expected = f"{picture_tokens}redSummary above image and text in one word:<|endoftext|>"
    assert read(batch) == expected


def test_padding_is_on_the_left_and_codes_tell_the_modalities():
    batch = processor_of(make_model())(ITEMS)
    lengths = batch["attention_mask"].sum(1)
    for row, length in zip(batch["attention_mask"], lengths.tolist(), strict=True):
        assert row.tolist() == [0] * (len(row) - length) + [1] * length
    assert (batch["input_ids"][:, -1] == TOKENIZER.convert_tokens_to_ids("<|endoftext|>")).all()
    assert batch["code"].tolist() == CODES


def test_names_of_picture_tokens_in_a_text_are_dropped():
    model = make_model()
    named = processor_of(model)([{"text": "red <|image_pad|><|video_pad|>mug"}])
    assert read(named) == f"{START}red mug\nSummary above sentence{END}"
    assert model.embed_sequences(**named).isfinite().all()


def test_batches_of_a_folder_have_the_released_texts():
    """Long texts lose tokens on the left; a text keeps the line break that ends it."""
    config = make_config()
    words = " ".join(f"word{i}" for i in range(9)) + "."
    ids, mask = make_collate(TOKENIZER, 16, 12, config).tokenize([words, ""])
    assert TOKENIZER.decode(ids[0][mask[0] == 1], skip_special_tokens=True) == "rd7 word8.\n"
    assert mask[1].sum() == 2 and TOKENIZER.truncation_side == "right"
    plain = make_config(prompt="plain")
    ids, mask = make_collate(TOKENIZER, 16, 12, plain).tokenize([words])
    assert TOKENIZER.decode(ids[0][mask[0] == 1], skip_special_tokens=True) == "word0 word"


# --- pictures and frames ---


def test_pictures_keep_their_aspect_ratio():
    processor = processor_of(make_model(), picture_tokens=(16, 32))
    batch = processor([{"image": picture(*sides)} for sides in ((100, 400), (8, 8), (64, 48))])
    rows, columns = (batch["image_grid_thw"][:, 1:] // 2).T.tolist()
    assert (rows, columns) == ([2, 4, 6], [11, 4, 4])


def test_patches_are_those_of_transformers_processor():
    pixels = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.3, 0.2, 0.1)}
    processor = processor_of(make_model(**pixels))
    pillow = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 37, 3), np.uint8))
    own = processor([{"image": [picture(30, 17), pillow]}])
    tensor = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
    expected = transformers.Qwen2VLImageProcessor(
        patch_size=4,
        size={"shortest_edge": 64, "longest_edge": 16 * 64},
        image_mean=pixels["pixel_mean"],
        image_std=pixels["pixel_std"],
    )(images=[picture(30, 17), tensor], return_tensors="pt")
    assert torch.equal(own["pixel_values"], expected["pixel_values"])
    assert torch.equal(own["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize(
    ("count", "rate", "expected"),
    [
        (300, 30, 10),  # 10 seconds
        (30, 30, 4),  # 1 second: the smallest number
        (9000, 30, 12),  # 300 seconds: the largest number
        (150, 30, 4),  # 5 frames are rounded to an even number, as Python rounds 2.5
        (210, 30, 8),  # 7 frames, as 3.5
        (3, 30, 3),
        (1, 30, 1),
    ],
)
def test_frames_are_sampled_evenly_within_4_and_12(count, rate, expected):
    chosen = sample_frames(count, rate)
    assert len(chosen) == expected and chosen[0] == 0 and chosen[-1] == count - 1
    steps = {b - a for a, b in zip(chosen[:-1], chosen[1:], strict=True)}
    assert not steps or max(steps) - min(steps) <= 1


def test_a_rate_selects_frames_and_no_rate_keeps_them_all():
    model = make_model()
    processor, frames = processor_of(model), video(48)
    sampled = processor([{"video": frames, "video_fps": 12}])
    chosen = processor([{"video": frames[[0, 16, 31, 47]]}])
    for name, value in sampled.items():
        assert torch.equal(value, chosen[name]), name
    assert processor([{"video": frames}])["video_grid_thw"][0, 0] == 24
    odd = processor([{"video": video(3)}])  # the last frame is repeated
    even = processor([{"video": torch.cat([video(3), video(3)[-1:]])}])
    assert torch.equal(odd["pixel_values_videos"], even["pixel_values_videos"])


def test_frames_are_reduced_to_the_given_number_of_pixels():
    processor = processor_of(make_model(), frame_pixels=6 * 64, picture_tokens=(1, 1000))
    grid = processor([{"video": video(4, 400, 100)}])["video_grid_thw"] // torch.tensor([1, 2, 2])
    assert grid.tolist() == [[2, 4, 1]]
    processor = processor_of(make_model(), frame_pixels=10**6, picture_tokens=(1, 1000))
    grid = processor([{"video": video(4, 16, 8)}])["video_grid_thw"] // torch.tensor([1, 2, 2])
    assert grid.tolist() == [[2, 16, 8]]  # small frames are enlarged to 128 tokens


# --- length ---


def test_long_texts_lose_tokens_on_the_left():
    words = " ".join(f"word{i}" for i in range(40))
    whole = processor_of(make_model())([{"text": words}])["input_ids"]
    short = processor_of(make_model(), max_length=100)([{"text": words}])["input_ids"]
    assert torch.equal(short, whole[:, -100:])


def test_a_cut_spares_pictures_and_the_prompt():
    model, item = make_model(), {"image": picture(), "text": "a word " * 20}
    whole = processor_of(model)([item])
    prompt = len(TOKENIZER(f"Summary above sentence and image{END}", add_special_tokens=False)[0])
    batch = processor_of(model, max_length=6 + 5 + prompt)([item])
    expected = PICTURE.format("<|image_pad|>" * 4) + "word\nSummary above sentence and image" + END
    assert read(batch) == expected and read(whole).endswith(expected[-60:])
    assert model.embed_sequences(**batch).isfinite().all()
    with pytest.raises(
        ValueError,
        match=rf"items\[0\]: got {6 + prompt} tokens of pictures and prompt, expected at most 20",
    ):
        processor_of(model, max_length=20)([item])


# --- the model ---


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_embeddings_agree_with_the_hosts_own_forward(positions):
    model = make_model(positions=positions)
    batch = processor_of(model)(ITEMS)
    rows = model.embed_sequences(**{name: double(value) for name, value in batch.items()})
    for i, item in enumerate(ITEMS):
        alone = {name: double(value) for name, value in processor_of(model)([item]).items()}
        ids = alone["input_ids"]
        pictures = {
            name: alone[name] for name in alone if name.startswith(("pixel", "image", "vid"))
        }
        if positions == "1d":
            pictures["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
        types = (ids == 5).int() + 2 * (ids == 6).int()
        model.host.rope_deltas = None
        states = model.host(input_ids=ids, mm_token_type_ids=types, **pictures).last_hidden_state
        expected = torch.nn.functional.normalize(states[0, -1], dim=-1)
        assert_close(rows[i], expected, rtol=0, atol=1e-10)


def double(value):
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_sequences_embed_like_pictures_of_one_size(positions):
    model = make_model(positions=positions)
    texts = ["red mug.", "plate"]
    pixels = torch.stack([picture(seed=1), picture(seed=2)])
    items = [{"text": t, "image": p} for t, p in zip(texts, pixels, strict=True)]
    batch = processor_of(model, picture_tokens=(4, 4))(items)
    rows = model.embed_sequences(**{name: double(value) for name, value in batch.items()})
    enclosed = TOKENIZER(
        [model.config.format_text(text) for text in texts], padding=True, return_tensors="pt"
    )
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (model.config.pixel_mean, model.config.pixel_std)
    )
    normalised = ((pixels.float() / 255 - mean) / std).double()
    expected = model.embed(pixel_values=normalised, **enclosed)["both"]
    assert_close(rows, expected, rtol=0, atol=1e-6)


def test_the_output_of_transformers_own_processor_is_accepted():
    model = make_model()
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 16 * 64}}
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
        tokenizer=make_tokenizer(),
    )
    text = START + PICTURE.format("<|image_pad|>") + f"red.\nSummary above sentence and image{END}"
    theirs = processor(text=[text], images=[picture(16, 32)], return_tensors="pt")
    own = processor_of(model)([{"text": "red.", "image": picture(16, 32)}])
    assert_close(model.embed_sequences(**theirs), model.embed_sequences(**own))


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_padding_may_be_on_the_right(positions):
    model = make_model(positions=positions)
    batch = processor_of(model)(ITEMS)
    lengths = batch["attention_mask"].sum(1)
    moved = {name: torch.zeros_like(batch[name]) for name in ("input_ids", "attention_mask")}
    for name, rows in moved.items():
        for row, full, length in zip(rows, batch[name], lengths.tolist(), strict=True):
            row[:length] = full[len(full) - length :]
    rows = model.embed_sequences(**{**batch, **moved})
    assert_close(rows, model.embed_sequences(**batch), rtol=0, atol=1e-10)


def test_an_exported_processor_makes_the_same_sequences(tmp_path):
    model = make_model()
    save_host(model, TOKENIZER, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    middles = [f"{PICTURE.format('<|image_pad|>')}red.\nSummary above sentence and image"]
    middles.append("mug\nSummary above sentence")
    texts = [START + middle + END for middle in middles]
    image = picture(200, 90)
    theirs = processor(text=texts, images=[image], padding=True, return_tensors="pt")
    own = UNITEProcessor(TOKENIZER, model.config)(
        [{"text": "red.", "image": image}, {"text": "mug"}]
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(theirs[name], own[name]), name
    assert TOKENIZER("mug")["input_ids"][0] == TOKENIZER.cls_token_id  # it still encloses texts


def test_parts_of_a_batch_have_their_own_pictures():
    model, batch = make_model(), processor_of(make_model())(ITEMS)
    expected = model.embed_sequences(**batch)
    for size in (1, 2, 3, 7):
        parts = model.split(batch, size)
        assert [len(part["input_ids"]) for part in parts] == [
            min(size, 5 - start) for start in range(0, 5, size)
        ]
        rows = torch.cat([model.embed_sequences(**part) for part in parts])
        assert_close(rows, expected, rtol=0, atol=1e-6)
    text_only = model.split(batch, 1)[0]
    assert text_only["pixel_values"] is None and text_only["image_grid_thw"] is None


def test_training_takes_sequences():
    model, processor = make_model(stage=2).train(), processor_of(make_model())
    items = [{"text": f"item {i}"} for i in range(3)] + ITEMS[1:3]
    labels = torch.arange(5)
    parts = {
        role: {**{k: double(v) for k, v in processor(x).items()}, "labels": labels}
        for role, x in (("query", items), ("candidate", ITEMS))
    }
    loss, _ = add_gradients(model, [parts], 1)
    rows = {
        role: model.embed_sequences(**{k: v for k, v in part.items() if k != "labels"})
        for role, part in parts.items()
    }
    same = torch.tensor(CODES)[:, None] == torch.tensor(CODES)
    scores = (rows["query"] @ rows["candidate"].T / 0.03).masked_fill(~same, float("-inf"))
    assert_close(loss, torch.nn.functional.cross_entropy(scores, labels))
    assert any(p.grad.any() for p in model.host.visual.parameters())


def test_cached_gradients_of_sequences_equal_plain_ones():
    model, processor = make_model(stage=1).train(), processor_of(make_model())
    parts = {
        role: {**{k: double(v) for k, v in processor(x).items()}, "labels": torch.arange(5)}
        for role, x in (("query", ITEMS[::-1]), ("candidate", ITEMS))
    }
    gradients = []
    for step in (
        lambda: add_gradients(model, [parts], 1),
        lambda: add_cached_gradients(model, parts, 2),
    ):
        model.zero_grad()
        loss, _ = step()
        gradients.append([loss, *(p.grad.clone() for p in model.parameters())])
    for plain, cached in zip(*gradients, strict=True):
        assert_close(cached, plain, rtol=0, atol=1e-12 * (1 + plain.abs().max().item()))


def test_a_blank_item_has_the_arguments_of_the_others():
    """A rank without rows encodes it, to take part in the others' exchanges."""
    model = make_model().train()
    batch = {**processor_of(model)(ITEMS), "labels": torch.arange(5)}
    batch = {name: double(value) for name, value in batch.items()}
    encoded = model.encode("query", **model.blank_item(batch))
    assert encoded["embedding"].shape == (1, 32)
    encoded["embedding"].sum().backward()
    assert all(p.grad is not None for p in model.host.visual.parameters())


def test_text_only_candidates_have_the_code_of_texts():
    """Views that show nothing of an item are not drawn."""
    model = make_model()
    ids = TOKENIZER([f"mug {i}\n" for i in range(60)], padding=True, return_tensors="pt")
    encoded = model.encode(
        "candidate",
        pixel_values=torch.zeros(60, 3, 16, 16, dtype=torch.float64),
        image_present=torch.zeros(60, dtype=torch.bool),
        labels=torch.arange(60),
        **ids,
    )
    assert encoded["code"].tolist() == [1] * 60
    assert len(encoded["embedding"].unique(dim=0)) == 60


# --- refusals ---


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"items: got \[\], expected a list of at least one dict"),
        ({"text": "a"}, "items: got {'text': 'a'}, expected a list of at least one dict"),
        (["a"], r"items\[0\]: got 'a', expected a dict"),
        ([{"text": "a"}, {"title": "a"}], r"items\[1\]: got the key 'title', expected text, "),
        ([{"text": 3}], r"items\[0\].text: got 3, expected a string"),
        ([{"text": "a\ud800"}], r"items\[0\].text: got 'a.*', expected a string of Unicode"),
        ([{"text": "<|image_pad|>"}], r"items\[0\]: got no text, image or video, expected at"),
        (({"text": "a"} for _ in range(1)), "items: got <generator.*, expected a list of at least"),
        ([{"video": video(), "video_fps": True}], r"items\[0\].video_fps: got True, expected a"),
        ([{"text": " "}], r"items\[0\]: got no text, image or video, expected at least one"),
        ([{"image": torch.zeros(3, 8, 8)}], r"items\[0\].image: got torch.float32 \(3, 8, 8\)"),
        ([{"image": picture(1, 999)}], r"items\[0\].image: got 1 x 999 pixels, expected sides"),
        ([{"video": picture()}], r"items\[0\].video: got torch.uint8 \(3, 16, 16\), expected"),
        ([{"video": video(), "video_fps": 0}], r"items\[0\].video_fps: got 0, expected a number"),
        ([{"text": "<|IMAGE|>"}], r"items\[0\].text: got 1 times <\|IMAGE\|>, expected 0"),
        (
            [{"text": "<|VIDEO|>", "image": picture(), "video": video()}],
            r"items\[0\].text: got 0 times <\|IMAGE\|>, expected 1, the number of the item's im",
        ),
    ],
)
def test_bad_items_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        processor_of(make_model())(items)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length: got 0, expected an integer from 2"),
        ({"picture_tokens": (5, 4)}, r"picture_tokens: got \(5, 4\), expected the smaller number"),
        ({"frames": 4}, "frames: got 4, expected 2 integers"),
        ({"frames": (1, 1)}, r"frames: got \(1, 1\), expected at least 2, the number of frames of"),
        ({"fps": 0}, "fps: got 0, expected a number above 0"),
        ({"fps": float("inf")}, "fps: got inf, expected a finite number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        processor_of(make_model(), **options)


def test_sequences_without_their_pictures_are_refused():
    model = make_model()
    batch = processor_of(model)([{"image": picture()}])
    without = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pixel_values: got pictures of 0 tokens, expected 4"):
        model.embed_sequences(**without)
    with pytest.raises(ValueError, match="image_grid_thw: got None with pixel_values, expected b"):
        model.embed_sequences(**without, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="pixel: got an unknown argument, expected pixel_values, "):
        model.embed_sequences(**without, pixel=batch["pixel_values"])
    with pytest.raises(ValueError, match="image_grid_thw: got complete sequences, expected code"):
        model.encode("query", labels=torch.arange(1), **{**batch, "code": None})


def test_labels_of_another_number_are_refused():
    model = make_model()
    batch = processor_of(model)([{"text": "red"}, {"text": "blue"}])
    with pytest.raises(ValueError, match=r"labels: got torch.int64 \(3,\), expected int64 \(2,\)"):
        model.encode("query", labels=torch.arange(3), **batch)


def test_arguments_that_contradict_complete_sequences_are_refused():
    model = make_model()
    batch = {**processor_of(model)([{"image": picture()}]), "labels": torch.arange(1)}
    for change, message in (
        ({"code": torch.arange(2)}, "code: got 2 rows, expected 1"),
        ({"image_present": torch.tensor([True])}, "image_present and code: got both, expected ex"),
        ({"image_tokens": torch.zeros(1, 4, 32)}, "image_tokens and code: got both, expected ex"),
        ({"pixel_values": batch["pixel_values"][:-1]}, r"pixel_values: got shape \(15, 96\), exp"),
        (
            {"pixel_values": batch["pixel_values"][:, 1:]},
            r"got shape \(16, 95\), expected \(16, 9",
        ),
        ({"image_grid_thw": batch["image_grid_thw"].float()}, "image_grid_thw: got torch.float32"),
        (
            {"image_grid_thw": batch["image_grid_thw"][:, 1:]},
            r"image_grid_thw: got .* \(1, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode("query", **{**batch, **change})


def test_videos_are_refused_with_qwen2_5():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
    host = {**make_config().host, "model_type": "qwen2_5_vl", "vision_config": vision}
    model = UNITE(make_config(host=host))
    batch = processor_of(model)([{"video": video()}])
    with pytest.raises(ValueError, match="pixel_values: got videos with model_type 'qwen2_5_vl'"):
        model.embed_sequences(**batch)


def test_a_tokenizer_without_the_video_token_is_refused_for_videos():
    config = make_config()
    config.tokens.pop("video")
    with pytest.raises(ValueError, match=r"items\[0\].video: got a video, expected a tokenizer"):
        UNITEProcessor(TOKENIZER, config)([{"video": video()}])


def test_the_chat_prompt_needs_its_tokens():
    tokens = {k: v for k, v in make_config().tokens.items() if k != "chat"}
    with pytest.raises(ValueError, match="tokens: got a dict without chat, expected the result of"):
        make_config(tokens=tokens)
