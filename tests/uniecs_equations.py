"""A literal transcription of UniECS's equations in float64.

The functions loop over items, views, heads, tokens and pairs. ``p`` maps names to parameters, and
``c`` is a UniECSConfig.
"""

import math

import torch

GROUPS = {
    "cmal": ("alignment", "v2t", "v2f", "t2f"),
    "clal": ("ppm", "pdc", "plc"),
    "imcl": ("v2v", "t2t"),
}
WEIGHTS = {
    "alignment": 0.5,
    "v2t": 1.0,
    "v2f": 1.0,
    "t2f": 0.2,
    "ppm": 0.8,
    "pdc": 0.5,
    "plc": 0.5,
    "v2v": 2.0,
    "t2t": 1.0,
}


def linear(p, name, x):
    out = x @ p[name + ".weight"].T
    return out + p[name + ".bias"] if name + ".bias" in p else out


def norm(p, name, x):
    x = x - x.mean(-1, keepdim=True)
    return (
        x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]
    )


def softmax(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def unit(x):
    return x / torch.sqrt((x * x).sum())


def relu(x):
    return x if x > 0 else 0 * x


def attention(p, name, tokens, context, heads):
    """Apply multi-head attention from ``tokens`` (N, D) to ``context`` (M, D)."""
    q, k, v = (
        linear(p, name + ".q_proj", tokens),
        linear(p, name + ".k_proj", context),
        linear(p, name + ".v_proj", context),
    )
    size, rows = q.shape[1] // heads, []
    for i in range(len(q)):
        row = []
        for part in (slice(h * size, (h + 1) * size) for h in range(heads)):
            row.append(softmax(k[:, part] @ q[i, part] / math.sqrt(size)) @ v[:, part])
        rows.append(torch.cat(row))
    return linear(p, name + ".out_proj", torch.stack(rows))


def gated_layer(p, name, image, text, e_v, e_t, c):
    """Apply gated cross-attention in both directions.

    ``e_v`` is 1 if the image exists, otherwise 0. ``e_t`` is 1 if the text exists, otherwise 0.
    """
    if c.missing == "skip" and 0 in (e_v, e_t):
        return image, text
    outs = []
    sides = (
        ("to_a", "norm_a", image, "norm_b", text, e_t),
        ("to_b", "norm_b", text, "norm_a", image, e_v),
    )
    for to, own, x, other, context, e in sides:
        if c.missing == "zero" and e == 0:
            read = torch.zeros_like(x)
        else:
            read = attention(
                p,
                f"{name}.{to}",
                norm(p, f"{name}.{own}", x),
                norm(p, f"{name}.{other}", context),
                c.num_heads,
            )
        if "gate" in c.without:
            outs.append(x + read)
            continue
        rows = []
        for token, a in zip(x, read, strict=True):
            flag = {True: [float(e)], False: [], "batch": [1.0]}[c.indicator]
            seen = torch.cat([token, a, torch.tensor(flag, dtype=torch.float64)])
            g = 1 / (1 + torch.exp(-linear(p, f"{name}.{to}.gate_proj", seen)))
            rows.append(g * a + (1 - g) * token)
        outs.append(torch.stack(rows))
    return outs


def block(p, name, x, c):
    normed = norm(p, name + ".norm1", x)
    x = x + p[name + ".gamma1"] * attention(p, name, normed, normed, c.num_heads)
    hidden = linear(p, name + ".ffn.0", norm(p, name + ".norm2", x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + p[name + ".gamma2"] * linear(p, name + ".ffn.3", hidden)


def pooled(p, name, x):
    return torch.tanh(linear(p, name + ".linear", norm(p, name + ".norm", sum(x) / len(x))))


def encoder(p, image, text, c):
    """Return the embedding of one item. ``image`` and ``text`` are pairs (present, tokens).

    Absent tokens are replaced by zeros.
    """
    e_v, e_t = int(image[0]), int(text[0])
    image, text = (x if present else torch.zeros_like(x) for present, x in (image, text))
    image, text = linear(p, "image_proj", image), linear(p, "text_proj", text)
    for layer in range(c.cross_layers):
        name = f"stages.{layer}"
        if "cross" not in c.without:
            image, text = gated_layer(p, name + ".cross", image, text, e_v, e_t, c)
        if c.placement == "interleaved" or layer == c.cross_layers - 1:
            for i in range(c.self_blocks):
                image, text = (
                    block(p, f"{name}.image_blocks.{i}", image, c),
                    block(p, f"{name}.text_blocks.{i}", text, c),
                )
    f = linear(
        p, "fusion_proj", torch.cat([pooled(p, "image_pool", image), pooled(p, "text_pool", text)])
    )[None]
    for i in range(c.fusion_blocks):
        f = block(p, f"fusion_blocks.{i}", f, c)
    return unit(norm(p, "fusion_norm", f[0]))


def separate(p, image, text):
    """Return the image, text and fused embeddings of one item for a model without fusion."""
    v, t = (
        unit(
            pooled(
                p, f"{name}_pool", linear(p, f"{name}_proj", x if present else torch.zeros_like(x))
            )
        )
        for name, (present, x) in (("image", image), ("text", text))
    )
    return v, t, v if image[0] and not text[0] else t if text[0] and not image[0] else unit(v + t)


def embeddings(p, items, c):
    """Return the image, text and fused embeddings (B, 3, D), and pairs (has image, has text)."""
    rows, flags = [], []
    for i in range(len(items["labels"])):
        image, text = items["image_tokens"][i], items["text_tokens"][i]
        real = ~items["text_padding_mask"][i]
        has_image, has_text = bool(items["image_present"][i]), bool(real.any())
        image = torch.stack([unit(linear(p, "image_map", x)) for x in image])
        if c.text_padding == "zeros":
            text = text[real]
        text = [unit(linear(p, "text_map", x)) for x in text]
        if c.text_length is not None:
            text = text[: c.text_length]
        # Without ``text_length``, any number of zeros gives the same result.
        if not has_text or not c.text_mask:
            text = text + [torch.zeros(c.dim, dtype=torch.float64)] * (
                (c.text_length or 3) - len(text)
            )
        text = torch.stack(text)
        shown, hidden = ((has_image, image), (has_text, text)), ((False, image), (False, text))
        if "fusion" in c.without:
            row = separate(p, *shown)
        else:
            row = [
                encoder(p, a, b, c)
                for a, b in ((shown[0], hidden[1]), (hidden[0], shown[1]), shown)
            ]
        rows.append(torch.stack(tuple(row)))
        flags.append((has_image, has_text))
    return torch.stack(rows), flags


def info_nce(query, candidate, has_query, has_candidate, labels, temperature, symmetric=False):
    size = len(query)
    rows = [i for i in range(size) if has_query[i] and has_candidate[i]]

    def one_way(a, b, has_b):
        loss = 0
        for i in rows:
            others = [j for j in range(size) if j == i or (has_b[j] and labels[j] != labels[i])]
            logits = b[others] @ a[i] / temperature
            loss = loss - torch.log(softmax(logits)[others.index(i)]) / len(rows)
        return loss

    loss = one_way(query, candidate, has_candidate)
    return (loss + one_way(candidate, query, has_query)) / 2 if symmetric else loss


def mean_cosine(a, b, has):
    rows = [i for i, present in enumerate(has) if present]
    return sum(a[i] @ b[i] for i in rows) / len(rows) if rows else 0


def loss_terms(rows1, rows2, flags1, flags2, labels, scale, c):
    size = len(labels)
    (v1, t1, f1), (v2, t2, f2) = rows1.unbind(1), rows2.unbind(1)
    (has_v1, has_t1), (has_v2, has_t2) = zip(*flags1, strict=True), zip(*flags2, strict=True)
    any1, any2 = (
        [a or b for a, b in zip(*pair, strict=True)]
        for pair in ((has_v1, has_t1), (has_v2, has_t2))
    )
    forward = c.v2f == "v_to_f"
    a1, a2, a3, a4 = c.margins
    out = {
        "alignment": (2 - mean_cosine(v1, f1, has_v1)) / 2 + (2 - mean_cosine(t1, f1, has_t1)) / 2
    }
    out["v2t"] = info_nce(v1, t2, has_v1, has_t2, labels, c.temperature, symmetric=True)
    out["v2f"] = info_nce(
        *((v1, f2, has_v1, any2) if forward else (f1, v2, any1, has_v2)), labels, c.temperature
    )
    out["t2f"] = info_nce(t1, f2, has_t1, any2, labels, c.temperature)
    mm, vm, tm = scale * f1 @ f2.T, scale * (v1 @ f2.T if forward else f1 @ v2.T), scale * t1 @ f2.T
    out["ppm"] = out["pdc"] = out["plc"] = 0
    top = min(c.nearest, size)
    for i in range(size):
        for j in range(size):
            for s in (mm, vm, tm):
                out["ppm"] = out["ppm"] + relu(a1 * (i != j) + s[i, j] - s[i, i]) / (3 * size**2)
            for s in (vm, tm):
                out["pdc"] = out["pdc"] + relu(a2 + mm[i, j] - s[i, i]) / (2 * size**2)
        for j in sorted(range(size), key=lambda j: -mm[i, j].item())[:top]:
            for a, b in ((vm, mm), (tm, mm), (vm, tm)):
                out["plc"] = out["plc"] + relu((a[i, j] - b[i, j]) ** 2 - a3) / (3 * size * top)
    out["v2v"] = info_nce(v1, v2, has_v1, has_v2, labels, c.temperature_v2v)
    hardest = int(c.hard_fraction * size)
    for i in range(size if "hard_negatives" not in c.without else 0):
        logits = v1[i] @ v2.T / c.temperature_v2v
        for j in sorted((j for j in range(size) if j != i), key=lambda j: -logits[j].item())[
            :hardest
        ]:
            out["v2v"] = out["v2v"] + relu(a4 + logits[j] - logits[i]) / (size * hardest)
    out["t2t"] = info_nce(t1, t2, has_t1, has_t2, labels, c.temperature_t2t)
    return {
        name: out[name]
        for group, names in GROUPS.items()
        if group not in c.without
        for name in names
    }


def transcription(p, query, candidate, c):
    """Return the embeddings of both sides, the loss and the loss terms.

    The adaptive weight of a group is a constant, computed from the gradient norm of the group's
    loss.
    """
    (rows1, flags1), (rows2, flags2) = embeddings(p, query, c), embeddings(p, candidate, c)
    terms = loss_terms(
        rows1, rows2, flags1, flags2, query["labels"].tolist(), torch.exp(p["log_scale"]), c
    )
    if c.weighting == "static" or "adaptive" in c.without:
        loss = sum(WEIGHTS[name] * terms[name] for name in terms) / sum(
            WEIGHTS[name] for name in terms
        )
    else:
        losses, powers = [], []
        for group in (names for group, names in GROUPS.items() if group not in c.without):
            losses.append(
                sum(WEIGHTS[name] * terms[name] for name in group)
                / sum(WEIGHTS[name] for name in group)
            )
            gradients = torch.autograd.grad(losses[-1], (rows1, rows2), retain_graph=True)
            gradient_norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
            powers.append((gradient_norm + c.epsilon) ** -c.beta)
        loss = sum(power / sum(powers) * value for power, value in zip(powers, losses, strict=True))
    return {"query": rows1, "candidate": rows2, "loss": loss, **terms}
