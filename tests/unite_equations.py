"""A literal transcription of UNITE's equations in float64.

Each item runs alone through the host's own forward. The losses are computed in loops.
"""

import torch

from mmfused.models import qwen

VIEWS = ("image", "text", "both")
KINDS = {(0, 0): "text", (0, 1): "text", (1, 0): "image", (1, 1): "image and text"}
CODES = {"text": 1, "image": 2, "video": 4}


def sequence(batch, i, view, config, count) -> tuple[list[int], int]:
    """Return the token ids and the modality code of item i in a view.

    ``count``: the number of tokens of a picture or video.
    """
    tokens = config.tokens
    image = bool(batch["image_present"][i]) and view != "text"
    real = batch["attention_mask"][i] == 1
    words = (
        []
        if view == "image"
        else [word for word in batch["input_ids"][i][real].tolist() if word not in tokens["drop"]]
    )
    medium = "video" if batch["pixel_values"].ndim == 5 else "image"
    ids = (
        [tokens["vision_start"]] + [tokens["image"]] * count + [tokens["vision_end"]]
        if image
        else []
    )
    kind = KINDS[image, bool(words)].replace("image", medium)
    if config.prompt == "chat":
        ids = tokens["chat"]["start"] + ids + words + tokens["chat"]["prompts"][kind]
    else:
        ids = ids + words + tokens["prompts"][kind]
    return ids + [tokens["end"]], image * CODES[medium] + bool(words) * CODES["text"]


def forward(host, ids, pixels, config):
    """Return the normalized last hidden state of one sequence.

    The host itself inserts the tokens of the picture, and computes positions unless they are 1-D.
    """
    tokens, ids, given = config.tokens, torch.tensor([ids]), {}
    if config.positions == "1d":
        given["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if tokens["image"] in ids:
        rows, grid = qwen.patches(pixels[None], 4, 2, 2)
        names = (
            ("pixel_values", "image_grid_thw")
            if pixels.ndim == 3
            else ("pixel_values_videos", "video_grid_thw")
        )
        given |= dict(zip(names, (rows, grid), strict=True))
        if pixels.ndim == 4:
            ids[ids == tokens["image"]] = host.config.video_token_id
        given["mm_token_type_ids"] = (ids == host.config.image_token_id).int() + 2 * (
            ids == host.config.video_token_id
        ).int()
    host.rope_deltas = None
    last = host(input_ids=ids, attention_mask=torch.ones_like(ids), **given).last_hidden_state[
        0, -1
    ]
    return last / torch.sqrt((last * last).sum())


def embeddings(host, batch, views, config):
    """Return embeddings (B, D) and modality codes. ``views`` has one view for each item."""
    pixels = batch["pixel_values"]
    count = (
        pixels.shape[-1]
        * pixels.shape[-2]
        // 64
        * (pixels.shape[1] // 2 if pixels.ndim == 5 else 1)
    )
    rows, codes = [], []
    for i, view in enumerate(views):
        ids, code = sequence(batch, i, view, config, count)
        if "fusion" in config.without and code in (3, 5):
            parts = [sequence(batch, i, part, config, count)[0] for part in ("image", "text")]
            row = sum(forward(host, part, pixels[i], config) for part in parts)
            row = row / torch.sqrt((row * row).sum())
        else:
            row = forward(host, ids, pixels[i], config)
        rows.append(row)
        codes.append(code)
    return torch.stack(rows), codes


def drawn_views(batch, views, config) -> list[str]:
    """Draw a view of each item, from those of ``views`` that show something of it."""
    drawn = []
    for i, draw in enumerate(torch.randint(6, (len(batch["labels"]),)).tolist()):
        image = bool(batch["image_present"][i])
        real = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        text = any(word not in config.tokens["drop"] for word in real)
        shown = {"image": image, "text": text, "both": image or text}
        allowed = [view for view in views if shown[view]] or ["both"]
        drawn.append(allowed[draw % len(allowed)])
    return drawn


def log_share(scores, allowed, i):
    """Return the log of the softmax probability of index i among the indices ``allowed``."""
    return scores[i] - torch.log(sum(torch.exp(scores[j]) for j in allowed))


def loss(query, candidate, negative, codes, labels, config):
    """Return the loss.

    ``codes``: the modality codes of the candidates. ``labels``: the labels of the queries,
    candidates and negatives.
    """
    size, total = len(query), torch.zeros((), dtype=torch.float64)
    dual = config.stage == 1 and "dual" not in config.without
    masked = config.stage == 2 and "mamcl" not in config.without
    with_negatives = (
        config.stage == 2 and "negatives" not in config.without and negative is not None
    )
    rows = torch.cat([candidate, negative]) if with_negatives else candidate
    same_id = (with_negatives and config.same_id_with_negatives) or config.same_id
    products = [*labels[1].tolist(), *(labels[2].tolist() if with_negatives else [])]
    for i in range(size):
        scores = torch.stack([query[i] @ row / config.temperature for row in rows])
        seen = [j for j in range(len(rows)) if j >= size or not masked or codes[j] == codes[i]]
        same = [j for j in seen if j != i and products[j] == labels[0][i]]
        same = [] if same_id == "ignore" else same
        if same_id == "drop":
            total = total - log_share(scores, [j for j in seen if j not in same], i)
        else:
            total = total - sum(log_share(scores, seen, j) for j in (i, *same))
    if dual:
        reverse = torch.zeros((), dtype=torch.float64)
        for j in range(size):
            scores = torch.stack(
                [query[i] @ candidate[j] / config.temperature for i in range(size)]
            )
            same = [i for i in range(size) if i != j and labels[0][i] == labels[1][j]]
            same = [] if same_id == "ignore" else same
            if same_id == "drop":
                reverse = reverse - log_share(scores, [i for i in range(size) if i not in same], j)
            else:
                reverse = reverse - sum(log_share(scores, range(size), i) for i in (j, *same))
        total = (total + reverse) / 2
    return total / size
