"""Special tokens and prompts of Qwen2-VL's input sequences."""

from __future__ import annotations

import copy
from typing import Any

# The special tokens of a sequence, by their keys in a config's `tokens`.
SPECIAL_TOKENS = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "end": "<|endoftext|>",
}
PROMPT = "Summary above {} in one word:"
# The possible contents of a sequence, in the words of PROMPT.
KINDS = ("text", "image", "image and text", "video", "video and text")
# The prompt of UNITE's public code is the chat template of Qwen2-VL, with other names of the same
# contents. The line break before PROMPT belongs to the text, if there is one (`end_line`), because
# a tokenizer may merge it with the text's last character.
CHAT_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
CHAT_END = "<|im_end|>\n<|im_start|>assistant\n"
CHAT_KINDS = {
    "text": "sentence",
    "image": "image",
    "image and text": "sentence and image",
    "video": "video",
    "video and text": "sentence and video",
}
# The tokens around each text, which sequences leave out.
ENCLOSING = ("<|im_start|>", "<|im_end|>")
# Arguments of a call that transformers saves with a tokenizer.
TOKENIZING = (
    "max_length",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "pad_type_id",
    "stride",
    "truncation_strategy",
    "padding_strategy",
)
# The token of a video in transformers' processor.
VIDEO_PAD = "<|video_pad|>"


def enclose_texts(tokenizer: Any) -> Any:
    """Make the tokenizer enclose each text in two special tokens, and return the tokenizer.

    The two tokens are <|im_start|> and <|im_end|>. An empty text becomes the two tokens alone. A
    tokenizer that already adds special tokens, as BERT's does, is left unchanged. `token_ids` lists
    the two tokens under "drop", and the sequences of `qwen.assemble` leave out dropped tokens.
    """
    from tokenizers.processors import TemplateProcessing

    if tokenizer("")["input_ids"]:
        return tokenizer
    tokenizer.add_special_tokens(dict(zip(("cls_token", "sep_token"), ENCLOSING, strict=True)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ENCLOSING],
    )
    return tokenizer


def without_call(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer that does not truncate or pad as in its last call."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in TOKENIZING:  # what a tokenizer that was saved after a call repeats
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def plain_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer for whole sequences.

    The copy does not enclose texts (`enclose_texts`), does not truncate by itself, and pads on the
    left, so that the last token of each sequence is in the last slot.
    """
    from tokenizers.processors import ByteLevel

    tokenizer = without_call(tokenizer)
    for name in ("padding_side", "truncation_side"):
        setattr(tokenizer, name, "left")
        tokenizer.init_kwargs[name] = "left"  # this value is saved
    if (tokenizer.cls_token, tokenizer.sep_token) == ENCLOSING:
        # Qwen2's own rule, which changes no ids.
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer


def add_vision_tokens(tokenizer: Any) -> Any:
    """Add the `SPECIAL_TOKENS` to the tokenizer as special tokens, and return the tokenizer."""
    missing = [token for token in SPECIAL_TOKENS.values() if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """Return the token ids that `qwen.assemble` needs, as plain values for a config's `tokens`.

    Returns:
        A dict. "vision_start", "vision_end", "image", "end" and "pad" are ids. "drop" lists the ids
        of the tokenizer's cls_token and sep_token, which sequences leave out. "prompts" maps each
        of KINDS to the ids of a prompt. "chat" has the ids of the chat template: "start", which
        sequences begin with, and "prompts". "video" is the id of <|video_pad|>, if there is one.

    Raises:
        ValueError: the vocabulary lacks one of the `SPECIAL_TOKENS`.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    vocabulary = tokenizer.get_vocab()
    for token in SPECIAL_TOKENS.values():
        if token not in vocabulary:
            raise ValueError(
                f"tokenizer: got a vocabulary without {token}, "
                "expected the result of add_vision_tokens"
            )
    ids: dict[str, Any] = {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()}
    if VIDEO_PAD in vocabulary:
        ids["video"] = vocabulary[VIDEO_PAD]
    ids["pad"] = ids["end"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    enclosing = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ids["drop"] = [token for token in enclosing if token is not None]
    ids["prompts"] = {kind: encode(PROMPT.format(kind)) for kind in KINDS}
    ids["chat"] = {
        "start": encode(CHAT_START),
        "prompts": {kind: encode(chat_prompt(words)) for kind, words in CHAT_KINDS.items()},
    }
    return ids


def chat_prompt(contents: str) -> str:
    """Return what follows a sequence's pictures and text in the chat template."""
    line_break = "" if "sentence" in contents else "\n"
    return f"{line_break}{PROMPT.format(contents)}{CHAT_END}"


def end_line(text: str) -> str:
    """Return a text of the chat template: without spaces around it, and with a line break."""
    text = text.strip()
    return text + "\n" if text else ""
