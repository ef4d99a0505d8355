"""The expected benefit of pooling without keys and values, from the FLOPs for each token."""

from __future__ import annotations

from ..ops.query_pooling.composed import absorbed_must_save, form_flops


def pooling_benefit(
    dim: int,
    queries: int | None,
    k_dim: int,
    v_dim: int,
    heads: int,
) -> str:
    """Return the text on the benefit; ``queries`` is None if each call brings its own queries."""
    if queries is None:
        return _benefit_of_calls(dim, k_dim, v_dim, heads)
    cost = _per_token(dim, queries, k_dim, v_dim, heads)
    ratio = cost["projected"] / cost["absorbed"]
    fewer = (
        f"by count the layer takes {ratio:.3g} times fewer FLOPs for each token, as it makes no "
        "keys and values"
    )
    if ratio >= absorbed_must_save("cuda"):
        return f"{fewer}; no benefit with few tokens"
    if ratio >= absorbed_must_save("cpu"):
        return f"on a CPU {fewer}; no benefit on a GPU, nor with few tokens"
    return (
        f"no benefit by count: with {queries} queries of {heads} heads a token would cost "
        f"{1 / ratio:.3g} times as much without keys and values, so they are computed as before"
    )


def _benefit_of_calls(
    dim: int,
    k_dim: int,
    v_dim: int,
    heads: int,
) -> str:
    cpu, gpu = (
        _most_queries(absorbed_must_save(device), dim, k_dim, v_dim, heads)
        for device in ("cpu", "cuda")
    )
    return (
        f"by count fewer FLOPs for up to {cpu} queries on a CPU, {gpu} on a GPU, as there are no "
        "keys and values; no benefit with few tokens, nor in a call that runs the original forward"
    )


def _most_queries(
    times: float,
    dim: int,
    k_dim: int,
    v_dim: int,
    heads: int,
) -> int:
    """Return the largest number of queries with projected FLOPs >= times * absorbed FLOPs."""
    zero, one = (_per_token(dim, queries, k_dim, v_dim, heads) for queries in (0, 1))
    return int(zero["projected"] / (times * one["absorbed"] - one["projected"] + zero["projected"]))


def _per_token(
    dim: int,
    queries: int,
    k_dim: int,
    v_dim: int,
    heads: int,
) -> dict[str, int]:
    """Return the FLOPs that a token adds in each form, forward and backward."""
    zero, one = (form_flops(1, tokens, dim, queries, k_dim, v_dim, heads) for tokens in (0, 1))
    return {form: one[form] - zero[form] for form in one}
