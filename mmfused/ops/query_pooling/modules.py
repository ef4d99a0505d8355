"""The modules of query pooling, and FLUID's block made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...children import (
    Called,
    layer_norm,
    linear,
    no_weights,
    read,
    read_norm,
    reset_children,
    weights_of,
    why_called,
)
from ...library import check_fractions, current_backend, graph_made, no_autocast
from .._common import padding_mask
from .checks import check_tokens
from .composed import empty_samples
from .functional import pool_projected, query_pooling


class QueryPooling(nn.Module):
    """Pool (B, N, kv_dim) tokens into (B, num_queries, dim) with learned queries.

    :func:`query_pooling` with its parameters.

    Args:
        dim: width of queries, keys, values and output; a multiple of ``num_heads``.
        num_queries: number of learned queries; None for none, then ``forward`` needs ``queries``.
        num_heads: attention heads.
        kv_dim: width of the tokens, default ``dim``.
        q_proj: project the queries.
        out_proj: project the output. With ``q_proj`` and ``bias`` too, as nn.MultiheadAttention.
        bias: biases of the projections.
        norm_kv: a LayerNorm over the tokens, folded into the projections.
        dropout: of the attention probabilities in training, in [0, 1).

    A sample without tokens gives 0, whatever the biases. Raises ``ValueError`` or ``TypeError`` on
    bad arguments.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int | None,
        num_heads: int = 1,
        *,
        kv_dim: int | None = None,
        q_proj: bool = False,
        out_proj: bool = False,
        bias: bool = False,
        norm_kv: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_fractions("QueryPooling", dropout=dropout)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"QueryPooling: num_heads: got {num_heads}, expected a divisor of dim = {dim}"
            )
        self.dim = dim
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.kv_dim: int = dim if kv_dim is None else kv_dim
        self.dropout = dropout
        self.queries: nn.Parameter | None = (
            None if num_queries is None else nn.Parameter(torch.randn(num_queries, dim))
        )
        self.q_proj: nn.Linear | None = nn.Linear(dim, dim, bias=bias) if q_proj else None
        self.k_proj: nn.Linear = nn.Linear(self.kv_dim, dim, bias=bias)
        self.v_proj: nn.Linear = nn.Linear(self.kv_dim, dim, bias=bias)
        self.out_proj: nn.Linear | None = nn.Linear(dim, dim, bias=bias) if out_proj else None
        self.norm_kv: nn.LayerNorm | None = nn.LayerNorm(self.kv_dim) if norm_kv else None

    def reset_parameters(self) -> None:
        """Draw the queries from a standard normal distribution; reset the rest as torch does."""
        if self.queries is not None:
            nn.init.normal_(self.queries)
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        queries: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Pool tokens.

        Args:
            x: (B, N, kv_dim).
            key_padding_mask: (B, N) bool, True = ignore.
            queries: (L, dim) or (B, L, dim), in place of the module's own.
            lengths: (B,) int, the number of tokens to keep, instead of the mask.
            dropout_seed: see :func:`query_pooling`.

        Returns: (B, L, dim).
        """
        queries = self.queries if queries is None else queries
        if queries is None:
            raise ValueError(
                "QueryPooling: queries: got None, expected a tensor, as num_queries is None"
            )
        check_tokens(x, key_padding_mask, lengths)
        device = x.device.type
        q = queries
        if self.q_proj is not None:
            q = linear(queries, *read(self.q_proj, "QueryPooling.q_proj", self.dim, device))
        w_k, b_k = read(self.k_proj, "QueryPooling.k_proj", self.dim, device)
        w_v, b_v = read(self.v_proj, "QueryPooling.v_proj", self.dim, device)
        eps = getattr(self.norm_kv, "eps", 0.0)
        norm = read_norm(self.norm_kv, "QueryPooling.norm_kv", self.kv_dim, device, eps)
        dropout_p = self.dropout if self.training else 0.0
        if any(isinstance(part, Called) for part in (w_k, w_v, norm)):
            x = self._normed(x, norm, key_padding_mask, lengths)
            norm = None
        fold = False
        if isinstance(w_k, Called) or isinstance(w_v, Called):
            out = pool_projected(
                q,
                linear(x, w_k, b_k),
                linear(x, w_v, b_v),
                num_heads=self.num_heads,
                key_padding_mask=key_padding_mask,
                lengths=lengths,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                reasons=no_weights((w_k, w_v)),
            )
        else:
            fold = self._folds_out_proj(x.shape[0] * queries.shape[-2], dropout_p)
            if fold:
                w_v, b_v = self._value_to_output(w_v, b_v)
            assert not isinstance(norm, Called)
            norm_weight, norm_bias = (None, None) if norm is None else norm
            out = query_pooling(
                x,
                q,
                w_k,
                w_v,
                b_v,
                b_k,
                num_heads=self.num_heads,
                key_padding_mask=key_padding_mask,
                lengths=lengths,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                norm_eps=eps,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
            )
        if self.out_proj is None or fold:
            return out
        out = linear(out, *read(self.out_proj, "QueryPooling.out_proj", None, device))
        empty = empty_samples(x, key_padding_mask, lengths)
        return out if empty is None else out.masked_fill(empty[:, None, None], 0.0)

    def _normed(
        self,
        x: Tensor,
        norm: tuple[Tensor, Tensor] | Called | None,
        mask: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """Normalise the tokens, with ignored ones, which may be NaN, set to 0 first."""
        ignore = padding_mask(x, mask, lengths)
        x = x if ignore is None else x.masked_fill(ignore[:, :, None], 0.0)
        return x if norm is None else layer_norm(x, norm, getattr(self.norm_kv, "eps", 0.0))

    def _folds_out_proj(self, rows: int, dropout_p: float) -> bool:
        """Return whether W_O is folded into W_V.

        With one head W_O W_V is one matrix, which is cheaper once there are more pooled rows than
        ``dim``. Not under dropout, where b_V is scaled by the kept probabilities and b_O is not.
        """
        if graph_made():  # an exported graph serves any number of rows
            return False
        many = self.num_heads == 1 and rows > self.dim and not dropout_p
        plain = self.out_proj is not None and why_called(self.out_proj) is None
        return many and plain and current_backend() != "reference"

    def _value_to_output(self, w_v: Tensor, b_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.out_proj is not None
        w_o, b_o = weights_of(self.out_proj)
        wide = torch.promote_types(w_o.dtype, w_v.dtype)  # an adapter may be in float32
        w_o, w_v = w_o.to(wide), w_v.to(wide)
        with no_autocast(w_o.device.type):  # fold first, round once
            bias = None if b_o is None else b_o.to(wide)
            if b_v is not None:
                shift = w_o @ b_v.to(wide)
                bias = shift if bias is None else shift + bias
            return w_o @ w_v, bias

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        names = ("num_queries", "num_heads", "kv_dim", "dropout")
        return ", ".join([str(self.dim), *(f"{name}={getattr(self, name)}" for name in names)])


class QTransform(nn.Module):
    """FLUID's Q-Transform: post-norm blocks in which learned queries attend to the tokens.

        q = LN(q + Drop(MHA(q, x, x)))
        q = LN(q + Drop(FFN(q)))

    The tokens do not change from block to block.

    Args:
        dim: width of tokens and queries; a multiple of ``num_heads``.
        num_queries: number of learned queries.
        depth: number of blocks.
        num_heads: attention heads.
        ffn: hidden width of the feed-forward network, default ``4 * dim``.
        dropout: of the attention probabilities, and of the outputs of attention and FFN.

    Source: arXiv 2508.07264, equations 3-6, for the attention; the block structure and the places
    of dropout are those of the public code.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int,
        depth: int = 1,
        num_heads: int = 1,
        *,
        ffn: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.queries: nn.Parameter = nn.Parameter(torch.randn(num_queries, dim))
        self.blocks: nn.ModuleList = nn.ModuleList(
            _QTransformBlock(dim, num_heads, 4 * dim if ffn is None else ffn, dropout)
            for _ in range(depth)
        )

    def reset_parameters(self) -> None:
        """Reset as :meth:`QueryPooling.reset_parameters` does."""
        nn.init.normal_(self.queries)
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Pool tokens x (B, N, dim) into (B, num_queries, dim).

        ``key_padding_mask`` (B, N) or ``lengths`` (B,) as in :class:`QueryPooling`. A sample
        without tokens keeps its queries, normalised.
        """
        q = self.queries  # (L, D), shared by the batch until the first block
        for block in self.blocks:
            q = block(q, x, key_padding_mask, lengths)
        return q


class _QTransformBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.pool = QueryPooling(
            dim, None, num_heads, q_proj=True, out_proj=True, bias=True, dropout=dropout
        )
        self.norm_pool = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.norm_ffn = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, q: Tensor, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        q = self.norm_pool(q + self.drop(self.pool(x, mask, q, lengths=lengths)))
        return self.norm_ffn(q + self.drop(self.ffn(q)))
