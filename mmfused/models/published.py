"""What a pretrained folder holds, in any of the published layouts, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mmfused.models.layouts import Layout, Part, find_layout, prefixed
from mmfused.models.pretrained import take, text_of_folder, vit_of_folder
from mmfused.models.qwen_host import host_of_folder
from mmfused.models.weights import compress, on_meta, pickle_hint, read_weights, weights_path


def parts_of(folder: str | Path, argument: str = "folder") -> tuple[str, ...]:
    """Return which encoders a pretrained folder holds.

    Args:
        folder: a folder with safetensors, in any layout that ``pretrained_vit``,
            ``pretrained_text`` or ``pretrained_qwen2_vl`` load.
        argument: name of the argument in error messages.

    Returns:
        Some of "image_encoder", "text_encoder" and "visual_proj", in this order, or ("host",).

    Raises:
        ValueError: the folder has none, or a file is damaged.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from mmfused.models.published import parts_of
        >>> config = BertConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=24)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertModel(config).save_pretrained(folder)
        ...     parts_of(folder)
        ('text_encoder',)
    """
    return known_layout(Path(folder), argument).parts


def pretrained_projection(folder: str | Path) -> nn.Linear:
    """Return Visualized-BGE's projection of image tokens to the width of its text encoder.

    Args:
        folder: a folder with a state of Visualized-BGE as model.safetensors.

    Raises:
        ValueError: the folder has no ``visual_proj``, or a file is damaged.
    """
    return projection_of_folder(known_layout(Path(folder)))


def check_pretrained(folder: str | Path, argument: str = "folder") -> tuple[str, ...]:
    """Require all weights of each encoder that a folder holds, with the shapes of its config.

    Values are not read, and no model is allocated.

    Args:
        folder: a folder with safetensors, as for :func:`parts_of`.
        argument: name of the argument in error messages.

    Returns:
        The encoders, as of :func:`parts_of`.

    Raises:
        ValueError: a weight is missing, is not one of the model or has another shape, or the folder
            holds no encoder.
    """
    layout = known_layout(Path(folder), argument)
    for part in layout.parts:
        if part == "image_encoder":
            vit_of_folder(layout.folder, {}, values=False)
        elif part == "text_encoder":
            text_of_folder(layout.folder, values=False)
        elif part == "host":
            host_of_folder(layout.folder, values=False)
        else:
            projection_of_folder(layout, values=False)
    return layout.parts


def known_layout(folder: Path, argument: str = "folder") -> Layout:
    """Return the layout of a folder, which must be known."""
    path = weights_path(folder)
    try:
        layout = find_layout(argument, folder) if path.is_file() else None
    except FileNotFoundError as error:  # a part of the weights
        raise ValueError(str(error)) from error
    if layout is None:
        expected = "a folder with safetensors of a known layout (a config.json that is known, or "
        expected += "names of CLIP, EVA02-CLIP, Chinese-CLIP or Visualized BGE)"
        found = repr(str(folder))
        if path.is_file():
            found += f" with {_some_names(folder)}"
        raise ValueError(f"{argument}: got {found}, expected {expected}{pickle_hint(folder)}")
    return layout


def _some_names(folder: Path, most: int = 5) -> str:
    """Return names of weights in a folder, for a message."""
    names = compress(sorted(read_weights("folder", folder, values=False)))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def projection_of_folder(layout: Layout, values: bool = True) -> nn.Linear:
    """Load the projection; without ``values``, check its names and shapes on meta instead."""
    if "visual_proj" not in layout.parts:
        held, expected = ", ".join(layout.parts), "a folder with visual_proj"
        raise ValueError(f"folder: {layout.folder} holds {held}, expected {expected}")
    width = layout.size("model_visual.visual.patch_embed.proj.weight", 0, 4)
    dim = layout.size("bge_embeddings.word_embeddings.weight", 1, 2)
    with on_meta():
        linear = nn.Linear(width, dim)
    prefix = f"{layout.prefix}visual_proj."
    weights = read_weights("folder", layout.folder, values)
    where = f"folder: {weights_path(layout.folder)}"
    taken = take(where, Part({}, prefixed(prefix), prefix, "$", {}), linear, weights)
    if values:
        linear.to_empty(device="cpu").load_state_dict(taken)
    return linear
