"""Tests that an error on one gloo process raises on all processes, which can then continue.

The file also tests the selection bias with several ranks. The processes are started once for all
cases, because their start is slow.
"""

import contextlib
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mmfused
from mmfused import MaskedInfoNCE, TopKMoE
from mmfused.distributed import gather_rows, reported
from mmfused.ops.masked_info_nce import loss_over_ranks

WORLDS = (2, 3)
TIME_LIMIT = 20  # seconds for all ranks to raise
KILL_AFTER = 120  # seconds until hanging processes are killed
UMLAUTS = "ü" * 3000  # longer than what other ranks quote


def batch(rank: int) -> dict:
    generator = torch.Generator().manual_seed(rank)
    query, candidate = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (4, 6))
    return {"query": query, "candidate": candidate, "temperature": 0.2}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# message -> (the arguments that the last rank changes, the type of the last rank's error)
INVALID = {
    "query: got None, expected a torch.Tensor": ({"query": None}, TypeError),
    "candidate: got a list, expected a torch.Tensor": ({"candidate": [1.0]}, TypeError),
    "candidate: got dtype torch.float32, expected torch.float64 as query has": (
        {"query": torch.randn(4, 8).double()},
        TypeError,
    ),
    "query: got shape (4,), expected (rows, dim) with dim above 0": (
        {"query": torch.randn(4)},
        ValueError,
    ),
    "candidate: got shape (6, 0), expected (rows, dim) with dim above 0": (
        {"candidate": torch.randn(6, 0)},
        ValueError,
    ),
    "candidate: got dim 7, expected 8 as query has": (
        {"candidate": torch.randn(6, 7)},
        ValueError,
    ),
    "candidate: got 3 rows, expected at least 4 as query has, or a target": (
        {"candidate": torch.randn(3, 8)},
        ValueError,
    ),
    "candidate: got 0 rows, expected at least one, as query has 4": (
        {"candidate": torch.randn(0, 8), "target": ints(0, 0, 0, 0)},
        ValueError,
    ),
    "target: got a value outside [0, 6)": ({"target": ints(0, 1, 2, 6)}, ValueError),
    "target: got dtype torch.float32, expected torch.int64": (
        {"target": torch.zeros(4)},
        TypeError,
    ),
    "query_key: got a tensor without candidate_key": ({"query_key": ints(0, 1, 2, 3)}, ValueError),
    "candidate_key: got shape (2,), expected (6,)": ({"candidate_key": ints(0, 1)}, ValueError),
    "candidate_key: got a value below -1": (
        {"candidate_key": ints(0, 1, 2, 3, 4, -2)},
        ValueError,
    ),
    "row_weight: got a negative number": (
        {"row_weight": torch.tensor([1.0, 1.0, 1.0, -1.0])},
        ValueError,
    ),
    "row_weight: got shape (3,), expected (4,)": ({"row_weight": torch.ones(3)}, ValueError),
    "temperature: got 0, expected a number above 0": ({"temperature": 0}, ValueError),
    "temperature: got a number not above 0": (
        {"temperature": torch.tensor(-1.0)},
        ValueError,
    ),
    "same_id: got 'ü": ({"same_id": UMLAUTS}, ValueError),
    "label_smoothing: got 2": ({"label_smoothing": 2}, ValueError),
    "symmetric: got True with a target": (
        {"symmetric": True, "target": ints(0, 1, 2, 3)},
        ValueError,
    ),
    "gather: got backend 'reference'": ({"backend": "reference"}, RuntimeError),
    "unexpected keyword argument 'margin'": ({"margin": 1}, TypeError),
}
KEYS, IDS = {"candidate_key": ints(0, 0, 1, 1, 0, 0)}, {"candidate_id": ints(0, 1, 2, 3, 4, 5)}
NEEDED, NOT_NEEDED = "needed", "not needed (no_grad, or frozen)"
# setting -> (arguments of all ranks, arguments that the last rank changes, value of the setting on
# rank 0, value on the last rank)
DIFFERENT = {
    "dtype": (
        {},
        {"query": torch.randn(4, 8).double(), "candidate": torch.randn(6, 8).double()},
        "torch.float32",
        "torch.float64",
    ),
    "dtype under autocast": ({}, {"autocast": True}, "torch.float32", "torch.bfloat16"),
    "dim": ({}, {"query": torch.randn(4, 9), "candidate": torch.randn(6, 9)}, "8", "9"),
    "gather": ({}, {"share_gradients": False}, "'global'", "'local'"),
    "symmetric": ({}, {"symmetric": True}, "False", "True"),
    "same_id": (IDS, {"same_id": "mean"}, "'drop'", "'mean'"),
    "temperature": ({}, {"temperature": 0.3}, "0.2", "0.3"),
    "temperature, learned": (
        {"temperature": torch.tensor(0.2)},
        {"temperature": 0.2},
        "a tensor",
        "0.2",
    ),
    "candidate_key": (KEYS, {"candidate_key": None}, "given", "None"),
    "candidate_id": ({}, IDS, "None", "given"),
    "row_weight": ({}, {"row_weight": torch.ones(4)}, "None", "given"),
    "label_smoothing": ({}, {"label_smoothing": 0.5}, "0.0", "0.5"),
    "candidate's gradient": ({}, {"candidate": torch.randn(6, 8)}, NEEDED, NOT_NEEDED),
    "candidate's gradient under no_grad": ({}, {"no_grad": True}, NEEDED, NOT_NEEDED),
    "the loss's gradient": (
        {"symmetric": True, "candidate": torch.randn(6, 8)},
        {"query": torch.randn(4, 8)},
        NEEDED,
        NOT_NEEDED,
    ),
    "the call": (
        {},
        {"call": lambda query, **_: gather_rows(query)},
        "masked_info_nce",
        "gather_rows",
    ),
}
# case -> (rows of the other ranks, rows of the last rank, the message on all ranks)
GATHER_ERRORS = {
    "shape": (
        torch.zeros(2, 3),
        torch.zeros(2, 4),
        "a row's shape: got (3,) on rank 0 and (4,) on rank",
    ),
    "dtype": (
        torch.zeros(2, 3),
        torch.zeros(2, 3).double(),
        "dtype: got torch.float32 on rank 0 and torch.float64 on rank",
    ),
    "gradient": (
        torch.zeros(2, 3),
        torch.zeros(2, 3).requires_grad_(),
        f"the rows' gradient: got {NOT_NEEDED} on rank 0 and needed on",
    ),
    "scalar": (torch.zeros(2, 3), torch.zeros(()), "x: got a scalar, expected (rows, ...)"),
}


def loss_of(
    query,
    candidate,
    *,
    share_gradients=True,
    backend="auto",
    autocast=False,
    no_grad=False,
    call=loss_over_ranks,
    **rest,
):
    with contextlib.ExitStack() as stack:
        stack.enter_context(mmfused.backend(backend))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
        stack.enter_context(torch.set_grad_enabled(not no_grad))
        return call(query=query, candidate=candidate, share_gradients=share_gradients, **rest)


def run_rank(rank: int, world: int, folder: str):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    is_last, results = rank == world - 1, {}

    def outcome(name, call):
        """Store the call's error and duration, then the loss and gradient of a valid call."""
        start, error = time.monotonic(), None
        try:
            call()
        except Exception as caught:
            error = (type(caught).__name__, str(caught))
        seconds = time.monotonic() - start
        good = batch(rank)
        loss = loss_of(**good)
        loss.backward()
        results[name] = (error, seconds, loss.detach(), good["candidate"].grad)

    outcome("good", lambda: None)
    for name, (change, _) in INVALID.items():
        outcome(name, lambda change=change: loss_of(**batch(rank) | (change if is_last else {})))
    for name, (everywhere, change, *_) in DIFFERENT.items():
        outcome(
            name,
            lambda e=everywhere, change=change: loss_of(
                **batch(rank) | e | (change if is_last else {})
            ),
        )
    for name, (x, last, _) in GATHER_ERRORS.items():
        outcome(f"gather_rows {name}", lambda x=x, last=last: gather_rows(last if is_last else x))
    outcome("no rows", lambda: loss_of(torch.randn(0, 8), torch.randn(rank, 8), temperature=0.2))
    outcome(
        "module",
        lambda: MaskedInfoNCE(gather="global")(
            None if is_last else torch.randn(4, 8), torch.randn(4, 8)
        ),
    )
    outcome("model", lambda: fail_in_a_model(is_last))
    outcome(
        "several", lambda: loss_of(**batch(rank) | {"temperature": 0.2 if rank == 0 else -rank})
    )
    results["gathered"] = [gather_rows(torch.full((rows, 2), rank)) for rows in (rank, 0)]
    results["bias"] = biases(rank, world)
    torch.save(results, os.path.join(folder, f"rank{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def fail_in_a_model(is_last: bool):
    """On the last rank, raise as a model's loss does. On the other ranks, start an exchange."""
    if is_last:
        raise reported("Model", ValueError("negative: got None, expected one"), None)
    return gather_rows(torch.zeros(2, 3))


@pytest.fixture(scope="module", params=WORLDS)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(run_rank, (request.param, str(folder)), nprocs=request.param, join=False)
    end = time.monotonic() + KILL_AFTER
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the ranks hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{rank}") for rank in range(request.param)]


def errors(results: list, name: str) -> list[tuple[str, str]]:
    """Return the error of each rank.

    Check that each rank finished within the time limit and then computed the valid loss.
    """
    for rank in results:
        _, seconds, loss, gradient = rank[name]
        assert seconds < TIME_LIMIT
        assert torch.equal(loss, rank["good"][2]) and torch.equal(gradient, rank["good"][3])
    return [rank[name][0] for rank in results]


def check_refusal(found: list, op: str, kind: str, message: str):
    """Check the last rank's error. The other ranks must quote this error and name the last rank."""
    *others, (own_kind, own) = found
    assert own_kind == kind and message in own
    quoted = own.removeprefix(f"{op}: ").encode()[:4096].decode(errors="replace")
    assert others == [("RuntimeError", f"{op}: rank {len(others)} failed: {quoted}")] * len(others)


@pytest.mark.parametrize("message", INVALID)
def test_invalid_input_on_one_rank_raises_on_all_ranks(results, message):
    check_refusal(
        errors(results, message), "masked_info_nce", INVALID[message][1].__name__, message
    )


@pytest.mark.parametrize("name", DIFFERENT)
def test_settings_that_differ_between_ranks_raise_on_all_ranks(results, name):
    _, _, first, last = DIFFERENT[name]
    setting, rank = name.split(" under ")[0].split(", ")[0], len(results) - 1
    got = f"{setting}: got {first} on rank 0 and {last} on rank {rank}"
    message = f"{got}, expected the same on all ranks"
    for i, (kind, text) in enumerate(errors(results, name)):
        op = "gather_rows" if name == "the call" and i == rank else "masked_info_nce"
        assert (kind, text) == ("ValueError", f"{op}: {message}")


@pytest.mark.parametrize("name", GATHER_ERRORS)
def test_gather_rows_raises_on_all_ranks_if_rows_do_not_match(results, name):
    found, message = errors(results, f"gather_rows {name}"), GATHER_ERRORS[name][2]
    if name == "scalar":
        return check_refusal(found, "gather_rows", "ValueError", message)
    assert (
        len(set(found)) == 1
        and found[0][0] == "ValueError"
        and found[0][1].startswith(f"gather_rows: {message}")
    )


def test_gather_rows_accepts_ranks_without_rows(results):
    want = torch.cat([torch.full((rank, 2), rank) for rank in range(len(results))])
    for rank in results:
        some, none = rank["gathered"]
        assert torch.equal(some, want) and none.shape == (0, 2)


def test_no_queries_on_any_rank_raises_on_all_ranks(results):
    message = "masked_info_nce: query: got 0 rows on every rank, expected at least one row"
    assert errors(results, "no rows") == [("ValueError", message)] * len(results)


def test_invalid_input_of_the_module_raises_on_all_ranks(results):
    check_refusal(
        errors(results, "module"),
        "masked_info_nce",
        "TypeError",
        "query: got None, expected a torch.Tensor",
    )


def test_each_rank_with_invalid_input_raises_its_own_error(results):
    first, *others = errors(results, "several")
    message = "masked_info_nce: {}temperature: got -{}, expected a number above 0"
    assert first == ("RuntimeError", message.format("rank 1 failed: ", 1))
    for rank, error in enumerate(others, 1):
        assert error == ("ValueError", message.format("", rank))


def test_error_of_a_model_is_quoted_by_the_other_ranks(results):
    *others, own = errors(results, "model")
    assert own == ("ValueError", "negative: got None, expected one")
    message = f"gather_rows: rank {len(others)} failed: negative: got None, expected one"
    assert others == [("RuntimeError", message)] * len(others)


# ---- the selection bias -------------------------------------------------------------------------


def mixture() -> TopKMoE:
    torch.manual_seed(0)
    return TopKMoE(6, 4, 5, top_k=2, score="sigmoid", selection_bias=True)


def tokens(rank: int, step: int) -> torch.Tensor:
    """Draw tokens with a different mean on each rank, so that the ranks' counts differ."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(30 + 20 * rank, 6, generator=generator) + torch.randn(6, generator=generator)


def biases(rank: int, world: int) -> dict:
    """Return the selection biases after four updates.

    The counts come from all ranks ("all", "ddp"), ranks 0 and 1 ("pair") or this rank ("alone").
    """
    groups = [dist.new_group([0, 1]), *(dist.new_group([i]) for i in range(world))]
    found = {}
    for name, group in {"all": None, "pair": groups[0], "alone": groups[1 + rank]}.items():
        if name == "pair" and rank > 1:
            continue
        moe = mixture()
        for step in range(4):
            counts = moe(tokens(rank, step))[1].counts
            before = counts.clone()
            moe.update_selection_bias(counts, 0.05, group=group)
            assert torch.equal(counts, before)
        found[name] = moe.selection_bias
    wrapped = torch.nn.parallel.DistributedDataParallel(mixture())
    for step in range(4):
        wrapped.module.update_selection_bias(wrapped(tokens(rank, step))[1].counts, 0.05)
    return found | {"ddp": wrapped.module.selection_bias}


def bias_of_one_process(ranks) -> torch.Tensor:
    moe = mixture()
    for step in range(4):
        routing = moe(torch.cat([tokens(rank, step) for rank in ranks]))[1]
        moe.update_selection_bias(routing.counts, 0.05)
    return moe.selection_bias


def test_selection_bias_of_all_ranks_equals_the_bias_of_one_process(results):
    want = bias_of_one_process(range(len(results)))
    for rank, found in enumerate(results):
        assert torch.equal(found["bias"]["all"], want) and torch.equal(found["bias"]["ddp"], want)
        assert torch.equal(found["bias"]["alone"], bias_of_one_process([rank]))
    assert not torch.equal(results[0]["bias"]["alone"], results[1]["bias"]["alone"])


def test_selection_bias_uses_the_counts_of_a_group(results):
    for found in results[:2]:
        assert torch.equal(found["bias"]["pair"], bias_of_one_process([0, 1]))


def test_update_selection_bias_raises_without_a_selection_bias():
    with pytest.raises(ValueError, match="TopKMoE: selection_bias"):
        TopKMoE(6, 4, 5).update_selection_bias(torch.ones(5))


def test_summed_counts_of_micro_batches_give_the_bias_of_the_batch():
    whole, parts = mixture(), mixture()
    x = torch.cat([tokens(0, 0), tokens(1, 0)])
    whole.update_selection_bias(whole(x)[1].counts)
    parts.update_selection_bias(sum(parts(part)[1].counts for part in x.split(17)))
    assert whole.selection_bias.any() and torch.equal(parts.selection_bias, whole.selection_bias)
