"""The probabilities of query pooling, for heat maps."""

import math

import pytest
import torch
from query_pooling_cases import DEVICE, PADDINGS, make
from torch.utils._python_dispatch import TorchDispatchMode

import mmfused
from mmfused import QueryPooling, pooling_weights, query_pooling
from mmfused.testing import relative_error

NAMES = ("x", "queries", "w_k", "key_padding_mask", "lengths", "norm_weight")


def arguments(*args, **options):
    """Return all arguments of query_pooling, those of pooling_weights, and the padding mask."""
    inputs, heads = make(*args, grad=False, **options)
    x = inputs["x"]
    ignore = inputs.get("key_padding_mask", torch.zeros(x.shape[:2], dtype=torch.bool))
    if "lengths" in inputs:
        ignore = torch.arange(x.shape[1], device=DEVICE) >= inputs["lengths"][:, None]
    inputs |= dict(num_heads=heads)
    given = {k: v for k, v in inputs.items() if k in (*NAMES, "num_heads")}
    return inputs, given, ignore.to(DEVICE)


@pytest.mark.parametrize("chunk", [1, 2, 32])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("shape", ["one pass", "row blocks"])
def test_they_are_the_probabilities_of_the_pooling(shape, per_sample, norm, padding, chunk):
    """If the values are the identity, the output of each head is its mean token."""
    inputs, given, ignore = arguments(shape, per_sample=per_sample, norm=norm, padding=padding)
    weights = pooling_weights(**given, chunk=chunk)
    x, heads = inputs["x"], inputs["num_heads"]
    assert weights.shape == (len(x), heads, inputs["queries"].shape[-2], x.shape[1])
    assert not weights.masked_select(ignore[:, None, None]).any()
    count = (~ignore.all(1)).to(weights.dtype)
    torch.testing.assert_close(weights.sum(-1), count[:, None, None].expand(weights.shape[:3]))
    if norm:
        inputs["b_k"] = torch.randn(len(inputs["w_k"]), dtype=x.dtype, device=DEVICE)
    with mmfused.backend("reference"):
        pooled = query_pooling(**inputs)
    if norm:
        weight, bias = inputs["norm_weight"], inputs["norm_bias"]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)
    v = (x @ inputs["w_v"].T + inputs["b_v"]).unflatten(-1, (heads, -1)).transpose(1, 2)
    torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_they_are_float32(norm, dtype):
    _, given, ignore = arguments(norm=norm, padding="mask", dtype=dtype)
    doubles = {
        k: v.double() if k not in ("key_padding_mask", "num_heads") else v for k, v in given.items()
    }
    want = pooling_weights(**doubles)
    given["x"][ignore] = math.nan
    got = pooling_weights(**given)
    assert (got.dtype, want.dtype) == (torch.float32, torch.float64)
    assert relative_error(got, want) < 1e-5
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(pooling_weights(**given), got)


def test_packed_tokens_have_the_probabilities_of_padded_ones():
    _, given, _ = arguments("row blocks", norm=True, padding="lengths")
    lengths = given["lengths"]
    lengths[0] = 20
    want = pooling_weights(**given)
    x = torch.cat([tokens[:length] for tokens, length in zip(given["x"], lengths, strict=True)])
    x = torch.cat([x, torch.full_like(x[:3], math.nan)])
    offsets = torch.cat([lengths[:1] * 0, lengths.cumsum(0)])
    del given["lengths"]
    for chunk in (1, 32):
        got = pooling_weights(
            **given | dict(x=x, cu_seqlens=offsets), max_seqlen=want.shape[-1], chunk=chunk
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("called", ["nothing", "k_proj", "norm_kv"])
@pytest.mark.parametrize("padding", ["mask", "lengths", "packed"])
def test_a_module_shows_what_it_attends_to(padding, called):
    pool = QueryPooling(12, 3, 2, q_proj=True, bias=True, norm_kv=True, dropout=0.5).to(DEVICE)
    if called != "nothing":
        getattr(pool, called).register_forward_hook(lambda *_: None)
    x, lengths = torch.randn(5, 7, 12, device=DEVICE), torch.tensor([7, 0, 3, 5, 1], device=DEVICE)
    ignore = torch.arange(7, device=DEVICE) >= lengths[:, None]
    given = dict(x=x, key_padding_mask=ignore) if padding == "mask" else dict(x=x, lengths=lengths)
    if padding == "packed":
        offsets = torch.cat([lengths[:1] * 0, lengths.cumsum(0)])
        given = dict(x=x[~ignore], cu_seqlens=offsets, max_seqlen=7)
    weights = [pool.pooling_weights(**given, chunk=chunk) for chunk in (2, 32)]
    torch.testing.assert_close(*weights)
    assert not weights[0].requires_grad and weights[0].shape == (5, 2, 3, 7)
    with torch.no_grad():
        v = pool.v_proj(pool.norm_kv(x)).unflatten(-1, (2, -1)).transpose(1, 2)
        pooled = pool.eval()(**given)
    torch.testing.assert_close(
        (weights[0] @ v).transpose(1, 2).flatten(2), pooled, rtol=1e-5, atol=1e-5
    )


class NewStorages(TorchDispatchMode):
    """Find the sizes in bytes of all new storages, by address."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.given:
            self.sizes.append(out.untyped_storage().nbytes())
        return out


def test_temporary_memory_is_that_of_a_chunk():
    """Only the result, which is allocated once, covers more samples than a chunk."""
    _, given, _ = arguments(
        "more samples than partial sums", per_sample=True, norm=True, dtype=torch.float32
    )
    with NewStorages(x for x in given.values() if isinstance(x, torch.Tensor)) as new:
        weights = pooling_weights(**given, chunk=3)
    temporary = [size for size in new.sizes if size != weights.nbytes]
    assert weights.nbytes > max(temporary) == given["x"][:3].nbytes


def test_invalid_lengths_give_nan(monkeypatch):
    monkeypatch.setattr("mmfused.ops._common.check_value", lambda *_: None)  # as on CUDA
    _, given, _ = arguments(padding="lengths", dtype=torch.float32)
    given["lengths"] = torch.tensor([5, 38, 0], device=DEVICE)
    weights = pooling_weights(**given)
    assert weights.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not weights[2].any() and weights[0].isfinite().all()


@pytest.mark.parametrize("batch, length, queries", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_inputs(batch, length, queries):
    x, w = torch.randn(batch, length, 4, device=DEVICE), torch.eye(4, device=DEVICE)
    q = torch.randn(queries, 4, device=DEVICE)
    assert pooling_weights(x, q, w, num_heads=2).shape == (batch, 2, queries, length)


W = torch.eye(8, device=DEVICE)
ERRORS = {
    "num_heads: got 3, expected a divisor of Dk = 8": dict(num_heads=3),
    "chunk: got 0, expected an int of 1 or more": dict(chunk=0),
    "w_k: got shape (4, 8), expected (8, 8)": dict(w_k=W[:4]),
    "norm_weight: got shape (4,), expected (8,)": dict(norm_weight=W[0, :4]),
    "x: got shape (8, 8), expected (batch, tokens, dim)": dict(x=W),
    "queries: got shape (3, 8, 8), expected (L, Dk) or (2, L, Dk)": dict(queries=W.expand(3, 8, 8)),
    "scale: got a str, expected a number": dict(scale="1"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    inputs = dict(x=torch.ones(2, 5, 8, device=DEVICE), queries=W, w_k=W) | ERRORS[message]
    with pytest.raises((TypeError, ValueError)) as error:
        pooling_weights(**inputs)
    assert str(error.value) == f"pooling_weights: {message}"
