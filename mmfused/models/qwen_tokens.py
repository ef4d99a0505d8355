"""Tokens of the sequences that a Qwen2-VL reads, and the tokenizer that has them."""

from __future__ import annotations

from typing import Any

VISION_TOKENS = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "end": "<|endoftext|>",
}
PROMPT = "Summary above {} in one word:"
# What a sequence can hold.
KINDS = ("text", "image", "image and text", "video", "video and text")


def enclose_texts(tokenizer: Any) -> Any:
    """Return the tokenizer, changed so that a text stands between two tokens, as in BERT.

    An empty text is recognised by these two tokens alone. Qwen's own tokenizer puts nothing around
    a text; <|im_start|> and <|im_end|> are used then, which sequences leave out (`token_ids`,
    "drop").
    """
    from tokenizers.processors import TemplateProcessing

    if tokenizer("")["input_ids"]:
        return tokenizer
    tokenizer.add_special_tokens({"cls_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    ends = ("<|im_start|>", "<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ends],
    )
    return tokenizer


def add_vision_tokens(tokenizer: Any) -> Any:
    """Return the tokenizer with the `VISION_TOKENS` added as special tokens."""
    missing = [token for token in VISION_TOKENS.values() if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """Return the ids that `qwen.assemble` needs, as plain values for a config's `tokens`.

    Returns:
        vision_start, vision_end, image, end, pad; "drop": ids around a text that its sequence
        leaves out ([CLS], [SEP]); "prompts": the ids of each prompt, by what it names (KINDS).

    Raises:
        ValueError: where a token is missing.
    """
    vocabulary = tokenizer.get_vocab()
    for token in VISION_TOKENS.values():
        if token not in vocabulary:
            raise ValueError(
                f"tokenizer: got no token {token}, expected add_vision_tokens(tokenizer)"
            )
    ids: dict[str, Any] = {name: vocabulary[token] for name, token in VISION_TOKENS.items()}
    ids["pad"] = ids["end"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ids["drop"] = [token for token in ends if token is not None]
    ids["prompts"] = {
        kind: tokenizer(PROMPT.format(kind), add_special_tokens=False)["input_ids"]
        for kind in KINDS
    }
    return ids
