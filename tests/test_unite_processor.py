"""UNITEProcessor against transformers' tokenizer and processors."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from unite_items import (
    CODES,
    END,
    ITEMS,
    PICTURE,
    START,
    TOKENIZER,
    make_config,
    make_model,
    picture,
    processor_of,
    read,
    video,
)

from mmfused.models import UNITEProcessor, qwen
from mmfused.models.unite_inputs import sample_frames
from mmfused.training.setup import make_collate

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
    for text in ("red <|image_pad|><|video_pad|>mug", "red <|image_<|image_pad|>pad|>mug"):
        named = processor_of(model)([{"text": text}])
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


def test_a_tokenizer_without_the_video_token_is_refused_for_videos():
    config = make_config()
    config.tokens.pop("video")
    with pytest.raises(ValueError, match=r"items\[0\].video: got a video, expected a tokenizer"):
        UNITEProcessor(TOKENIZER, config)([{"video": video()}])
