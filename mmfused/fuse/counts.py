"""What pooling without keys and values is expected to bring, by FLOPs counted for many tokens."""

from __future__ import annotations

from ..ops.query_pooling.functional import _ABSORBED_MUST_SAVE as MUST_SAVE
from ..ops.query_pooling.functional import flops


def pooling(dim: int, queries: int | None, k_dim: int, v_dim: int, heads: int) -> str:
    """Tokens (N, dim); ``queries`` is None where only a call brings them."""
    if queries is None:
        return _up_to(dim, k_dim, v_dim, heads)
    cost = _per_token(dim, queries, k_dim, v_dim, heads)
    ratio = cost["projected"] / cost["absorbed"]
    fewer = f"by count a token costs {ratio:.3g} times fewer FLOPs, as there are no keys and values"
    if ratio >= MUST_SAVE["cuda"]:
        return f"{fewer}; nothing to gain with few tokens"
    if ratio >= MUST_SAVE["cpu"]:
        return f"on a CPU {fewer}; nothing to gain on a GPU, nor with few tokens"
    return (
        f"nothing by count: with {queries} queries of {heads} heads a token would cost "
        f"{1 / ratio:.3g} times as much without keys and values, so it has them, as before"
    )


def _up_to(dim: int, k_dim: int, v_dim: int, heads: int) -> str:
    cpu, gpu = (_most_queries(MUST_SAVE[d], dim, k_dim, v_dim, heads) for d in ("cpu", "cuda"))
    return (
        f"by count fewer FLOPs for up to {cpu} queries on a CPU, {gpu} on a GPU, as there are no "
        "keys and values; nothing to gain with few tokens, nor in a call that runs as before"
    )


def _most_queries(times: float, dim: int, k_dim: int, v_dim: int, heads: int) -> int:
    """With how many queries keys and values still cost ``times`` as much as none."""
    none, one = (_per_token(dim, queries, k_dim, v_dim, heads) for queries in (0, 1))
    return int(none["projected"] / (times * one["absorbed"] - one["projected"] + none["projected"]))


def _per_token(dim: int, queries: int, k_dim: int, v_dim: int, heads: int) -> dict[str, int]:
    """FLOPs of one more token, forward and backward: what many tokens cost each."""
    none, one = (flops(1, tokens, dim, queries, k_dim, v_dim, heads) for tokens in (0, 1))
    return {form: one[form] - none[form] for form in one}
