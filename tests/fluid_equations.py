"""FLUID's equations transcribed literally, in float64.

The functions loop over samples, heads, tokens and experts. ``p`` holds the parameters by name, and
``c`` is the config.
"""

import math

import torch

x64 = torch.float64


def linear(p, name, x):
    return torch.einsum("oi,...i->...o", p[name + ".weight"], x) + p[name + ".bias"]


def normed(weight, bias, x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * weight + bias


def norm(p, name, x):
    return normed(p[name + ".weight"], p[name + ".bias"], x)


def softmax(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def attention(p, name, q, x, heads):
    """Compute multi-head attention of one sample's queries q (L, D) over its tokens x (N, D).

    The result is 0 if N = 0.
    """
    if len(x) == 0:
        return torch.zeros_like(q)
    query, key, value = (
        linear(p, name + ".q_proj", q),
        linear(p, name + ".k_proj", x),
        linear(p, name + ".v_proj", x),
    )
    size, rows = q.shape[1] // heads, []
    for i in range(len(q)):
        row = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = softmax(
                torch.stack([query[i, part] @ k[part] / math.sqrt(size) for k in key])
            )
            row.append(sum(w * v[part] for w, v in zip(weights, value, strict=True)))
        rows.append(torch.cat(row))
    return linear(p, name + ".out_proj", torch.stack(rows))


def q_transform(p, name, x, c):
    q = p[name + ".queries"]
    for depth in range(c.depth):
        block = f"{name}.blocks.{depth}"
        q = norm(p, block + ".norm_pool", q + attention(p, block + ".pool", q, x, c.num_heads))
        hidden = linear(p, block + ".ffn.0", q)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        q = norm(p, block + ".norm_ffn", q + linear(p, block + ".ffn.2", hidden))
    return q


def pooled(p, name, x, c):
    """Return the query tokens of one sample.

    Without a Q-Transform, returns the first token of x instead, or 0 if x is empty.
    """
    if "q_transform" not in c.without:
        return q_transform(p, name, x, c)
    return x[:1] if len(x) else torch.zeros(1, c.dim, dtype=x64)


def token_gate(p, image, text, c):
    if "gate" in c.without:
        return (image + text) / 2, torch.full((len(image),), 0.5, dtype=x64)
    rows, gates = [], []
    for i, t in zip(image, text, strict=True):
        hidden = torch.cat((i, t))
        for layer in range(len(c.gate_hidden)):
            hidden = linear(p, f"gate.mlp.{3 * layer}", hidden).clamp(min=0)
        a = 1 / (1 + torch.exp(-linear(p, f"gate.mlp.{3 * len(c.gate_hidden)}", hidden)[0]))
        rows.append(a * i + (1 - a) * t)
        gates.append(a)
    return torch.stack(rows), torch.stack(gates)


def router(p, x, c):
    if c.router == "linear":
        return linear(p, "moe.router", x)
    return linear(
        p, "moe.router.4", norm(p, "moe.router.1", linear(p, "moe.router.0", x)).clamp(min=0)
    )


def expert(p, e, x, c):
    for layer in range(len(c.expert_hidden)):
        name = f"moe.experts.{layer}."
        x = p[name + "weight"][e] @ x + p[name + "bias"][e]
        x = normed(p[name + "norm_weight"][e], p[name + "norm_bias"][e], x).clamp(min=0)
    name = f"moe.experts.{len(c.expert_hidden)}."
    return p[name + "weight"][e] @ x + p[name + "bias"][e]


def moe(p, samples, c):
    """Return the class logits of each sample, and router logits and expert weights per token."""
    logits, scores, weights = [], [], []
    for tokens in samples:
        outputs = []
        for token in tokens:
            score = router(p, token, c)
            probability = softmax(score)
            chosen = sorted(range(c.num_experts), key=lambda e: -probability[e].item())[: c.top_k]
            # With top_k = 1, a renormalized weight would be constant and get no gradient.
            total = sum(probability[e] for e in chosen) if c.top_k > 1 else 1
            weight = {e: probability[e] / total for e in chosen}
            outputs.append(sum(weight[e] * expert(p, e, token, c) for e in chosen))
            scores.append(score)
            weights.append(
                torch.stack(
                    [weight.get(e, torch.zeros((), dtype=x64)) for e in range(c.num_experts)]
                )
            )
        logits.append(sum(outputs) / len(outputs))
    return torch.stack(logits), torch.stack(scores), torch.stack(weights)


def dense(p, samples, c):
    """Return the class logits of the classifier that replaces the router and the experts."""
    logits = []
    for tokens in samples:
        outputs = []
        for token in tokens:
            for layer in range(0, 4 * len(c.expert_hidden), 4):
                token = norm(
                    p, f"classifier.{layer + 1}", linear(p, f"classifier.{layer}", token)
                ).clamp(min=0)
            outputs.append(linear(p, f"classifier.{4 * len(c.expert_hidden)}", token))
        logits.append(sum(outputs) / len(outputs))
    return torch.stack(logits)


def moe_loss(scores, weights, c):
    tokens, experts = weights.shape
    z = sum(torch.log(torch.exp(s).sum()) ** 2 for s in scores) / tokens
    balance = 0
    for e in range(experts):
        if c.balance == "mse":
            balance = balance + (weights[:, e].sum() / tokens - 1 / experts) ** 2
        else:
            share = sum(1 for s in scores if s.argmax() == e) / tokens
            balance = balance + experts * share * sum(softmax(s)[e] for s in scores) / tokens
    return c.balance_weight * balance + c.z_weight * z


def contrastive_loss(image, text, present, c):
    pairs = [i for i, there in enumerate(present) if there]
    if len(pairs) < 2:
        return torch.zeros((), dtype=x64)

    def unit(x):
        x = sum(x) / len(x)
        return x / torch.sqrt((x * x).sum())

    images, texts, loss = [unit(image[i]) for i in pairs], [unit(text[i]) for i in pairs], 0
    for own, others in ((images, texts), (texts, images)):
        for i in range(len(pairs)):
            scores = torch.stack([own[i] @ other / c.temperature for other in others])
            loss = loss - torch.log(softmax(scores)[i]) / (2 * len(pairs))
    return loss


def transcription(p, batch, c) -> dict:
    image = text = gates = None
    size = len(batch["labels"])
    if c.modalities != "text":
        x = [
            x if there else x[:0]
            for x, there in zip(batch["image_tokens"], batch["image_present"], strict=True)
        ]
        image = [pooled(p, "image_transform", linear(p, "image_map", tokens), c) for tokens in x]
    if c.modalities != "image":
        real = ~batch["text_padding_mask"]
        if not c.text_mask:  # padded tokens take part in every text that has a token
            real = real.any(1, keepdim=True).expand(real.shape)
        text = [
            pooled(p, "text_transform", x[r], c)
            for x, r in zip(batch["text_tokens"], real, strict=True)
        ]
    contrastive = torch.zeros((), dtype=x64)
    if c.modalities == "both":
        fused, gates = zip(
            *(token_gate(p, i, t, c) for i, t in zip(image, text, strict=True)), strict=True
        )
        if "contrastive" not in c.without:
            contrastive = contrastive_loss(image, text, batch["image_present"] & real.any(1), c)
    else:
        fused = text if image is None else image
    if "bottleneck" not in c.without:
        fused = [q_transform(p, "bottleneck", f, c) for f in fused]
    if "moe" in c.without:
        logits, moe_term = dense(p, fused, c), torch.zeros((), dtype=x64)
    else:
        logits, scores, weights = moe(p, fused, c)
        moe_term = moe_loss(scores, weights, c)
    ce = (
        sum(
            -torch.log(softmax(row)[label])
            for row, label in zip(logits, batch["labels"], strict=True)
        )
        / size
    )
    out = {"logits": logits, "ce": ce, "contrastive": contrastive, "moe": moe_term}
    out["loss"] = sum(
        w * out[name] for w, name in zip(c.loss_weights, ("ce", "contrastive", "moe"), strict=True)
    )
    return out if gates is None or "gate" in c.without else {**out, "gate": torch.stack(gates)}
