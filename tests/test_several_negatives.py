"""The losses of UNITE and UniCA with several hard negatives for each query."""

import pytest
import torch
from pair_folders import mmeb_row, picture, write
from retrieval_models import small_model, tokenizer_of

from mmfused.data import Collate
from mmfused.data.pair_batches import PairSetBatches
from mmfused.data.pair_formats import open_pairs
from mmfused.models import UNITEProcessor

ROWS, NUMBER, SIZE = 5, 3, 8
LABELS = {
    "query": [0, 1, 2, 1, 4],  # queries 1 and 3 have one product
    "candidate": [0, 1, 2, 1, 4],
    "negative": [*[5, 6, 7], *[2, 8, 9], *[5, 0, 1], *[10, 11, 12], *[13, 14, 15]],
}
CODES = [1, 3, 1, 3, 2]


def plain_loss(name, config, rows, labels, codes):
    """Return the loss of unit rows; ``codes`` are those of the candidates."""
    query, candidate, negative = rows
    everything = torch.cat([candidate, negative])
    products = [*labels["candidate"], *labels["negative"]]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(query)):
        scores = [query[i] @ other / config.temperature for other in everything]
        seen = [
            j
            for j in range(len(everything))
            if j == i
            or (
                products[j] != labels["query"][i]
                and (name == "unica" or j >= len(query) or codes[j] == codes[i])
            )
        ]
        total = total - torch.log(torch.exp(scores[i]) / sum(torch.exp(scores[j]) for j in seen))
        if name == "unica":
            total = total + config.positive_weight * (1 - query[i] @ candidate[i])
    return total / len(query)


@pytest.mark.parametrize("name", ["unite", "unica"])
def test_the_loss_and_its_gradient(name):
    model = small_model(name).double()
    model.config.temperature = 0.3
    if name == "unica":
        model.info_nce.temperature = 0.3
    generator = torch.Generator().manual_seed(0)
    counts = {"query": ROWS, "candidate": ROWS, "negative": NUMBER * ROWS}
    rows, parts = [], {}
    for role, count in counts.items():
        values = torch.randn(count, SIZE, dtype=torch.float64, generator=generator)
        rows.append(torch.nn.functional.normalize(values).requires_grad_())
        parts[role] = {"embedding": rows[-1], "labels": torch.tensor(LABELS[role])}
        parts[role]["code"] = torch.tensor(CODES if count == ROWS else CODES * NUMBER)
    loss = model.compare(**parts).loss
    found = torch.autograd.grad(loss, rows)
    expected = plain_loss(name, model.config, rows, LABELS, CODES)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for left, right in zip(found, torch.autograd.grad(expected, rows), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["unite", "unica"])
def test_batches_of_pairs_with_several_negatives(name, tmp_path):
    rows = []
    for number in range(6):
        picture(tmp_path / f"{number}.png", 30 * number, (40, 32))
        texts = (f"<|image_1|>\nmug {number}", f"plate {number}", [f"jar {number}", "fork"])
        rows.append(mmeb_row(*texts, (f"{number}.png", "", "")))
    pairs = open_pairs(write(tmp_path / "rows.json", rows))
    model, tokenizer = small_model(name).double(), tokenizer_of(name)
    reader = Collate(tokenizer, 32, 16)
    if name == "unite":
        reader = UNITEProcessor(tokenizer, model.config, picture_tokens=(4, 16))
    batches = PairSetBatches(pairs, reader, 4, num_negatives=NUMBER)
    for at in range(2):  # batches of three queries
        batch = batches.batch(0, at)
        for part in batch.values():
            if "pixel_values" in part:
                part["pixel_values"] = part["pixel_values"].double()
        encoded = {role: model.encode(role, **part) for role, part in batch.items()}
        embeddings = [part["embedding"] for part in encoded.values()]
        assert [len(part) for part in embeddings] == [3, 3, 9]
        labels = {role: part["labels"].tolist() for role, part in batch.items()}
        codes = encoded["candidate"].get("code", torch.zeros(3)).tolist()
        expected = plain_loss(name, model.config, embeddings, labels, codes)
        assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-9)
        for row, label in enumerate(labels["query"]):
            assert label not in labels["negative"][NUMBER * row : NUMBER * (row + 1)]
        # "fork" is a negative of all queries.
        assert max(labels["negative"].count(label) for label in labels["negative"]) >= 3
