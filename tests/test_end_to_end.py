"""The ops' share of a whole training step is counted exactly, and the page shows the results."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import mmfused
from mmfused.testing import saved_bytes
from mmfused.tools import end_to_end, end_to_end_tables
from mmfused.tools.end_to_end_count import Counter, counted
from mmfused.tools.end_to_end_steps import SETUPS

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "end_to_end"


def test_bytes_of_an_op_are_its_inputs_and_outputs():
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    with Counter() as counter:
        x.T @ x.view(3, 4).detach()  # views move nothing
    assert (counter.flops, counter.bytes) == (2 * 4 * 3 * 4, 4 * (12 + 12 + 16))
    with Counter() as counter:
        x.add_(1.0)  # read and written
        torch.empty_like(w).copy_(w)
        x.expand(7, 3, 4)[0] * 2
    assert (counter.flops, counter.bytes) == (0, 4 * (2 * 12 + 2 * 20 + 2 * 12))


def test_saved_bytes_on_fake_tensors():
    def saved(count) -> int:
        pool = mmfused.QueryPooling(16, 3, 2, bias=True)
        x = torch.randn(4, 5, 16, requires_grad=True)
        return count(lambda: pool(x), [x, *pool.parameters()])

    real = saved(lambda run, ignored: saved_bytes(run, tuple(ignored)))
    with end_to_end.fake():
        assert saved(lambda run, ignored: counted(run, ignored)["saved"]) == real > 0


@pytest.mark.parametrize("variant", ["published", "tokens"])
def test_flops_of_query_pooling_in_fluid(variant):
    found = end_to_end.count("fluid", end_to_end.BASELINE, variant, "tiny")
    batch, dim, queries, image, text = 128, 128, 8, 17, 16
    # With precomputed tokens, their gradient is not computed.
    passes = 3 if variant == "published" else 2
    pooling = 0
    for length, tokens, products in ((queries, image, passes), (queries, text, passes), (2, 8, 3)):
        pooling += 3 * 2 * length * dim * dim  # the queries' projection
        pooling += products * 2 * batch * tokens * dim * 2 * dim  # keys and values
        pooling += 3 * 2 * batch * length * dim * dim  # the output's projection
        # attention: two products, and five in its backward, which computes the logits again
        pooling += 7 * 2 * batch * length * tokens * dim
    phase = found["compare"][128]
    assert phase["ops"]["query pooling"]["flops"] == pooling
    assert 0 < pooling < phase["whole"]["flops"]
    encoders = [found["encode"][size]["whole"]["flops"] for size in (1, 2)]
    assert encoders[1] == 2 * encoders[0]
    assert (encoders[0] > 0) == (variant == "published")


def test_flops_of_the_loss_in_unite():
    found = end_to_end.count("unite", end_to_end.BASELINE, "tokens", "tiny")
    batch, dim = SETUPS["unite"].batch, 128
    # One product forward and two backward; positives and hard negatives are candidates.
    flops = 3 * 2 * batch * 2 * batch * dim
    assert found["compare"][batch]["ops"]["InfoNCE"]["flops"] == flops
    assert found["compare"][batch]["whole"]["flops"] == flops
    assert found["parameters"]["trained"] < found["parameters"]["all"]  # LoRA


def test_times_of_both_backends(monkeypatch):
    monkeypatch.setattr(end_to_end, "STATES", 1 << 10)
    found = end_to_end.timed("uniecs", 1, "tiny")
    assert found["adamw_per_parameter"] > 0
    for backend, samples in found["samples"].items():
        (encode,), (compare,) = samples["encode"]["1+1"], samples["compare"]["all"]
        assert encode["ops"]["cross-attention"] > 0 and compare["ops"]["InfoNCE"] > 0
        if backend == end_to_end.BASELINE:
            assert encode["whole"] > 0 and compare["whole"] > 0


@pytest.mark.parametrize("name", SETUPS)
def test_shares_of_the_committed_results(name):
    record = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    assert record["setup"] == json.loads(json.dumps(end_to_end.facts_of(name)))
    shares = end_to_end_tables.shares(record)
    assert all(0 < share < 1 for share in shares.values())
    for variant, backends in record["counted"]["variants"].items():
        assert set(backends) == set(end_to_end.variants_of(name)[variant])
        kept = end_to_end_tables.memory(record, variant)
        assert 0 <= kept["ops"] <= kept["activations"]
        assert kept["saving"] <= kept["activations"]
