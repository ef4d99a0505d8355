"""The modules over :func:`query_pooling`: one that holds its parameters, and FLUID's block of them."""

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
from .functional import dead_samples, pool_projected, query_pooling


class QueryPooling(nn.Module):
    """Pool (B, N, kv_dim) tokens into (B, num_queries, dim) with learned queries:
    :func:`query_pooling` and its parameters.

    Args: dim: width of queries, keys, values and output; divides by ``num_heads``. num_queries:
        learned queries of this module; None: it has none, and forward needs ``queries``. kv_dim:
        width of the tokens, default ``dim``. q_proj, out_proj: project the queries before, the
        pooled heads after (both, with ``bias``: as nn.MultiheadAttention). bias: biases of the
        projections.  norm_kv: LayerNorm over the tokens, folded into the projections. dropout: of
        the attention probabilities, in training.

    A sample without tokens gives 0, whatever the biases.
    """

    def __init__(
        self,
        dim,
        num_queries,
        num_heads=1,
        *,
        kv_dim=None,
        q_proj=False,
        out_proj=False,
        bias=False,
        norm_kv=False,
        dropout=0.0,
    ):
        super().__init__()
        check_fractions("QueryPooling", dropout=dropout)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"QueryPooling: num_heads is {num_heads}; it must be positive and divide dim = {dim}."
            )
        kv_dim = dim if kv_dim is None else kv_dim
        self.dim, self.num_queries, self.num_heads, self.kv_dim = (
            dim,
            num_queries,
            num_heads,
            kv_dim,
        )
        self.dropout = dropout
        self.queries = None if num_queries is None else nn.Parameter(torch.randn(num_queries, dim))
        self.q_proj = nn.Linear(dim, dim, bias=bias) if q_proj else None
        self.k_proj = nn.Linear(kv_dim, dim, bias=bias)
        self.v_proj = nn.Linear(kv_dim, dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias) if out_proj else None
        self.norm_kv = nn.LayerNorm(kv_dim) if norm_kv else None

    def reset_parameters(self) -> None:
        """Queries from the standard normal distribution; projections and norm as torch begins them."""
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
        """x (B, N, kv_dim), key_padding_mask (B, N) True = ignore, or lengths (B,); queries (L,
        dim) or (B, L, dim) for its own.
        """
        queries = self.queries if queries is None else queries
        if queries is None:
            raise ValueError(
                "QueryPooling: queries is None; a module without num_queries takes them in forward."
            )
        check_tokens(x, key_padding_mask, lengths)
        device, q = x.device.type, queries
        if self.q_proj is not None:
            q = linear(queries, *read(self.q_proj, "QueryPooling.q_proj", self.dim, device))
        w_k, b_k = read(self.k_proj, "QueryPooling.k_proj", self.dim, device)
        w_v, b_v = read(self.v_proj, "QueryPooling.v_proj", self.dim, device)
        eps = getattr(self.norm_kv, "eps", 0.0)
        norm = read_norm(self.norm_kv, "QueryPooling.norm_kv", self.kv_dim, device, eps)
        called = [child for child in (w_k, w_v) if isinstance(child, Called)]
        fold = not called and self._folds_out_proj(x.shape[0] * queries.shape[-2])
        if fold:
            w_v, b_v = self._value_to_output(w_v, b_v)
        if called or isinstance(norm, Called):
            x, norm = self._normed(x, norm, key_padding_mask, lengths), None
        options = dict(
            num_heads=self.num_heads,
            key_padding_mask=key_padding_mask,
            lengths=lengths,
            dropout_p=self._dropout_p(),
            dropout_seed=dropout_seed,
        )
        if called:
            k, v = linear(x, w_k, b_k), linear(x, w_v, b_v)
            out = pool_projected(q, k, v, **options, reasons=no_weights(called))
        else:
            if norm is not None:
                options |= dict(norm_weight=norm[0], norm_bias=norm[1], norm_eps=eps)
            out = query_pooling(x, q, w_k, w_v, b_v, b_k, **options)
        if self.out_proj is None or fold:
            return out
        out = linear(out, *read(self.out_proj, "QueryPooling.out_proj", None, device))
        dead = dead_samples(x, key_padding_mask, lengths)
        return out if dead is None else out.masked_fill(dead[:, None, None], 0.0)

    def _normed(self, x: Tensor, norm, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The tokens normalised, those to be ignored (they may hold NaN) set to 0 before."""
        ignore = padding_mask(*x.shape[:2], mask, lengths, x.device)
        x = x if ignore is None else x.masked_fill(ignore[:, :, None], 0.0)
        return x if norm is None else layer_norm(x, norm, getattr(self.norm_kv, "eps", 0.0))

    def _folds_out_proj(self, rows: int) -> bool:
        """One head: W_O W_V is one matrix, cheaper than two products once there are more pooled
        rows than dim.

        Not under dropout, where b_V counts as often as probabilities are kept, and b_O once.
        """
        if graph_made():  # for any number of rows
            return False
        many = self.num_heads == 1 and rows > self.dim and not self._dropout_p()
        plain = self.out_proj is not None and why_called(self.out_proj) is None
        return many and plain and current_backend() != "reference"

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _value_to_output(self, w_v: Tensor, b_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w_o, b_o = weights_of(self.out_proj)
        wide = torch.promote_types(w_o.dtype, w_v.dtype)  # an adapter may be in float32
        w_o, b_o, w_v, b_v = (None if t is None else t.to(wide) for t in (w_o, b_o, w_v, b_v))
        with no_autocast(w_o.device.type):  # fold first, round once
            bias = None if b_v is None else w_o @ b_v
            bias = b_o if bias is None else bias if b_o is None else bias + b_o
            return w_o @ w_v, bias

    def extra_repr(self) -> str:
        names = ("num_queries", "num_heads", "kv_dim", "dropout")
        return ", ".join([str(self.dim), *(f"{name}={getattr(self, name)}" for name in names)])


class QTransform(nn.Module):
    """FLUID's Q-Transform: ``depth`` post-norm blocks in which learned queries read the tokens
    (arXiv 2508.07264 eqs 3-6).

        q = LN(q + Drop(MHA(q, x, x)));   q = LN(q + Drop(FFN(q)))     (the blocks are the public
        code's; the paper gives the MHA)

    The tokens x (B, N, dim) stay as they are from block to block. ``ffn``: hidden width, default 4
    * dim. ``dropout`` acts on the attention probabilities, and on the outputs of the pooling and of
    the FFN (the public code's). Returns (B, num_queries, dim); a sample without tokens keeps its
    queries, normalised."""

    def __init__(self, dim, num_queries, depth=1, num_heads=1, *, ffn=None, dropout=0.0):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.blocks = nn.ModuleList(
            _QTransformBlock(dim, num_heads, 4 * dim if ffn is None else ffn, dropout)
            for _ in range(depth)
        )

    def reset_parameters(self) -> None:
        """As :meth:`QueryPooling.reset_parameters`."""
        nn.init.normal_(self.queries)
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        q = self.queries  # (L, D): shared by the batch until the first block has read the tokens
        for block in self.blocks:
            q = block(q, x, key_padding_mask, lengths)
        return q


class _QTransformBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn: int, dropout: float):
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
