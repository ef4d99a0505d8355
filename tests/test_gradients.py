"""Tests that GradCache and averaging over ranks give the gradient of the whole batch."""

import os
import tempfile
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mmfused import masked_info_nce
from mmfused.distributed import gather_rows
from mmfused.losses import unit_rows
from mmfused.models.retrieval import RetrievalModel, RetrievalOutput
from mmfused.training.gradients import add_cached_gradients, add_gradients, average_gradients


class Toy(RetrievalModel):
    """A model of two layers with dropout in between, and a penalty that is a mean over items."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 7), nn.GELU(), nn.Dropout(dropout), nn.Linear(7, 4)
        )
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.double()

    def encode(self, role, *, x, labels):
        y = self.frozen(self.layers(x))
        return {"embedding": unit_rows(y), "labels": labels, "penalty": y.square().mean()}

    def compare(self, query, candidate, negative=None):
        keys = {
            "query_id": gather_rows(query["labels"]),
            "candidate_id": gather_rows(candidate["labels"]),
        }
        parts = [candidate["embedding"]] + ([] if negative is None else [negative["embedding"]])
        if negative is not None:
            keys["candidate_id"] = torch.cat(
                [keys["candidate_id"], gather_rows(negative["labels"])]
            )
        query_rows, candidates = (
            gather_rows(query["embedding"]),
            torch.cat([gather_rows(part) for part in parts]),
        )
        contrastive = masked_info_nce(query_rows, candidates, temperature=0.2, **keys)
        penalty = query["penalty"] + 0.5 * candidate["penalty"]
        return RetrievalOutput(
            contrastive + 0.3 * penalty, {"contrastive": contrastive, "penalty": penalty}
        )


def batch(count=11, negatives=True):
    generator = torch.Generator().manual_seed(1)
    roles = ("query", "candidate", "negative") if negatives else ("query", "candidate")
    x = {role: torch.randn(count, 5, generator=generator, dtype=torch.float64) for role in roles}
    labels = torch.arange(count)
    return {
        role: {"x": x[role], "labels": labels + (100 if role == "negative" else 0)}
        for role in roles
    }


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 4, 11, 20])
@pytest.mark.parametrize("negatives", [False, True])
def test_cached_gradients_match_the_gradients_of_the_whole_batch(chunk, negatives):
    whole, cached = Toy(), Toy()
    loss, terms = add_gradients(whole, [batch(negatives=negatives)], 1)
    cached_loss, cached_terms = add_cached_gradients(cached, batch(negatives=negatives), chunk)
    torch.testing.assert_close(cached_loss, loss)
    torch.testing.assert_close(cached_terms, terms)
    assert (
        gradients(whole).keys()
        == gradients(cached).keys()
        == {f"layers.{i}.{p}" for i in (0, 3) for p in ("weight", "bias")}
    )
    torch.testing.assert_close(gradients(cached), gradients(whole), rtol=1e-10, atol=1e-12)


def test_cached_gradients_recompute_the_same_dropout():
    model, literal = Toy(dropout=0.5), Toy(dropout=0.5)
    torch.manual_seed(5)
    add_cached_gradients(model, batch(), 4)
    after = torch.rand(3)
    torch.manual_seed(5)
    parts = {}
    for role, items in batch().items():  # the same chunks, in one graph
        found = [
            literal.encode(role, x=x, labels=y)
            for x, y in zip(items["x"].split(4), items["labels"].split(4), strict=True)
        ]
        parts[role] = {
            name: torch.cat([part[name] for part in found]) for name in ("embedding", "labels")
        }
        parts[role]["penalty"] = sum(
            part["penalty"] * n / 11 for part, n in zip(found, (4, 4, 3), strict=True)
        )
    literal.compare(**parts).loss.backward()
    torch.testing.assert_close(gradients(model), gradients(literal), rtol=1e-10, atol=1e-12)
    assert torch.equal(after, torch.rand(3))  # both leave the generator in the same state


def rank_main(rank, world, path, chunk, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    model = Toy()
    local_batch = {
        role: {name: value[rank * 4 : (rank + 1) * 4] for name, value in items.items()}
        for role, items in batch(8).items()
    }
    if chunk:
        add_cached_gradients(model, local_batch, chunk)
    else:
        add_gradients(model, [local_batch], 1)
    if rank == 1:
        model.layers[3].bias.grad = None  # a rank may lack a gradient that other ranks have
    average_gradients(model)
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("chunk", [None, 3])
def test_two_ranks_give_the_gradient_of_one_process(chunk, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (2, f"{folder}/store", chunk, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    whole = Toy()
    add_gradients(whole, [batch(8)], 1)
    expected = gradients(whole)
    for name, value in found[0].items():
        if name != "layers.3.bias":
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


class WithoutNegatives(Toy):
    """A model whose loss has no gradient for negatives, as in UNITE's first stage."""

    def compare(self, query, candidate, negative=None):
        return super().compare(query, candidate)


@pytest.mark.parametrize("model", [Toy, WithoutNegatives])
def test_one_chunk_at_a_time_is_on_the_device(monkeypatch, model):
    """Chunks of a batch of 96 items are copied, encoded and dropped before the next is copied."""
    alive, most = weakref.WeakSet(), []

    def copy(part, device):
        copied = {name: tensor.clone() for name, tensor in part.items()}
        alive.add(copied["x"])
        most.append(len(alive))
        return copied

    monkeypatch.setattr("mmfused.training.gradients.to_device", copy)
    whole, cached = model(), model()
    add_cached_gradients(cached, batch(96), 8)
    assert len(most) == 2 * 3 * 12 and max(most) == 1
    monkeypatch.undo()
    add_gradients(whole, [batch(96)], 1)
    torch.testing.assert_close(gradients(cached), gradients(whole), rtol=1e-10, atol=1e-12)


def test_a_part_is_split_into_rows_of_every_tensor():
    items = {"x": torch.arange(10).view(5, 2), "labels": torch.arange(5), "absent": None}
    chunks = Toy().split(items, 2)
    assert [chunk["labels"].tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert [chunk["x"].shape[0] for chunk in chunks] == [2, 2, 1]
    assert all(chunk["absent"] is None for chunk in chunks)
    (empty,) = Toy().split({name: x if x is None else x[:0] for name, x in items.items()}, 2)
    assert empty["x"].shape == (0, 2) and empty["absent"] is None


class Unequal(Toy):
    """A model whose chunks are of unequal sizes, as with pictures of many sizes."""

    def split(self, items, size):
        sizes = [1, size, len(items["labels"]) - size - 1]
        columns = {name: value.split(sizes) for name, value in items.items()}
        return [{name: parts[i] for name, parts in columns.items()} for i in range(3)]


def test_a_model_may_split_its_items_into_chunks_of_unequal_sizes():
    whole, cached = Toy(), Unequal()
    loss, _ = add_gradients(whole, [batch()], 1)
    torch.testing.assert_close(add_cached_gradients(cached, batch(), 7)[0], loss)
    torch.testing.assert_close(gradients(cached), gradients(whole), rtol=1e-10, atol=1e-12)
