"""A literal transcription of UniCA's equations in float64, and a small model with batches.

The functions loop over items, heads and tokens, without padding. ``p`` maps names to parameters,
and ``c`` is a UniCAConfig.
"""

import math

import torch

from mmfused.models.unica import UniCA, UniCAConfig

HOST = "text_encoder."


def linear(p, name, x):
    return torch.einsum("oi,...i->...o", p[name + ".weight"], x) + p[name + ".bias"]


def norm(p, name, x, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(eps).sqrt() * p[
        name + ".weight"
    ] + p[name + ".bias"]


def softmax(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def multi_head_attention(query, key, value, heads):
    """Compute multi-head attention of queries (L, D) over keys and values (N, D)."""
    size, rows = query.shape[1] // heads, []
    for q in query:
        parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
        rows.append(
            torch.cat(
                [
                    softmax(key[:, part] @ q[part] / math.sqrt(size)) @ value[:, part]
                    for part in parts
                ]
            )
        )
    return torch.stack(rows)


def embedded(p, x, position, c, token_type=True):
    """Return the host's input embedding of the vector ``x`` at ``position``."""
    place = p[HOST + "embeddings.position_embeddings.weight"][position]
    if c.text.get("model_type") == "xlm-roberta" and position == c.text["pad_token_id"]:
        place = place.detach()  # the position of PAD is not trained
    x = x + place
    if token_type:
        x = x + p[HOST + "embeddings.token_type_embeddings.weight"][0]
    return norm(p, HOST + "embeddings.LayerNorm", x, 1e-12)


def bert_layer(p, name, x, heads):
    q, k, v = (linear(p, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
    read = linear(p, name + ".attention.output.dense", multi_head_attention(q, k, v, heads))
    x = norm(p, name + ".attention.output.LayerNorm", x + read, 1e-12)
    added = linear(p, name + ".output.dense", gelu(linear(p, name + ".intermediate.dense", x)))
    return norm(p, name + ".output.LayerNorm", x + added, 1e-12)


def cross_attention(p, name, to, x, context, c):
    name = f"{name}.attention.{'to_a' if c.share_weights else to}."
    read = multi_head_attention(
        linear(p, name + "q_proj", x),
        *(linear(p, name + part, context) for part in ("k_proj", "v_proj")),
        c.num_heads,
    )
    return linear(p, name + "out_proj", read)


def feed_forward(p, name, x, c):
    def layers(x):
        return linear(p, name + ".layers.2", gelu(linear(p, name + ".layers.0", x)))

    if c.bica_norm == "pre":
        return x + layers(norm(p, name + ".norm", x, 1e-5))
    return norm(p, name + ".norm", x + layers(x), 1e-5)


def bica(p, name, image, text, c):
    def normed(side, x):
        return norm(p, f"{name}.attention.norm_{side}", x, 1e-5)

    if c.bica_norm == "pre":
        v, t = normed("a", image), normed("b", text)
        image, text = (
            image + cross_attention(p, name, "to_a", v, t, c),
            text + cross_attention(p, name, "to_b", t, v, c),
        )
    else:
        read = (
            cross_attention(p, name, "to_a", image, text, c),
            cross_attention(p, name, "to_b", text, image, c),
        )
        image, text = normed("a", image + read[0]), normed("b", text + read[1])
    if "ffn" in c.without:
        return image, text
    return feed_forward(p, name + ".image_ffn", image, c), feed_forward(
        p, name + ".text_ffn", text, c
    )


def unit(x):
    return x / torch.sqrt((x * x).sum())


def embed(p, image, ids, c):
    """Return the embedding of one item.

    ``image``: (N, image_dim) or None. ``ids``: token ids with [CLS] and [SEP], or None.
    """
    at = 0  # the position of [CLS]
    if image is None and c.text.get("model_type") == "xlm-roberta":
        at = c.text["pad_token_id"] + 1
    start = at if image is None else len(image)
    word = p[HOST + "embeddings.word_embeddings.weight"]
    first, *rest = c.empty_text if ids is None else ids
    first = embedded(p, word[first], at, c)
    text = torch.stack([embedded(p, word[token], start + 1 + i, c) for i, token in enumerate(rest)])
    if image is None:
        x = torch.cat((first[None], text))
    else:
        image = torch.stack(
            [
                embedded(p, linear(p, "visual_proj", patch), 1 + n, c, c.image_token_type)
                for n, patch in enumerate(image)
            ]
        )
        if ids is not None and "bica" not in c.without:
            for block in range(c.blocks):
                image, text = bica(p, f"bica.{block}", image, text, c)
        x = torch.cat((first[None], image, text))
    for layer in range(c.text["num_hidden_layers"]):
        x = bert_layer(p, f"{HOST}encoder.layer.{layer}", x, c.text["num_attention_heads"])
    return unit(x[0])


def embeddings(p, items, c):
    """Return the embeddings (B, D) of each view."""
    views = {"image": [], "text": [], "both": []}
    for row in range(len(items["labels"])):
        image = items["image_tokens"][row] if items["image_present"][row] else None
        ids = items["input_ids"][row][items["attention_mask"][row] == 1].tolist()
        ids = ids if len(ids) > 2 else None
        views["image"].append(embed(p, image, None, c))
        views["text"].append(embed(p, None, ids, c))
        if "fusion" not in c.without:
            views["both"].append(embed(p, image, ids, c))
        elif image is None or ids is None:
            views["both"].append(views["image" if ids is None else "text"][-1])
        else:
            views["both"].append(unit(views["image"][-1] + views["text"][-1]))
    return {view: torch.stack(rows) for view, rows in views.items()}


def losses(query, candidate, labels, c):
    """Return the losses. ``labels``: two lists, the labels of the queries and of the candidates.

    Candidate i is the positive of query i. Hard negatives are the last candidates.
    """
    info_nce = similarity_loss = 0
    for i, q in enumerate(query):
        positive = q @ candidate[i]
        total = torch.exp(positive / c.temperature)
        for j, other in enumerate(candidate):
            if j != i and (labels[1][j] != labels[0][i] or c.same_id == "ignore"):
                total = total + torch.exp(q @ other / c.temperature)
        info_nce = info_nce - torch.log(torch.exp(positive / c.temperature) / total) / len(query)
        similarity_loss = similarity_loss + (1 - positive) / len(query)
    weight = 0 if "positive_similarity" in c.without else c.positive_weight
    return {
        "loss": info_nce + weight * similarity_loss,
        "info_nce": info_nce,
        "positive_similarity": similarity_loss,
    }


def transcription(p, parts, c):
    """Return the losses, and the embeddings of the queries."""
    encoded = {role: embeddings(p, items, c) for role, items in parts.items()}
    roles = (
        ["candidate"]
        if "hard_negatives" in c.without or "negative" not in parts
        else ["candidate", "negative"]
    )
    candidate = torch.cat([encoded[role]["both"] for role in roles])
    labels = (
        parts["query"]["labels"].tolist(),
        torch.cat([parts[role]["labels"] for role in roles]).tolist(),
    )
    return losses(encoded["query"]["both"], candidate, labels, c), encoded["query"]


# --- a small model, and items ---

BERT = {
    "vocab_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
XLM_R = {**BERT, "model_type": "xlm-roberta", "pad_token_id": 1, "type_vocab_size": 1}
SMALL = {
    "text": BERT,
    "text_dim": 12,
    "image_dim": 10,
    "num_heads": 3,
    "ffn": 18,
    "dropout": 0.0,
    "temperature": 0.2,
}


def random_model(**options) -> UniCA:
    """Return a float64 model with random parameters and no image encoder."""
    model = UniCA(UniCAConfig(**{**SMALL, **options})).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        )
    return model


def token_part(seed=2, batch=6, images=3, length=6, labels=None) -> dict:
    """Return image tokens and token ids of texts with unequal lengths.

    Item 1 has no image, item 2 no text, and item 3 neither.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 4, 2, 2, 3, 5])[:batch]
    ids = torch.randint(4, 20, (batch, length), generator=generator)
    ids[:, 0] = 2
    return {
        "image_tokens": torch.randn(batch, images, 10, generator=generator, dtype=torch.float64),
        "input_ids": ids.scatter(1, lengths[:, None] - 1, 3),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "image_present": (torch.arange(batch) != 1) & (torch.arange(batch) != 3),
        "labels": torch.arange(batch) if labels is None else torch.tensor(labels),
    }


def token_batch() -> dict:
    """Return a batch.

    Queries 0 and 4 have the same product. Query 1 and negative 5 have the same product.
    """
    return {
        "query": token_part(2, labels=[0, 1, 2, 3, 0, 5]),
        "candidate": token_part(3, labels=[0, 1, 2, 3, 0, 5]),
        "negative": token_part(4, labels=[6, 7, 8, 9, 10, 1]),
    }


def without_labels(items: dict) -> dict:
    return {name: value for name, value in items.items() if name != "labels"}


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
