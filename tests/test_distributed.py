"""Tests that 1 to 3 gloo processes give the loss and gradients of one process on all rows.

test_distributed_refusals.py tests invalid inputs and settings that differ between ranks.
"""

import os
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmfused
from mmfused import MaskedInfoNCE

# number of ranks -> splits; a split holds (number of queries, number of candidates) of each rank
SPLITS = {
    1: [[(11, 14)]],
    2: [[(7, 8), (4, 6)], [(0, 0), (5, 6)], [(5, 6), (0, 2)]],
    3: [[(2, 2), (6, 9), (3, 3)], [(0, 3), (6, 9), (0, 0)]],
}
CASES = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "keys": {"symmetric": True, "positive_weight": 0.3},
    "ids": {"same_id": "mean", "symmetric": True, "label_smoothing": 0.1},
    "weighted": {},
}
BACKENDS = {"composed": (torch.float64, 1e-11), "fused": (torch.float32, 1e-5)}
RUNS = [(case, "composed") for case in CASES]
if not torch.cuda.is_available():  # few cases, because the Triton interpreter is slow
    RUNS += [("keys", "fused"), ("ids", "fused")]


class Towers(nn.Module):
    """Two linear towers and the loss, whose temperature is learned."""

    def __init__(self, gather, options):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.candidate = nn.Linear(9, 6), nn.Linear(10, 6)
        self.loss = MaskedInfoNCE(0.2, learnable_temperature=True, gather=gather, **options)

    def forward(self, query, candidate, **keys):
        return self.loss(self.query(query), self.candidate(candidate), **keys)


def batch_of_rank(case: str, split: list, rank: int) -> tuple:
    """Return this rank's rows of a fixed batch.

    Candidate i of a rank is the positive of the rank's query i. Extra candidates have no query.
    """
    queries, candidates = split[rank]
    generator = torch.Generator().manual_seed(100 + rank)
    data = [
        torch.randn(n, width, generator=generator, dtype=torch.float64)
        for n, width in ((queries, 9), (candidates, 10))
    ]
    keys = {}
    draw = lambda n, high, low=0: torch.randint(low, high, (n,), generator=generator)  # noqa: E731
    if case == "keys":
        keys = {"query_key": draw(queries, 3), "candidate_key": draw(candidates, 3, -1)}
    if case == "ids":
        keys = {"candidate_id": draw(candidates, 6)}
    if case == "weighted":
        keys = {"row_weight": torch.rand(queries, generator=generator, dtype=torch.float64)}
    return (*data, keys)


def whole_batch(case: str, split: list) -> tuple:
    """Concatenate the batches of all ranks; the extra candidates come after all positives."""
    parts = [batch_of_rank(case, split, rank) for rank in range(len(split))]
    sizes = [queries for queries, _ in split]

    def reorder(tensors):
        return torch.cat(
            [t[:n] for t, n in zip(tensors, sizes, strict=True)]
            + [t[n:] for t, n in zip(tensors, sizes, strict=True)]
        )

    keys = {
        name: torch.cat([p[2][name] for p in parts])
        for name in parts[0][2]
        if not name.startswith("candidate")
    }
    keys |= {
        name: reorder([p[2][name] for p in parts])
        for name in parts[0][2]
        if name.startswith("candidate")
    }
    return torch.cat([p[0] for p in parts]), reorder([p[1] for p in parts]), keys


def run_rank(rank: int, splits: list, folder: str):
    warnings.simplefilter("error", FutureWarning)  # torch gives it for collectives it renamed
    store = dist.FileStore(os.path.join(folder, "store"), len(splits[0]))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(splits[0]))
    torch.save([results_of(rank, split) for split in splits], os.path.join(folder, f"rank{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def results_of(rank: int, split: list) -> dict:
    results = {}
    for case, backend in RUNS:
        dtype = BACKENDS[backend][0]
        model = DistributedDataParallel(Towers("global", CASES[case]).to(dtype))
        query, candidate, keys = batch_of_rank(case, split, rank)
        with mmfused.backend(backend):
            loss = model(query.to(dtype), candidate.to(dtype), **keys)
            loss.backward()
        assert split[rank][0] or loss == 0  # the loss of a rank without queries is 0
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        results[case, backend] = [mean / len(split), *(p.grad for p in model.parameters())]
    local = Towers("local", {}).double()
    query, candidate, _ = batch_of_rank("plain", split, rank)
    loss = local(query, candidate)
    loss.backward()
    results["local"] = [loss.detach(), *(p.grad for p in local.parameters())]
    return results


@pytest.fixture(scope="module", params=sorted(SPLITS))
def ranks(request):
    splits = SPLITS[request.param]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(splits, folder), nprocs=request.param)
        results = [torch.load(os.path.join(folder, f"rank{rank}")) for rank in range(request.param)]
        yield list(zip(splits, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_global_gather_matches_one_process(ranks, case, backend):
    dtype, tolerance = BACKENDS[backend]
    for split, results in ranks:
        model = Towers(None, CASES[case]).double()
        query, candidate, keys = whole_batch(case, split)
        loss = model(query, candidate, **keys)
        loss.backward()
        for rank in results:
            for got, want in zip(
                rank[case, backend],
                [loss.detach(), *(p.grad for p in model.parameters())],
                strict=True,
            ):
                assert got.dtype == dtype and (got - want).norm() <= tolerance * max(
                    want.norm(), 1
                ), (case, split)


def test_local_gather_treats_candidates_of_other_ranks_as_constants(ranks):
    for split, results in ranks:
        check_local(split, results)


def check_local(split: list, results: list):
    query, candidate, _ = whole_batch("plain", split)
    first, extra = 0, sum(queries for queries, _ in split)
    for rank, (queries, candidates) in enumerate(split):
        model = Towers(None, {"reduction": "none"}).double()
        own, more = slice(first, first + queries), slice(extra, extra + candidates - queries)
        first, extra = own.stop, more.stop
        mine = torch.zeros(len(candidate), 1, dtype=torch.bool)
        mine[own], mine[more] = True, True
        c = model.candidate(candidate)
        loss = (
            model.loss(model.query(query), torch.where(mine, c, c.detach()))[own].sum()
            * len(split)
            / len(query)
        )
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for got, want in zip(results[rank]["local"], [loss.detach(), *gradients], strict=True):
            assert (got - want).norm() <= 1e-11 * max(want.norm(), 1)
