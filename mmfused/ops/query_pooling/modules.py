"""Modules for query pooling: QueryPooling, and FLUID's Q-Transform built from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...children import (
    Called,
    layer_norm,
    linear,
    read,
    read_norm,
    reset_children,
    weights_of,
    why_called,
    why_no_weights,
)
from ...library import active_exporter, check_fractions, current_backend, no_autocast
from .._common import padding_mask
from .checks import check_tokens
from .composed import empty_samples
from .functional import pool_projected, query_pooling
from .probabilities import in_chunks, pooling_weights, samples
from .reference import packed_lengths, unpack


class QueryPooling(nn.Module):
    """Pool (B, N, kv_dim) tokens into (B, num_queries, dim) with learned queries.

    Holds the parameters of :func:`query_pooling`.

    Args:
        dim: width of queries, keys, values and output; a multiple of ``num_heads``.
        num_queries: number of learned queries. If None, ``forward`` needs ``queries``.
        num_heads: number of attention heads.
        kv_dim: width of the tokens, default ``dim``.
        q_proj: whether to project the queries.
        out_proj: whether to project the output.
        bias: whether the projections have biases.
        norm_kv: whether to apply a LayerNorm to the tokens before the key and value projections.
        dropout: dropout rate of the attention probabilities in training, in [0, 1).

    With ``q_proj``, ``out_proj`` and ``bias`` this is the attention of nn.MultiheadAttention,
    except that a sample without tokens gives output 0.

    Raises:
        TypeError, ValueError: bad arguments.

    Examples:
        >>> import torch, mmfused
        >>> pool = mmfused.QueryPooling(32, num_queries=2, num_heads=4)
        >>> tokens = torch.randn(3, 10, 32)
        >>> lengths = torch.tensor([10, 4, 0])  # the tokens that count in each sample
        >>> pooled = pool(tokens, lengths=lengths)
        >>> pooled.shape
        torch.Size([3, 2, 32])
        >>> torch.allclose(pooled[1:2], pool(tokens[1:2, :4]), atol=1e-5)
        True
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
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Pool tokens.

        Args:
            x: (B, N, kv_dim), or packed tokens (total, kv_dim).
            key_padding_mask: (B, N) bool, True = ignore.
            queries: (L, dim) or (B, L, dim), used instead of the learned queries.
            lengths: (B,) int, the number of tokens that count; an alternative to the mask.
            cu_seqlens: (B + 1,) int, the offsets of packed tokens; see :func:`query_pooling`.
            max_seqlen: a bound on the tokens of a sample, needed with ``cu_seqlens``.
            dropout_seed: see :func:`query_pooling`.

        Returns:
            (B, L, dim).
        """
        check_tokens(x, key_padding_mask, lengths, cu_seqlens, max_seqlen)
        device = x.device.type
        q = self._projected_queries(x, queries)
        w_k, b_k = read(self.k_proj, "QueryPooling.k_proj", self.dim, device)
        w_v, b_v = read(self.v_proj, "QueryPooling.v_proj", self.dim, device)
        eps = getattr(self.norm_kv, "eps", 0.0)
        norm = read_norm(self.norm_kv, "QueryPooling.norm_kv", self.kv_dim, device, eps)
        dropout_p = self.dropout if self.training else 0.0
        if any(isinstance(part, Called) for part in (w_k, w_v, norm)):
            if cu_seqlens is not None and max_seqlen is not None:
                x, lengths = unpack(x, cu_seqlens, max_seqlen)
                cu_seqlens = max_seqlen = None
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
                reasons=why_no_weights((w_k, w_v)),
            )
        else:
            batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            fold = self._folds_out_proj(batch * q.shape[-2], dropout_p)
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
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                norm_eps=eps,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
            )
        if self.out_proj is None or fold:
            return out
        out = linear(out, *read(self.out_proj, "QueryPooling.out_proj", None, device))
        lengths = lengths if cu_seqlens is None else packed_lengths(x, cu_seqlens)
        empty = empty_samples(x, key_padding_mask, lengths)
        return out if empty is None else out.masked_fill(empty[:, None, None], 0.0)

    @torch.no_grad()
    def pooling_weights(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        queries: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        chunk: int = 32,
    ) -> Tensor:
        """Return the probabilities with which :meth:`forward` pools the tokens, without gradients.

        The arguments are those of :meth:`forward`, and ``chunk`` is the number of samples that are
        computed at a time; see :func:`pooling_weights`.

        Returns:
            (B, num_heads, L, N) in float32, or in float64 for float64 ``x``, without dropout.
        """
        check_tokens(x, key_padding_mask, lengths, cu_seqlens, max_seqlen)
        device = x.device.type
        q = self._projected_queries(x, queries)
        w_k, b_k = read(self.k_proj, "QueryPooling.k_proj", self.dim, device)
        eps = getattr(self.norm_kv, "eps", 0.0)
        norm = read_norm(self.norm_kv, "QueryPooling.norm_kv", self.kv_dim, device, eps)
        tokens = (x, key_padding_mask, lengths, cu_seqlens, max_seqlen)
        if not isinstance(w_k, Called) and not isinstance(norm, Called):
            return pooling_weights(
                x,
                q,
                w_k,
                num_heads=self.num_heads,
                key_padding_mask=key_padding_mask,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                norm_weight=None if norm is None else norm[0],
                norm_eps=eps,
                chunk=chunk,
            )

        def of_samples(part: slice) -> Tensor:
            some, mask, counts = samples(*tokens, part)
            k = linear(self._normed(some, norm, mask, counts), w_k, b_k)
            return pooling_weights(
                k,
                q if q.dim() == 2 else q[part],
                torch.eye(self.dim, dtype=k.dtype, device=k.device),
                num_heads=self.num_heads,
                key_padding_mask=mask,
                lengths=counts,
            )

        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return in_chunks(of_samples, batch, chunk)

    def _projected_queries(self, x: Tensor, queries: Tensor | None) -> Tensor:
        queries = self.queries if queries is None else queries
        if queries is None:
            raise ValueError(
                "QueryPooling: queries: got None, expected a tensor because num_queries is None"
            )
        if self.q_proj is None:
            return queries
        device = x.device.type
        return linear(queries, *read(self.q_proj, "QueryPooling.q_proj", self.dim, device))

    def _normed(
        self,
        x: Tensor,
        norm: tuple[Tensor, Tensor] | Called | None,
        mask: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """Set ignored tokens, which may be NaN, to 0; then apply the norm, if there is one."""
        ignore = padding_mask(x, mask, lengths)
        x = x if ignore is None else x.masked_fill(ignore[:, :, None], 0.0)
        return x if norm is None else layer_norm(x, norm, getattr(self.norm_kv, "eps", 0.0))

    def _folds_out_proj(self, rows: int, dropout_p: float) -> bool:
        """Return whether to fold ``out_proj`` into ``v_proj``: to multiply the two weights first.

        Folding needs a single head. It pays off above about ``dim`` pooled rows. Dropout prevents
        folding, because it scales the value bias but not the output bias.
        """
        if active_exporter():  # an exported graph serves any number of rows
            return False
        plain = self.out_proj is not None and why_called(self.out_proj) is None
        foldable = self.num_heads == 1 and plain and not dropout_p
        return foldable and rows > self.dim and current_backend() != "reference"

    def _value_to_output(self, w_v: Tensor, b_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.out_proj is not None
        w_o, b_o = weights_of(self.out_proj)
        wide = torch.promote_types(w_o.dtype, w_v.dtype)  # an adapter may be in float32
        w_o, w_v = w_o.to(wide), w_v.to(wide)
        with no_autocast(w_o.device.type):  # autocast would round the product
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

    Each block computes::

        q = LN(q + Drop(MHA(q, x, x)))
        q = LN(q + Drop(FFN(q)))

    The tokens do not change from block to block.

    Args:
        dim: width of tokens and queries; a multiple of ``num_heads``.
        num_queries: number of learned queries.
        depth: number of blocks.
        num_heads: number of attention heads.
        ffn: hidden width of the feed-forward network, default ``4 * dim``.
        dropout: dropout rate of the attention probabilities and of the outputs of attention and
            feed-forward network.

    The attention is that of arXiv 2508.07264, equations 3-6; the block structure and the dropout
    follow FLUID's public code.

    Examples:
        >>> import torch, mmfused
        >>> transform = mmfused.QTransform(32, num_queries=8, depth=2, num_heads=4)
        >>> patches = torch.randn(3, 50, 32)  # for example the tokens of a ViT
        >>> q = transform(patches)
        >>> q.shape
        torch.Size([3, 8, 32])
        >>> torch.allclose(q.mean(-1), torch.zeros(3, 8), atol=1e-5)  # each block ends in a norm
        True
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
        """Draw the queries from a standard normal distribution; reset the rest as torch does."""
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

        ``key_padding_mask`` (B, N) and ``lengths`` (B,) are those of :class:`QueryPooling`. For a
        sample without tokens the output of the attention is 0.
        """
        q = self.queries  # (L, dim); the blocks return (B, L, dim)
        for block in self.blocks:
            q = block(q, x, key_padding_mask, lengths)
        return q


class _QTransformBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pool = QueryPooling(
            dim, None, num_heads, q_proj=True, out_proj=True, bias=True, dropout=dropout
        )
        self.norm_pool = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))
        self.norm_ffn = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        q: Tensor,
        x: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        q = self.norm_pool(q + self.drop(self.pool(x, mask, q, lengths=lengths)))
        return self.norm_ffn(q + self.drop(self.ffn(q)))
