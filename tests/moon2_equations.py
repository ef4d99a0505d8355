"""MOON2.0's equations transcribed literally, in float64.

The vision tower is not transcribed: the model's own is called. The end of this file makes a small
model and its batches.
"""

import math
from functools import partial

import torch

from mmfused.models import qwen
from mmfused.models.moon2 import MOON2, MOON2Config

x64 = torch.float64
VIEWS = ("image", "text", "both")
ZERO = torch.zeros((), dtype=x64)


def softmax(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def unit(x):
    return x / torch.sqrt((x * x).sum())


def silu(x):
    return x / (1 + torch.exp(-x))


# --- the host's decoder ---


def sequence(batch, i, view, c):
    """Return the tokens of item i, and their positions on the three axes of M-RoPE.

    A token is a token id (int), or ("picture", k) for the k-th token of the picture.
    """
    t = c.tokens
    words = [
        w
        for w, real in zip(
            batch["input_ids"][i].tolist(), batch["attention_mask"][i].tolist(), strict=True
        )
        if real
    ]
    words = [] if view == "image" else [w for w in words if w not in t["drop"]]
    side = c.image_size // 8
    tokens, positions = [], []
    if batch["image_present"][i] and view != "text":
        tokens = [t["vision_start"], *(("picture", k) for k in range(side * side)), t["vision_end"]]
        positions = [
            (0, 0, 0),
            *((1, 1 + row, 1 + column) for row in range(side) for column in range(side)),
        ]
        positions.append((1 + side,) * 3)
    first = positions[-1][0] + 1 if positions else 0
    positions += [(first + k,) * 3 for k in range(len(words))]
    return (tokens + words, positions) if tokens or words else ([t["end"]], [(0, 0, 0)])


def rms(p, name, x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * p[name + ".weight"]


def rotated(x, position, text):
    """Apply M-RoPE to the vector x of one head.

    Each pair (x[j], x[j + half]) is rotated by its frequency times the position on its axis.
    """
    half = len(x) // 2
    axes = [
        axis
        for axis, width in enumerate(text.rope_parameters["mrope_section"])
        for _ in range(width)
    ]
    angles = [
        position[axes[j]] * text.rope_parameters["rope_theta"] ** (-j / half) for j in range(half)
    ]
    cos, sin = (
        torch.tensor([f(angle) for angle in angles], dtype=x64) for f in (math.cos, math.sin)
    )
    first, second = x[:half], x[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def attention(p, name, x, positions, text):
    q, k, v = (
        x @ p[f"{name}.{part}_proj.weight"].T + p[f"{name}.{part}_proj.bias"] for part in "qkv"
    )
    size = text.hidden_size // text.num_attention_heads
    group = text.num_attention_heads // text.num_key_value_heads
    heads = []
    for h in range(text.num_attention_heads):
        mine, shared = (
            slice(h * size, (h + 1) * size),
            slice(h // group * size, (h // group + 1) * size),
        )
        queries = [rotated(row[mine], at, text) for row, at in zip(q, positions, strict=True)]
        keys = [rotated(row[shared], at, text) for row, at in zip(k, positions, strict=True)]
        rows = []
        for i in range(len(x)):
            weights = softmax(
                torch.stack([key @ queries[i] / math.sqrt(size) for key in keys[: i + 1]])
            )
            rows.append(weights @ v[: i + 1, shared])
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1) @ p[name + ".o_proj.weight"].T


def mixture(p, name, x, c):
    """Return the output, the router probabilities and the expert weights of each token.

    An expert that the token did not choose has weight 0.
    """
    outputs, probabilities, weights = [], [], []
    for token in x:
        probability = softmax(p[name + ".router.weight"] @ token)
        chosen = sorted(range(c.num_experts), key=lambda z: -probability[z].item())[: c.top_k]
        total = sum(probability[z] for z in chosen) if c.top_k > 1 else 1
        out = 0
        for z in chosen:
            gate, up, down = (p[f"{name}.w_{part}"][z] for part in ("gate", "up", "down"))
            out = out + probability[z] / total * (down @ (silu(gate @ token) * (up @ token)))
        outputs.append(out)
        probabilities.append(probability)
        weights.append(
            torch.stack(
                [probability[z] / total if z in chosen else ZERO for z in range(c.num_experts)]
            )
        )
    return torch.stack(outputs), probabilities, weights


def decoder(p, text, x, positions, empty, c):
    """Return the last hidden states of one sequence, and a list with an entry per MoE layer.

    An entry holds the router probabilities and the expert weights of each token.
    """
    reports = []
    for n in range(text.num_hidden_layers):
        name = f"host.language_model.layers.{n}"
        x = x + attention(
            p,
            name + ".self_attn",
            rms(p, name + ".input_layernorm", x, text.rms_norm_eps),
            positions,
            text,
        )
        h = rms(p, name + ".post_attention_layernorm", x, text.rms_norm_eps)
        if "moe" in c.without or (n + 1) % c.moe_every:
            gate, up, down = (
                p[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            x = x + (silu(h @ gate.T) * (h @ up.T)) @ down.T
        elif empty:  # an empty item is not routed
            reports.append(([], []))
        else:
            out, *report = mixture(p, name + ".mlp", h, c)
            x, reports = x + out, [*reports, report]
    return rms(p, "host.language_model.norm", x, text.rms_norm_eps), reports


def balance_loss(probabilities, weights, c):
    count, loss = len(weights), ZERO
    for z in range(c.num_experts):
        if c.balance == "switch":
            share = sum(1 for w in weights if w[z] > 0) / (c.top_k * count)
        else:
            share = sum(1 for q in probabilities if q.argmax() == z) / count
        loss = loss + c.num_experts * share * sum(q[z] for q in probabilities) / count
    return loss


def encoded(model, batch) -> dict:
    """Return what `MOON2.encode` returns. At least one item must have a picture or a text."""
    c, p, text = model.config, dict(model.named_parameters()), model.host.config.text_config
    table, size = p["host.language_model.embed_tokens.weight"], len(batch["labels"])
    has_image = batch["image_present"].tolist()
    out = {"labels": batch["labels"], "has_image": batch["image_present"]}
    out["has_text"] = torch.tensor(
        [
            any(
                isinstance(w, int) and w != c.tokens["end"]
                for w in sequence(batch, i, "text", c)[0]
            )
            for i in range(size)
        ]
    )
    pictures = []
    for i in range(size):
        pixels = (
            batch["pixel_values"][i] if has_image[i] else torch.zeros_like(batch["pixel_values"][i])
        )
        rows, grid = qwen.patches(pixels[None], 4, 2, 2)
        pictures.append(model.host.visual(rows, grid_thw=grid).pooler_output)
    layers, shares = {}, {}
    fusion = "fusion" not in c.without
    for view in VIEWS if fusion else VIEWS[:2]:
        rows = []
        for i in range(size):
            tokens, positions = sequence(batch, i, view, c)
            x = torch.stack(
                [pictures[i][w[1]] if isinstance(w, tuple) else table[w] for w in tokens]
            )
            states, reports = decoder(p, text, x, positions, tokens == [c.tokens["end"]], c)
            rows.append(unit(sum(states) / len(states)))
            for layer, (probabilities, weights) in enumerate(reports):
                all_probabilities, all_weights = layers.setdefault(layer, ([], []))
                all_probabilities.extend(probabilities)
                all_weights.extend(weights)
                mean = (
                    sum(weights) / len(weights)
                    if weights
                    else torch.zeros(c.num_experts, dtype=x64)
                )
                shares.setdefault((view, i), []).append(mean)
        out[view] = torch.stack(rows)
    if not fusion:
        both = []
        for i in range(size):
            image, words = out["image"][i], out["text"][i]
            alone = words if out["has_text"][i] else image
            both.append(unit(image + words) if has_image[i] == out["has_text"][i] else alone)
        out["both"] = torch.stack(both)
    if "moe" not in c.without:
        for i in range(size):
            for view in VIEWS[:2] if not fusion else VIEWS:
                shares[view, i] = sum(shares[view, i]) / len(layers)
            if not fusion:
                shares["both", i] = (shares["image", i] + shares["text", i]) / 2
        out["shares"] = torch.stack(
            [torch.stack([shares[view, i] for view in VIEWS]) for i in range(size)]
        )
        out["balance"] = sum(balance_loss(*layer, c) for layer in layers.values()) / len(layers)
    return out


# --- the losses ---


def has(part, i, view):
    image, text = bool(part["has_image"][i]), bool(part["has_text"][i])
    return {"image": image, "text": text, "both": image and text}[view]


def not_empty(part, i):
    return bool(part["has_image"][i] or part["has_text"][i])


def nce(anchor, positive, negatives, temperature):
    own = torch.exp(anchor @ positive / temperature)
    return -torch.log(
        own / (own + sum(torch.exp(anchor @ negative / temperature) for negative in negatives))
    )


def reliability(query, candidate, negative, i, margin, c):
    if negative is None or "filtering" in c.without or not not_empty(negative, i):
        return 1.0
    gap = query["both"][i] @ candidate["both"][i] - query["both"][i] @ negative["both"][i]
    phi = 1 / (1 + math.exp(-c.filter_slope * (gap.item() - margin)))
    return 1.0 if phi >= c.filter_threshold else phi


def inter(view, query, candidate, negative, margin, c):
    total = weight_sum = ZERO
    for i in range(len(query["labels"])):
        if not has(query, i, view) or not not_empty(candidate, i):
            continue
        negatives = []
        for part in (candidate, negative):
            for j in range(len(query["labels"]) if part is not None else 0):
                is_negative = (part is negative and j == i) or (
                    not c.own_negative_only and not (part is candidate and j == i)
                )
                if is_negative and not_empty(part, j) and part["labels"][j] != query["labels"][i]:
                    negatives.append(part["both"][j])
        weight = reliability(query, candidate, negative, i, margin, c)
        total = total + weight * nce(query[view][i], candidate["both"][i], negatives, c.temperature)
        weight_sum = weight_sum + weight
    return total / weight_sum if weight_sum else ZERO


def intra(part, c):
    total, count, size = ZERO, 0, len(part["labels"])
    for i in range(size):
        if has(part, i, "both"):
            others = [(i - 1) % size] if c.roll else [j for j in range(size) if j != i]
            others = [
                j for j in others if part["has_text"][j] and part["labels"][j] != part["labels"][i]
            ]
            negatives = [part["text"][j] for j in others]
            total, count = (
                total + nce(part["image"][i], part["text"][i], negatives, c.intra_temperature),
                count + 1,
            )
    return total / count if count else ZERO


def losses(query, candidate, negative, alignment, margin, c) -> dict:
    """Return the loss terms, and "loss", the weighted sum of the terms.

    ``alignment``: the parameter ``MOON2.alignment`` (experts, terms), or None.
    """
    terms, sources = {}, {}
    if "inter" not in c.without:
        for view in VIEWS:
            terms[f"inter_{view}"], sources[f"inter_{view}"] = (
                inter(view, query, candidate, negative, margin, c),
                (query, view),
            )
    if "intra" not in c.without:
        for name, part in (("positive", candidate), ("negative", negative)):
            if part is not None:
                terms[f"intra_{name}"], sources[f"intra_{name}"] = intra(part, c), (part, "image")
    out = dict(terms)
    omegas = [(c.normalise or 1) / len(terms)] * len(terms)
    if alignment is not None:
        affinity = [softmax(row[: len(terms)]) for row in alignment]
        omegas = []
        for m, (part, view) in enumerate(sources.values()):
            members = [i for i in range(len(part["labels"])) if has(part, i, view)]
            rows = [part["shares"][i, VIEWS.index(view)] for i in members]
            rows = [row.detach() for row in rows] if c.detach_routing else rows
            omega = sum(
                (sum(affinity[z][m] * row[z] for z in range(c.num_experts)) for row in rows), ZERO
            )
            omegas.append(omega / max(len(members), 1))
        if c.normalise is not None:
            total = sum(omegas)
            omegas = [c.normalise * omega / (total if total else 1) for omega in omegas]
    out["loss"] = sum(omega * term for omega, term in zip(omegas, terms.values(), strict=True))
    if "moe" not in c.without and "balance" not in c.without:
        parts = [part["balance"] for part in (query, candidate, negative) if part is not None]
        out["balance"] = sum(parts) / len(parts)
        out["loss"] = out["loss"] + c.balance_weight * out["balance"]
    if alignment is not None and "sparsity" not in c.without:
        out["sparsity"] = (
            sum(-sum(q * torch.log(q) for q in row) for row in affinity) / c.num_experts
        )
        out["loss"] = out["loss"] + c.sparsity_weight * out["sparsity"]
    return out


# --- a small model, and its batches ---

TOKENS = {"vision_start": 90, "vision_end": 91, "image": 92, "end": 93, "pad": 0, "drop": [2, 3]}
TOKENS["prompts"] = {kind: [80] for kind in qwen.KINDS}
HOST = {
    "text_config": {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "patch_size": 4},
}
ROLES = ("query", "candidate", "negative")


def tiny(**options) -> MOON2:
    torch.manual_seed(0)
    sizes = {
        "tokens": TOKENS,
        "image_size": 16,
        "host": HOST,
        "temperature": 0.3,
        "intra_temperature": 0.4,
    }
    return MOON2(MOON2Config.preset("tiny", **{**sizes, **options}))


def random_model(**options) -> MOON2:
    """Return a float64 model with random parameters, including biases and norm weights."""
    model, generator = tiny(**options).double(), torch.Generator().manual_seed(1)
    for parameter in (
        *model.host.parameters(),
        *([] if model.alignment is None else [model.alignment]),
    ):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=x64) * 0.4
    model.set_progress(0.25)
    return model


def items(seed: int, labels) -> dict:
    """Return a batch in which item 1 has no picture, item 2 no text and item 3 neither."""
    generator, batch = torch.Generator().manual_seed(seed), len(labels)
    lengths = torch.randint(4, 7, (batch,), generator=generator)
    lengths[2:4] = 2
    ids = torch.randint(4, 80, (batch, 7), generator=generator)
    ids[:, 0] = 2
    ids[torch.arange(batch), lengths - 1] = 3
    return {
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator, dtype=x64),
        "input_ids": ids,
        "attention_mask": (torch.arange(7) < lengths[:, None]).long(),
        "image_present": (torch.arange(batch) != 1) & (torch.arange(batch) != 3),
        "labels": torch.tensor(labels),
    }


def batch(negatives=True) -> dict:
    """Return a batch in which queries 0 and 4 share a product, and so do query 1 and negative 5.

    Candidates and negatives lack pictures or texts in other rows than the queries.
    """
    parts = {"query": items(1, [7, 1, 2, 3, 7, 5])}
    for seed, role, labels in (
        (2, "candidate", [7, 1, 2, 3, 7, 5]),
        (3, "negative", [8, 9, 8, 6, 6, 1]),
    ):
        part = items(seed, labels)
        order = torch.tensor([0, 4, 5, 1, 2, 3] if role == "candidate" else [2, 0, 1, 4, 3, 5])
        parts[role] = {
            name: value if name == "labels" else value[order] for name, value in part.items()
        }
    return parts if negatives else {role: parts[role] for role in ROLES[:2]}


def exact(model: MOON2) -> MOON2:
    """Make the host compute norms and rotary angles in float64 instead of float32."""
    rotary = model.host.language_model.rotary_emb
    rope = model.host.config.text_config.rope_parameters
    axis = torch.tensor(
        [axis for axis, width in enumerate(rope["mrope_section"]) for _ in range(width)]
    )
    frequency = rope["rope_theta"] ** -(torch.arange(len(axis), dtype=x64) / len(axis))

    def angles(x, positions):
        angle = (positions[axis].movedim(0, -1) * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    rotary.forward = angles
    for module in model.modules():
        if type(module).__name__ == "Qwen2VLRMSNorm":
            module.forward = partial(
                torch.nn.functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return model
