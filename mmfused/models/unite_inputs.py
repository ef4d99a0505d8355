"""Complete sequences of UNITE from texts, instructions, pictures and videos."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfused.models.encoders import import_transformers
from mmfused.models.fields import check_field, shown
from mmfused.models.qwen import start_and_prompts
from mmfused.models.qwen_packed import GRID_OF
from mmfused.models.qwen_tokens import PROMPT, SPECIAL_TOKENS, VIDEO_PAD, chat_prompt
from mmfused.models.unite import IMAGE, TEXT, VIDEO, UNITEConfig

PLACEHOLDERS = {"<|IMAGE|>": "image", "<|VIDEO|>": "video"}
_SPLIT = re.compile("(" + "|".join(map(re.escape, PLACEHOLDERS)) + ")")
KEYS = ("text", "instruction", "image", "video", "video_fps")
# The names of the tokens that pictures have in sequences; in a text, they are left out.
_NAMES = re.compile("|".join(map(re.escape, (SPECIAL_TOKENS["image"], VIDEO_PAD))))
_PACKED = (*GRID_OF, *GRID_OF.values())
# The longest side of a picture over its shortest, of transformers' processor.
LONGEST_RATIO = 200


class Piece(NamedTuple):
    """Part of a sequence; only the ids of a text may be cut off."""

    ids: list[int]
    is_text: bool


class UNITEProcessor:
    """Turn items into complete sequences for `UNITE.embed_sequences` and `UNITE.encode`.

    An item is a dict with one or more of

    * "text": a string. Each ``<|IMAGE|>`` and ``<|VIDEO|>`` in it stands for one of the item's
      pictures and videos, in order. Without them, pictures and videos precede the text.
    * "instruction": a string, which precedes the text on a line of its own.
    * "image": a picture or a list of pictures, uint8 (3, H, W) tensors or images of Pillow.
    * "video": a video or a list of videos, uint8 (frames, 3, H, W) tensors.
    * "video_fps": frames in a second of the videos. If it is given, `sample_frames` chooses some of
      the frames; otherwise, all frames are used.

    Pictures keep their aspect ratio; transformers' processor resizes them to a number of tokens
    within ``picture_tokens``. As in the public code, the frames of a video are first resized to
    about ``frame_pixels``, and then to a number of tokens within ``picture_tokens``.

    A sequence of more than ``max_length`` tokens loses tokens on its left, but none of its pictures
    and its prompt.

    Args:
        tokenizer: the model's tokenizer, from `UNITEConfig.prepare_tokenizer`.
        config: the model's config.
        max_length: largest number of tokens of a sequence.
        count_pictures: whether ``max_length`` includes the tokens of pictures and videos.
        picture_tokens: smallest and largest number of tokens of a picture or of two frames.
        frame_pixels: number of pixels of a frame.
        frames: smallest and largest number of frames.
        fps: frames in a second that are used.

    Examples:
        >>> import torch
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import UNITE, UNITEConfig, UNITEProcessor
        >>> tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> model = UNITE(UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer)))
        >>> processor = UNITEProcessor(tokenizer, model.config, picture_tokens=(4, 16))
        >>> picture = torch.randint(0, 256, (3, 48, 96), dtype=torch.uint8)
        >>> items = [{"text": "red mug"}, {"text": "like <|IMAGE|>", "image": picture}]
        >>> model.embed_sequences(**processor(items)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        tokenizer: Any,
        config: UNITEConfig,
        *,
        max_length: int = 2048,
        count_pictures: bool = True,
        picture_tokens: tuple[int, int] = (256, 1280),
        frame_pixels: int = 240 * 320,
        frames: tuple[int, int] = (4, 12),
        fps: float = 1.0,
    ) -> None:
        for name, value in (("max_length", max_length), ("frame_pixels", frame_pixels)):
            check_field(name, value, int)
        for name, pair in (("picture_tokens", picture_tokens), ("frames", frames)):
            check_field(name, pair, tuple[int, int])
            if pair[0] > pair[1]:
                raise ValueError(f"{name}: got {pair}, expected the smaller number first")
        check_rate("fps", fps)
        self.tokenizer = tokenizer
        self.config = config
        self.tokens: dict[str, Any] = config.tokens or {}
        self.max_length = max_length
        self.count_pictures = count_pictures
        self.frame_pixels = frame_pixels
        self.frames = frames
        self.fps = fps
        vision = config.host["vision_config"]
        self.merge_size: int = vision.get("spatial_merge_size", 2)
        self.frame_group: int = vision.get("temporal_patch_size", 2)
        self.side: int = vision.get("patch_size", 14) * self.merge_size
        if frames[1] < self.frame_group:
            expected = f"at least {self.frame_group}, the number of frames of a patch"
            raise ValueError(f"frames: got {frames}, expected {expected}")
        least, most = (count * self.side**2 for count in picture_tokens)
        self.picture_pixels: dict[str, int] = {"min_pixels": least, "max_pixels": most}
        options = {
            "patch_size": self.side // self.merge_size,
            "temporal_patch_size": self.frame_group,
            "merge_size": self.merge_size,
            "image_mean": list(config.pixel_mean),
            "image_std": list(config.pixel_std),
            "size": {"shortest_edge": least, "longest_edge": most},
        }
        transformers = import_transformers()
        self.image_processor: Any = transformers.Qwen2VLImageProcessor(**options)
        self.video_processor: Any = transformers.Qwen2VLVideoProcessor(
            **options, do_sample_frames=False, **_no_cap(transformers)
        )

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the arguments of `UNITE.embed_sequences` and ``code`` of `UNITE.encode`.

        Raises:
            ValueError: an item is empty or unfit, or does not fit into ``max_length``.
        """
        if not isinstance(items, (list, tuple)) or not items:
            raise ValueError(f"items: got {shown(items)}, expected a list of at least one dict")
        names = [f"items[{i}]" for i in range(len(items))]
        media = [self._media(name, item) for name, item in zip(names, items, strict=True)]
        packed, sizes = self._patches(media)
        rows: list[list[int]] = []
        codes: list[int] = []
        for name, item, held in zip(names, items, media, strict=True):
            counts = {key: [next(sizes[key]) for _ in held[key]] for key in held}
            ids, code = self._sequence(name, item, counts)
            rows.append(ids)
            codes.append(code)
        longest = max(map(len, rows))
        pad = self.tokens["pad"]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(mask),
            "code": torch.tensor(codes),
            **packed,
        }

    def resize_picture(self, picture: Tensor) -> Tensor:
        """Return a picture, uint8 (3, H, W), at the size to which a call resizes it.

        A call then gives the same patches, but holds less memory than with a large photo.

        Raises:
            ValueError: one side is too long for the other.
        """
        read_picture("image", picture)
        return self._resized(picture, **self.picture_pixels)

    def _patches(
        self,
        media: list[dict[str, list[Tensor]]],
    ) -> tuple[dict[str, Tensor], dict[str, Iterator[int]]]:
        """Return the patches and grids of all items, and the numbers of tokens of each picture."""
        images = [image for held in media for image in held["image"]]
        videos = [video for held in media for video in held["video"]]
        packed: dict[str, Tensor] = {}
        if images:
            packed |= self.image_processor(images=images, return_tensors="pt")
        if videos:
            packed |= self.video_processor(videos=videos, return_tensors="pt")
        sizes: dict[str, Iterator[int]] = {}
        for key, name in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
            grid = packed.get(name, torch.zeros(0, 3, dtype=torch.int64))
            sizes[key] = iter((grid.prod(1) // self.merge_size**2).tolist())
        return {name: packed[name] for name in packed if name in _PACKED}, sizes

    def _media(self, name: str, item: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the pictures and the videos of an item, after a check of its fields."""
        if not isinstance(item, Mapping):
            raise ValueError(f"{name}: got {shown(item)}, expected a dict")
        for key in item:
            if key not in KEYS:
                raise ValueError(f"{name}: got the key {shown(key)}, expected {', '.join(KEYS)}")
        for key in ("text", "instruction"):
            text = item.get(key)
            if text is not None and not (isinstance(text, str) and text == valid_text(text)):
                raise ValueError(f"{name}.{key}: got {shown(text)}, expected a string of Unicode")
        images = [read_picture(f"{name}.image", picture) for picture in as_list(item.get("image"))]
        videos = [
            self._video(f"{name}.video", video, item.get("video_fps"))
            for video in as_list(item.get("video"))
        ]
        if videos and "video" not in self.tokens:
            raise ValueError(
                f"{name}.video: got a video, expected a tokenizer that has {VIDEO_PAD}"
            )
        return {"image": images, "video": videos}

    def _video(
        self,
        name: str,
        video: Any,
        rate: float | None,
    ) -> Tensor:
        """Return the frames of a video that are used, resized to about ``frame_pixels``."""
        if not isinstance(video, Tensor) or video.ndim != 4 or not len(video):
            raise ValueError(f"{name}: got {_described(video)}, expected uint8 (frames, 3, H, W)")
        read_picture(name, video[0])
        if rate is not None:
            check_rate(f"{name}_fps", rate)
            chosen = sample_frames(len(video), rate, self.fps, *self.frames, self.frame_group)
            video = video[chosen]
        return self._resize_frames(video)

    def _resize_frames(self, video: Tensor) -> Tensor:
        # The public code's limits: at least 128 tokens, unless `frame_pixels` are fewer.
        least = 128 * self.side**2
        return self._resized(video, min_pixels=least, max_pixels=self.frame_pixels)

    def _resized(self, pictures: Tensor, min_pixels: int, max_pixels: int) -> Tensor:
        """Return pictures (..., 3, H, W) with sides that patches fill, within limits of pixels."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        height, width = pictures.shape[-2:]
        size = smart_resize(
            height,
            width,
            factor=self.side,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        return resize(pictures, list(size), InterpolationMode.BICUBIC, antialias=True)

    def _sequence(
        self,
        name: str,
        item: Mapping[str, Any],
        counts: dict[str, list[int]],
    ) -> tuple[list[int], int]:
        """Return the ids and the code of an item whose pictures have ``counts`` tokens."""
        lines = [(item.get(key) or "").strip() for key in ("instruction", "text")]
        text = "\n".join(line for line in lines if line)
        while _NAMES.search(text):  # removing a name may join the halves of another
            text = _NAMES.sub("", text)
        text = _place(name, text, counts)
        has_text = bool(_SPLIT.sub("", text).strip())
        has_image, has_video = bool(counts["image"]), bool(counts["video"])
        if not (has_text or has_image or has_video):
            raise ValueError(f"{name}: got no text, image or video, expected at least one")
        text = self.config.format_text(text) if has_text else text
        start, _ = start_and_prompts(self.tokens, self.config.prompt)
        left = {key: iter(numbers) for key, numbers in counts.items()}
        pieces = [Piece(start, True), *(self._piece(part, left) for part in _SPLIT.split(text))]
        if self.config.prompt == "chat":
            words = {"sentence": has_text, "image": has_image, "video": has_video}
            prompt = chat_prompt(" and ".join(word for word, is_used in words.items() if is_used))
        else:
            words = {"image": has_image, "video": has_video, "text": has_text}
            prompt = PROMPT.format(" and ".join(word for word, is_used in words.items() if is_used))
        pieces.append(Piece([*self._encode(prompt), self.tokens["end"]], False))
        held = 0 if self.count_pictures else sum(map(sum, counts.values()))
        ids = _cut(name, pieces, self.max_length + held)
        return ids, TEXT * has_text + IMAGE * has_image + VIDEO * has_video

    def _piece(self, part: str, left: dict[str, Iterator[int]]) -> Piece:
        """Return the ids of a part of a text, or of the next picture or video."""
        tokens = self.tokens
        if part in PLACEHOLDERS:
            key = PLACEHOLDERS[part]
            inner = [tokens[key]] * next(left[key])
            return Piece([tokens["vision_start"], *inner, tokens["vision_end"]], False)
        return Piece(self._encode(part), True)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _place(
    name: str,
    text: str,
    counts: dict[str, list[int]],
) -> str:
    """Return the text with a placeholder for each picture and video."""
    marks = {mark: text.count(mark) for mark in PLACEHOLDERS}
    if not any(marks.values()):
        return "".join(mark * len(counts[key]) for mark, key in PLACEHOLDERS.items()) + text
    for mark, key in PLACEHOLDERS.items():
        if marks[mark] != len(counts[key]):
            raise ValueError(
                f"{name}.text: got {marks[mark]} times {mark}, expected {len(counts[key])}, "
                f"the number of the item's {key}s, or no placeholder at all"
            )
    return text


def _cut(
    name: str,
    pieces: list[Piece],
    max_length: int,
) -> list[int]:
    """Join pieces, and leave out the first ids of texts beyond ``max_length`` ids."""
    excess = sum(len(piece.ids) for piece in pieces) - max_length
    ids: list[int] = []
    for piece in pieces:
        cut = min(max(excess, 0), len(piece.ids)) if piece.is_text else 0
        ids += piece.ids[cut:]
        excess -= cut
    if excess > 0:
        raise ValueError(
            f"{name}: got {len(ids)} tokens of pictures and prompt, "
            f"expected at most {max_length}, the max_length"
        )
    return ids


def sample_frames(
    count: int,
    rate: float,
    fps: float = 1.0,
    least: int = 4,
    most: int = 12,
    multiple: int = 2,
) -> list[int]:
    """Return the indices of the frames that are used, evenly spaced from the first to the last.

    Their number is that of ``fps`` frames in a second, within ``least`` and ``most``, rounded to a
    multiple of ``multiple``. A video of fewer frames keeps all it has.

    Args:
        count: number of frames of the video.
        rate: its frames in a second.
        fps: frames in a second that are used.
        least: smallest number of frames.
        most: largest number of frames.
        multiple: number that divides the number of frames.

    Examples:
        >>> from mmfused.models.unite_inputs import sample_frames
        >>> sample_frames(count=150, rate=30)  # five seconds
        [0, 50, 99, 149]
        >>> sample_frames(count=3, rate=1)
        [0, 1, 2]
    """
    check_rate("rate", rate)
    low, high = -(-least // multiple) * multiple, most // multiple * multiple
    wanted = round(min(max(count / rate * fps, low), high) / multiple) * multiple
    if wanted >= count:
        return list(range(count))
    return torch.linspace(0, count - 1, wanted).round().long().tolist()


def read_picture(name: str, picture: Any) -> Tensor:
    """Return a picture as uint8 (3, H, W)."""
    if hasattr(picture, "convert"):  # an image of Pillow
        picture = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if (
        not isinstance(picture, Tensor)
        or picture.dtype != torch.uint8
        or picture.ndim != 3
        or len(picture) != 3
        or 0 in picture.shape
    ):
        expected = "uint8 (3, H, W) or an image of Pillow"
        raise ValueError(f"{name}: got {_described(picture)}, expected {expected}")
    shortest, longest = sorted(picture.shape[1:])
    if longest > LONGEST_RATIO * shortest:
        raise ValueError(
            f"{name}: got {picture.shape[1]} x {picture.shape[2]} pixels, "
            f"expected sides whose ratio is at most {LONGEST_RATIO}"
        )
    return picture


def check_rate(name: str, rate: object) -> None:
    """Require a number of frames in a second."""
    check_field(name, rate, float)
    if not rate > 0:  # type: ignore[operator]
        raise ValueError(f"{name}: got {rate}, expected a number above 0")


def valid_text(text: str) -> str:
    """Return the text without surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "ignore").decode()


def as_list(value: Any) -> list[Any]:
    """Return a list of the value, the value if it is a list, or [] for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return shown(value)


def _no_cap(transformers: Any) -> dict[str, bool]:
    """Return the option that leaves the size of frames to `picture_tokens`, if there is one."""
    has_cap = hasattr(transformers.Qwen2VLVideoProcessor, "cap_pixels_per_frame")
    return {"cap_pixels_per_frame": False} if has_cap else {}
