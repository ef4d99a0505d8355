"""The README.md of an exported folder: what the model is, and the training run that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

TITLES = {
    "fluid": "FLUID",
    "uniecs": "UniECS",
    "unica": "UniCA",
    "moon2": "MOON2.0",
    "unite": "UNITE",
}
PAPERS = {
    "fluid": "https://arxiv.org/abs/2508.07264",
    "uniecs": "https://arxiv.org/abs/2508.13843",
    "unica": "https://arxiv.org/abs/2606.28350",
    "moon2": "https://arxiv.org/abs/2511.12449",
    "unite": "https://arxiv.org/abs/2505.19650",
}
# A name on the hub, which no Markdown or YAML can misread.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
# The settings that name folders or hub models.
SOURCES = ("data", "val", "products", "host", "adapter", "image_encoder", "text_encoder", "init")
HOST = """\
{name} trains this Qwen2-VL, and takes an item's embedding from the hidden states: {pooled}.
This folder is the Qwen2-VL alone: the prompt around an item, and the length 1 of an embedding, are
those of mmfused. The head of `AutoModelForImageTextToText` is the matrix of the word embeddings,
because training has no head.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
```

`mmfused embed --model {key} --host FOLDER` embeds items as {name} does.
"""
POOLED = {"unite": "that of the last token", "moon2": "their mean over the tokens"}
TEXT = """\
This is the text encoder alone, a {kind}. It maps a text to hidden states; what {name} computes from
them and from pictures is not in this folder, so it does not embed as {name} does.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER"{pooler})
```

{no_pooler}Training cuts texts at {length} tokens, and so does the tokenizer with `truncation=True`.
`mmfused train --text-encoder FOLDER` starts with these weights.
"""
SENTENCES = """\
This is the text encoder, a {kind}. `encode` computes the embedding that {name} gives a text. For
pictures, and texts with pictures, {name} has other parts, which are not in this folder.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
embeddings = model.encode(["red mug", "blue plate"])  # of length 1
```

`transformers.AutoModel.from_pretrained("FOLDER"{pooler})` gives the hidden states. {no_pooler}Texts
are cut at {length} tokens, as in training. `mmfused train --text-encoder FOLDER` starts with these
weights.
"""
IMAGE = """\
This is the image encoder alone. It maps a picture to tokens; what {name} computes from them and
from texts is not in this folder, so it does not embed as {name} does. A picture is {resized}.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
tokens = model.forward_features(transform(picture)[None])
```

`transformers.AutoModel.from_pretrained("FOLDER")` loads it too, and `mmfused train --image-encoder
FOLDER` starts with these weights.
"""


def model_card(
    source: Path,
    settings: Mapping[str, Any],
    model: Any,
    part: str | None,
) -> str:
    """Return the text of a model card. No path of this machine is in it.

    Args:
        source: folder of the run or of the checkpoint.
        settings: the settings in ``source``.
        model: the model, in evaluation mode.
        part: "image", "text", or None for a host.
    """
    from mmfused.models.encoder_export import picture_settings
    from mmfused.models.encoders import text_class
    from mmfused.models.text_padding import longest_text_of
    from mmfused.training.config import TrainConfig

    training = TrainConfig.from_dict(settings["training"]).to_dict()
    key = training["model"]
    words = {"name": TITLES[key], "key": key, "pooled": POOLED.get(key, "")}
    if part == "image":
        stretched = picture_settings(model.config)["crop_mode"] == "squash"
        words["resized"] = "stretched" if stretched else "cropped to its central square and resized"
    if part == "text":
        _, no_pooler = text_class(model.text_encoder.config)
        words["kind"] = type(model.text_encoder).__name__
        longest = longest_text_of(model.text_encoder)
        words["length"] = str(min(training["max_length"], longest))
        words["pooler"] = ", add_pooling_layer=False" if no_pooler else ""
        words["no_pooler"] = "The encoder has no pooler. " if no_pooler else ""
    texts = {None: HOST, "image": IMAGE, "text": SENTENCES if key == "unica" else TEXT}
    title = f"{TITLES[key]}: {'host' if part is None else f'{part} encoder'}"
    return "\n".join(
        [
            "---",
            *_front_matter(key, part, training),
            "---",
            "",
            f"# {title}",
            "",
            f"Exported with [mmfused](https://github.com/mmfused/mmfused) from a training of "
            f"[{TITLES[key]}]({PAPERS[key]}).",
            "",
            texts[part].format(**words),
            "## Training",
            "",
            *(f"* {name}: {value}" for name, value in _facts(source, settings, training).items()),
            "",
            "The licences of the data and of the weights that training started from apply.",
            "",
        ]
    )


def _front_matter(key: str, part: str | None, training: Mapping[str, Any]) -> list[str]:
    """Return the lines of YAML; all texts are JSON strings in ASCII, which YAML reads alike."""
    library = {None: "transformers", "image": "timm", "text": "transformers"}[part]
    values: dict[str, str] = {"library_name": library}
    if part == "image":
        values["pipeline_tag"] = "image-feature-extraction"
    elif part == "text":
        values["pipeline_tag"] = "feature-extraction"
    if part == "text" and key == "unica":
        values = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    base = base_model(training, part)
    if base is not None:
        values["base_model"] = base
    tags = ["mmfused", key, "feature-extraction"]
    if part == "text" and key == "unica":
        tags.append("sentence-transformers")
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]


def base_model(training: Mapping[str, Any], part: str | None) -> str | None:
    """Return the hub name of the model that a part was trained from, or None.

    A name such as "hosts/mine" may also be that of a folder that is gone. It counts as a hub name
    only if the cache of this machine has files of it.
    """
    name = training.get("host" if part is None else f"{part}_encoder")
    if not isinstance(name, str) or Path(name).exists() or not HUB_NAME.fullmatch(name):
        return None
    if part == "image":
        from mmfused.models.encoders import import_timm

        timm = import_timm()
        found = timm.is_model(name) and timm.models.get_pretrained_cfg(name)
        return (getattr(found, "hf_hub_id", None) or None) if found else None
    import huggingface_hub

    with suppress(ValueError):  # no name of the hub
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return name
    return None


def _facts(
    source: Path,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
) -> dict[str, str]:
    """Return what is known about the training, by name."""
    import mmfused
    from mmfused.training.files import read_json

    folder = source.resolve()
    is_checkpoint = (folder / "state.json").is_file()
    run = folder.parent.parent if is_checkpoint and folder.parent.name == "checkpoints" else folder
    facts = {"run": _code(run.name), "trained with": f"mmfused {_code(settings['mmfused'])}"}
    facts["exported with"] = f"mmfused `{mmfused.__version__}`"
    facts["preset"] = _code(training["preset"])
    if settings["model"].get("stage") is not None:
        facts["stage"] = _code(settings["model"]["stage"])
    for name in SOURCES:
        if training.get(name) is not None:
            # The name in a path of any system.
            facts[name.replace("_", " ")] = _code(PureWindowsPath(training[name]).name or "?")
    if is_checkpoint:
        step = read_json(folder / "state.json")["step"]
        facts["steps"] = f"checkpoint at step {step}"
    else:
        path = run / "summary.json"
        step = read_json(path).get("steps") if path.is_file() else None
        if step is not None:
            facts["steps"] = _code(step)
        if training["steps"] is None:
            facts["epochs"] = _code(training["epochs"])
    for name in ("batch_size", "lr", "seed"):
        facts[name.replace("_", " ")] = _code(training[name])
    lora = settings.get("lora")
    if lora is not None:
        numbers = (f"{name} {_code(lora[name])}" for name in ("rank", "alpha") if name in lora)
        facts["LoRA"] = f"{', '.join(numbers)}, merged into the weights"
    scores = _scores(run / "metrics.jsonl", step)
    if scores:
        facts["validation"] = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return facts


def _scores(path: Path, step: object) -> dict[str, float]:
    """Return the scores of the validation at a step, or {} if the file does not have them."""
    from mmfused.json_files import read_text
    from mmfused.training.files import MAX_JSON_BYTES
    from mmfused.training.records import is_number

    if not path.is_file():
        return {}
    for line in reversed(read_text(path, MAX_JSON_BYTES).splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a run that was killed may leave half a line
            continue
        if isinstance(record, dict) and "loss" not in record and record.get("step") == step:
            return {
                f"`{name}`": value
                for name, value in record.items()
                if name != "step" and name.isidentifier() and is_number(value)
            }
    return {}


def _code(value: object) -> str:
    """Return a value on one line of Markdown that shows it and means nothing else."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    text = text if len(text) <= 200 else text[:200] + "..."
    return f"`{text.replace('`', chr(39))}`"
