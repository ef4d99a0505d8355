"""A small UNITE with the released prompt, a tokenizer with Qwen2's rules, and items."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmfused.models import UNITE, UNITEConfig, UNITEProcessor

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


def double(value):
    return value.double() if value.is_floating_point() else value
