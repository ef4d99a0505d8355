"""The Gluon kernels of query pooling for sm_90, on such a GPU or with ``--ptx 90``."""

import math
from typing import NamedTuple

import pytest
import torch
from query_pooling_cases import DEVICE, cast, run

import mmfused.kernels.tiles
from mmfused.kernels.query_pooling import hopper_backward, plan
from mmfused.kernels.recording import launches_made
from mmfused.library import INTERPRETED
from mmfused.testing import over_budget, relative_error

SEED = 2**40 + 7
EPS = 1e-5
GUARD = 72  # rows of NaN before and after each sample: more than a tile
DTYPES = [torch.float16, torch.bfloat16]


def runs_here():
    if INTERPRETED:
        return False
    arch = mmfused.kernels.tiles.arch_of(torch.empty(0, device=DEVICE))
    return "hopper" in plan(1, 64, torch.float16, arch, False, tma=True).forward


pytestmark = pytest.mark.skipif(not runs_here(), reason="needs sm_90, or --ptx 90")


class Case(NamedTuple):
    dtype: str
    batch: int
    length: int
    dim: int
    queries: int
    heads: int
    padding: str = "none"
    norm: bool = False
    dropout: float = 0.0
    per_sample: bool = False
    need_dx: bool = True


# Every pair of options, and every option with every size, is in one of these cases.
CASES = [
    Case("bfloat16", 1, 1, 8, 31, 1, "none", False, 0.9, False, True),
    Case("float16", 1, 1, 8, 1, 1, "mask", True, 0.0, True, False),
    Case("bfloat16", 3, 64, 8, 16, 1, "none", True, 0.9, False, False),
    Case("float16", 1, 65, 8, 31, 1, "mask", True, 0.1, True, False),
    Case("float16", 1, 128, 8, 5, 3, "lengths", True, 0.1, True, False),
    Case("bfloat16", 3, 65, 64, 48, 2, "lengths", True, 0.9, False, False),
    Case("float16", 1, 65, 64, 16, 2, "none", False, 0.0, True, True),
    Case("float16", 1, 65, 64, 48, 2, "mask", True, 0.1, True, True),
    Case("float16", 3, 63, 96, 5, 8, "lengths", False, 0.1, True, True),
    Case("bfloat16", 3, 63, 96, 16, 2, "mask", True, 0.9, True, True),
    Case("float16", 1, 128, 96, 11, 3, "mask", False, 0.0, False, False),
    Case("bfloat16", 3, 197, 96, 11, 3, "lengths", False, 0.9, True, False),
    Case("float16", 1, 197, 96, 1, 1, "none", True, 0.1, False, True),
    Case("bfloat16", 1, 197, 96, 1, 1, "mask", False, 0.1, True, True),
    Case("bfloat16", 1, 1, 192, 5, 8, "lengths", False, 0.9, False, False),
    Case("bfloat16", 3, 64, 192, 5, 3, "mask", False, 0.0, True, True),
    Case("bfloat16", 3, 64, 192, 11, 3, "none", True, 0.1, False, True),
    Case("float16", 1, 65, 192, 48, 2, "mask", False, 0.0, True, True),
    Case("float16", 3, 128, 192, 31, 1, "lengths", False, 0.0, True, True),
    Case("bfloat16", 1, 63, 768, 16, 2, "none", False, 0.1, False, False),
    Case("bfloat16", 1, 63, 768, 5, 8, "mask", True, 0.0, True, True),
    Case("float16", 3, 65, 768, 1, 1, "lengths", False, 0.9, True, True),
    Case("float16", 1, 128, 768, 17, 1, "lengths", False, 0.0, False, True),
    Case("bfloat16", 3, 1, 1000, 17, 1, "mask", False, 0.1, False, False),
    Case("float16", 1, 63, 192, 17, 1, "none", True, 0.9, True, False),
    Case("float16", 1, 197, 1000, 3, 5, "lengths", True, 0.0, False, True),
    Case("bfloat16", 1, 63, 1024, 16, 1, "mask", False, 0.0, False, True),
    Case("bfloat16", 3, 63, 1024, 16, 2, "lengths", False, 0.1, True, True),
    Case("float16", 1, 64, 1024, 16, 1, "lengths", True, 0.1, True, False),
    Case("bfloat16", 1, 128, 1024, 5, 3, "none", True, 0.9, False, True),
    # More samples than programs, which are 132 in forward and 128 in backward; or more items.
    Case("float16", 130, 65, 64, 16, 1, "lengths", True, 0.0, False, True),
    Case("bfloat16", 270, 10, 8, 3, 1, "mask", False, 0.1, True, True),
    Case("bfloat16", 67, 9, 64, 40, 1, "lengths"),
    # Short samples. In backward, those of up to 768 columns have tiles of two samples.
    Case("bfloat16", 1, 1, 8, 1, 1, "none", False, 0.0),
    Case("float16", 2, 32, 768, 2, 1, "none", False, 0.0),
    Case("bfloat16", 4, 31, 320, 4, 4, "none", True, 0.0),
    Case("bfloat16", 3, 31, 768, 4, 4, "lengths", True, 0.0),
    Case("float16", 5, 7, 96, 3, 5, "mask", True, 0.1),
    Case("bfloat16", 3, 32, 192, 1, 12, "mask", False, 0.1),
    Case("bfloat16", 4, 32, 64, 16, 1, "lengths", False, 0.9, need_dx=False),
    Case("float16", 3, 17, 200, 2, 1, "none", True, 0.5, need_dx=False),
    Case("float16", 3, 29, 1000, 3, 5, "lengths", True, 0.1),
    Case("bfloat16", 1, 32, 1024, 2, 1, "mask", False, 0.0),
    Case("float16", 269, 5, 8, 3, 1, "lengths", True, 0.1),
]


def name_of(case):
    return "-".join(str(value) for value in case)


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(grad)


def padding_of(kind, batch, length):
    """Return arguments for padding: some samples with a few tokens, none, and padded on the left.

    A sample of more than 128 tokens has a tile without valid tokens between others.
    """
    if kind == "none":
        return {}
    if kind == "lengths":
        lengths = torch.tensor([max(length - 5, 1), 0, min(length, 64), length, 1])
        return dict(lengths=lengths.repeat(-(-batch // 5))[:batch].to(DEVICE))
    ignore = torch.rand(batch, length) < 0.4
    ignore[::3, 64:128] = True
    ignore[::3, -1] = False
    ignore[1::3] = True
    ignore[2::3, : min(length - 1, 70)] = True
    return dict(key_padding_mask=ignore.to(DEVICE))


def make(case):
    """Return tensors for query_pooling, and its options."""
    dtype = getattr(torch, case.dtype)
    dim, width = case.dim, 8 * case.heads
    lead = (case.batch,) if case.per_sample else ()
    inputs = dict(
        x=randn(case.batch, case.length, dim, dtype=dtype, grad=case.need_dx),
        queries=randn(*lead, case.queries, width, dtype=dtype),
        w_k=(randn(width, dim) * dim**-0.5).detach().to(dtype).requires_grad_(),
        w_v=(randn(width, dim) * dim**-0.5).detach().to(dtype).requires_grad_(),
        b_v=randn(width, dtype=dtype),
    )
    if case.norm:
        inputs |= dict(norm_weight=randn(dim, dtype=dtype), norm_bias=randn(dim, dtype=dtype))
    inputs |= padding_of(case.padding, case.batch, case.length)
    options = dict(dropout_p=case.dropout)
    if case.dropout:
        options["dropout_seed"] = torch.tensor(SEED, device=DEVICE)
    return inputs, options


def check_budget(case, inputs, options, hopper=True):
    """Compare with float64, and check that the kernels ran (or did not)."""
    upstream = randn(case.batch, case.queries, 8 * case.heads, grad=False)
    exact = run(cast(inputs, torch.float64), case.heads, "reference", upstream, **options)
    # A result whose norm is at most 1e-12 is 0 up to rounding.
    exact = {name: value if value.norm() > 1e-12 else value * 0 for name, value in exact.items()}
    plain = run(inputs, case.heads, "reference", upstream, **options)
    with launches_made() as launches:
        fused = run(inputs, case.heads, "fused", upstream, **options)
    names = {launch.name for launch in launches}
    limit = 16 if case.norm or case.dropout else 32
    short = case.length <= limit and case.dim <= 768 and not case.per_sample
    assert ("hopper_forward_kernel" in names) == (hopper and not short)
    pairs = case.length <= 32 and case.dim <= 768 and not case.per_sample
    pairs = pairs and case.queries * case.heads <= 16
    assert ("pairs_backward_kernel" in names) == (hopper and pairs)
    if not hopper:
        assert "hopper_backward_kernel" not in names
    assert not over_budget(fused, exact, plain)
    return fused


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_results_stay_within_the_budget(case):
    inputs, options = make(case)
    got = check_budget(case, inputs, options)
    if case.need_dx and case.padding == "mask":
        assert not got["dx"][inputs["key_padding_mask"]].any()


@pytest.mark.parametrize("mean", [1, 10, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_common_mean_does_not_reduce_accuracy(dtype, mean):
    case = Case(str(dtype)[6:], 3, 70, 192, 5, 3, "mask", norm=True)
    inputs, options = make(case)
    inputs["x"] = (inputs["x"].detach() + mean).requires_grad_()
    check_budget(case, inputs, options)


def test_lengths_of_32_bits():
    case = Case("float16", 3, 65, 64, 3, 1, "lengths")
    inputs, options = make(case)
    want = check_budget(case, inputs, options)
    got = run(inputs | {"lengths": inputs["lengths"].int()}, 1, "fused", **options)
    assert torch.equal(got["out"], want["out"])


# ---- tokens in other memory layouts --------------------------------------------------------------

LAYOUTS = {
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "other samples between": lambda x: x.repeat_interleave(2, 0)[1::2],
    "other tokens between": lambda x: x.repeat_interleave(3, 1)[:, 1::3],
    "other columns beside": lambda x: torch.cat([torch.full_like(x, math.nan), x], -1)[
        ..., x.shape[-1] :
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_tokens(layout):
    case = Case("float16", 3, 70, 96, 5, 1, "mask", norm=True)
    inputs, options = make(case)
    want = run(inputs, 1, "fused", **options)
    view = LAYOUTS[layout](inputs["x"].detach()).requires_grad_()
    assert not view.is_contiguous()
    with launches_made() as launches:
        got = run(inputs | {"x": view}, 1, "fused", **options)
    assert {launch.name for launch in launches} >= {
        "hopper_forward_kernel",
        "hopper_backward_kernel",
    }
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


UNALIGNED = {
    "address": lambda x: torch.cat([x.new_zeros(4), x.flatten()])[4:].view_as(x),
    "rows": lambda x: torch.cat([x, x[..., :4]], -1)[..., : x.shape[-1]],
    "columns": lambda x: x[..., :-4].contiguous(),
    "one sample for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", UNALIGNED)
def test_other_kernels_take_tokens_that_tma_cannot_load(layout):
    case = Case("float16", 3, 70, 96, 5, 1, "mask")
    if layout == "columns":
        case = case._replace(dim=92)
    inputs, options = make(case)
    x = inputs["x"].detach()
    if layout == "columns":
        x = torch.cat([x, x[..., :4]], -1)
    inputs["x"] = UNALIGNED[layout](x).requires_grad_()
    check_budget(case, inputs, options, hopper=False)


# ---- the operators -------------------------------------------------------------------------------


class Call(NamedTuple):
    """Arguments of the operators. dz and dksum are the gradients of z and ksum."""

    x: torch.Tensor
    q: torch.Tensor
    dz: torch.Tensor
    dksum: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    eps: float | None = None
    dropout: float = 0.0


def call_of(case, x=None):
    dtype = getattr(torch, case.dtype)
    padding = padding_of(case.padding, case.batch, case.length)
    rows = case.queries * case.heads
    lead = (case.batch,) if case.per_sample else ()
    made = randn(case.batch, case.length, case.dim, dtype=dtype, grad=False)
    return Call(
        made if x is None else x,
        randn(*lead, rows, case.dim, grad=False).mul(case.dim**-0.5).to(dtype),
        randn(case.batch, rows, case.dim, dtype=dtype, grad=False),
        randn(case.batch, rows, dtype=torch.float32, grad=False) if case.dropout else None,
        padding.get("key_padding_mask"),
        padding.get("lengths"),
        EPS if case.norm else None,
        case.dropout,
    )


def operators(call, need_dx=True):
    """Return z, the sums, dx and dq."""
    x, q, dz, dksum, mask, lengths, eps, dropout = call
    seed = torch.tensor(SEED, device=DEVICE) if dropout else None
    with launches_made() as launches:
        padding = (mask, lengths, None, None)
        z, *saved = torch.ops.mmfused.query_pooling_fwd(x, q, *padding, eps, dropout, seed)
        rest = (*padding, need_dx, dropout, seed)
        dx, dq = torch.ops.mmfused.query_pooling_bwd(dz, dksum, None, x, q, z, *saved, *rest)
    names = {launch.name for launch in launches}
    assert names & {"hopper_forward_kernel", "short_forward_kernel"}
    return dict(z=z, sums=saved[0], ksum=saved[3], dx=dx, dq=dq)


def check_equal(got, want):
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def with_guards(x):
    """Return x as a view into NaN: rows before and after each sample, and columns."""
    batch, length, dim = x.shape
    memory = x.new_full((batch, length + 2 * GUARD, dim + 16), math.nan)
    view = memory[:, GUARD : GUARD + length, 8 : 8 + dim]
    return view.copy_(x)


POISONED = [
    Case("float16", 5, 197, 96, 5, 3, "none", False, 0.0, False),
    Case("bfloat16", 5, 197, 96, 5, 3, "none", True, 0.1, True),
    Case("bfloat16", 5, 197, 96, 5, 3, "lengths", False, 0.0, False),
    Case("float16", 5, 197, 96, 5, 3, "lengths", True, 0.1, True),
    Case("float16", 5, 197, 96, 5, 3, "mask", False, 0.1, True),
    Case("bfloat16", 5, 197, 96, 5, 3, "mask", True, 0.0, False),
    Case("float16", 3, 65, 192, 33, 1, "mask", False, 0.0, False),
    Case("float16", 3, 64, 192, 31, 1, "lengths", False, 0.0, False),
    Case("float16", 5, 31, 96, 5, 3, "lengths", False, 0.0, False),
    Case("bfloat16", 5, 29, 96, 5, 3, "mask", True, 0.1, False),
    Case("bfloat16", 3, 17, 200, 2, 1, "none", True, 0.1, False),
]


@pytest.mark.parametrize("case", POISONED, ids=name_of)
def test_nan_in_ignored_tokens_and_around_the_samples_has_no_effect(case):
    call = call_of(case)
    want = operators(call)
    assert all(value.isfinite().all() or name == "sums" for name, value in want.items())
    x = call.x.clone()
    ignored = call.mask
    if call.lengths is not None:
        ignored = torch.arange(case.length, device=DEVICE) >= call.lengths[:, None]
    if ignored is not None:
        x[ignored] = math.nan
        assert not want["dx"][ignored].any()
    check_equal(operators(call._replace(x=with_guards(x))), want)


@pytest.mark.parametrize("need", ["x", "q"])
def test_a_sample_without_tokens_has_no_gradients(need):
    case = Case("float16", 3, 197, 64, 3, 1, "mask", norm=True, per_sample=True)
    call = call_of(case)
    got = operators(call, need_dx=need == "x")
    assert not got["z"][1].any() and not got["dq"][1].any() and got["dq"][0].any()
    call.mask[:] = True
    got = operators(call, need_dx=need == "x")
    assert not got["z"].any() and not got["dq"].any() and not got["dx"].any()


ALONE = [
    Case("float16", 5, 70, 64, 17, 1, "lengths", False, 0.0, True),
    Case("bfloat16", 3, 65, 768, 31, 1, "none", False, 0.0, True),
    Case("bfloat16", 135, 66, 8, 3, 1, "mask", True, 0.0, False),
    Case("float16", 5, 31, 96, 3, 5, "lengths", True, 0.0, False),
    Case("bfloat16", 3, 32, 768, 2, 1, "none", False, 0.0, False),
]


@pytest.mark.parametrize("case", ALONE, ids=name_of)
def test_a_sample_does_not_depend_on_the_others(case):
    """And a repeat gives the same bits."""
    call = call_of(case)
    want = operators(call)
    check_equal(operators(call), want)
    of_samples = ["x", "dz", "mask", "lengths", *(["q"] if case.per_sample else [])]
    for b in (0, 2, case.batch - 1):
        one = call._asdict()
        for name in of_samples:
            one[name] = None if one[name] is None else one[name][b : b + 1]
        got = operators(Call(**one))
        for name in ("z", "sums", "dx", *(("dq",) if case.per_sample else ())):
            assert torch.equal(got[name][0], want[name][b]), (name, b)


def test_dq_does_not_depend_on_whether_dx_is_computed():
    call = call_of(Case("bfloat16", 3, 130, 96, 32, 1, "mask"))
    want = operators(call)
    got = operators(call, need_dx=False)
    assert not got["dx"].numel() and torch.equal(got["dq"], want["dq"])


@pytest.mark.parametrize(
    "dropout, norm, dtype",
    [
        (0.0, False, torch.float16),
        (0.0, True, torch.bfloat16),
        (0.3, False, torch.bfloat16),
        (0.3, True, torch.float16),
    ],
)
def test_logits_have_no_gradient_if_one_token_has_all_the_weight(dropout, norm, dtype):
    """The gradient of the logits is the difference of two equal terms, rounded equally."""
    case = Case(str(dtype)[6:], 5, 70, 192, 5, 3, "lengths", norm, dropout, True)
    call = call_of(case)
    call.lengths[:] = torch.tensor([1, 70, 66, 1, 0], device=DEVICE)
    # Query r is ten times a token, which is token 4 r of the longer samples.
    tokens = [torch.arange(15) * 4 % max(length, 1) for length in call.lengths.tolist()]
    q = torch.stack([x[at] * 10 for x, at in zip(call.x, tokens, strict=True)])
    got = operators(call._replace(q=q))
    assert got["z"][:4].any(-1).float().mean() > 0.5 and got["dq"].abs().max() == 0
    one_token = operators(call_of(case._replace(length=1, padding="none")))
    assert one_token["dq"].abs().max() == 0


@pytest.mark.parametrize("length", [70, 30])
@pytest.mark.parametrize("bad", [-1, 71, 2**40, -(2**40) + 20])
def test_an_invalid_length_does_not_affect_other_samples(bad, length):
    call = call_of(Case("float16", 3, length, 64, 3, 1, "lengths"))
    call.lengths[:] = torch.tensor([5, 20, length], device=DEVICE)
    want = operators(call)
    call.lengths[1] = bad
    got = operators(call)
    for name in ("z", "dx"):
        assert torch.equal(got[name][0::2], want[name][0::2]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_a_non_finite_token_or_query_affects_only_its_own_outputs(norm, value):
    call = call_of(Case("float16", 3, 70, 96, 5, 1, norm=norm, per_sample=True))
    want = operators(call)
    x, q = call.x.clone(), call.q.clone()
    x[1, 66, 4] = value
    got = operators(call._replace(x=x))
    assert not got["z"][1, :, 4].isfinite().any()
    for name in ("z", "dx", "dq"):
        assert torch.equal(got[name][0::2], want[name][0::2]), name
    q[1, 2] = value
    got = operators(call._replace(q=q))
    others = [0, 1, 3, 4]
    assert not got["z"][1, 2].isfinite().any()
    for name in ("z", "dq"):
        assert torch.equal(got[name][1, others], want[name][1, others]), name
        assert torch.equal(got[name][0::2], want[name][0::2]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("where", ["x", "dz"])
def test_what_is_not_finite_stays_in_its_sample_of_a_pair(where, norm, value):
    call = call_of(Case("float16", 5, 30, 96, 5, 3, norm=norm))
    want = operators(call)
    for bad in (1, 2):  # the second and the first of a pair
        tensor = getattr(call, where).clone()
        tensor[bad, 7, 4] = value
        got = operators(call._replace(**{where: tensor}))
        others = [b for b in range(5) if b != bad]
        assert not got["dx"][bad].isfinite().all()
        for name in ("z", "sums", "dx"):
            assert torch.equal(got[name][others], want[name][others]), name


GRADIENTS = {
    "rows first": lambda dz: dz.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda dz: dz.mT.contiguous().mT,
    "one for all": lambda dz: dz[:1, :1, :1].expand_as(dz),  # of a sum
}


@pytest.mark.parametrize("queries", [5, 48])  # 48 are too many for the Gluon backward
@pytest.mark.parametrize("layout", GRADIENTS)
def test_a_strided_gradient(monkeypatch, layout, queries):
    call = call_of(Case("float16", 3, 70, 96, queries, 1, "mask"))
    dz = GRADIENTS[layout](call.dz)
    assert not dz.is_contiguous()
    want = operators(call._replace(dz=dz.contiguous()))
    launch, given = hopper_backward.launch, []

    def noted(tile, tokens, query, *rest):
        given.append(query["dz_ptr"])
        launch(tile, tokens, query, *rest)

    monkeypatch.setattr(hopper_backward, "launch", noted)
    check_equal(operators(call._replace(dz=dz)), want)
    assert len(given) == (queries == 5)
    for passed in given:  # TMA can load the first of the layouts, the others are copied
        assert (passed.data_ptr() == dz.data_ptr()) == (layout == "rows first")


def test_an_unaligned_gradient_is_taken_by_other_kernels():
    call = call_of(Case("float16", 3, 70, 96, 5, 1, "mask"))
    want = operators(call)
    dz = torch.cat([call.dz.new_zeros(4), call.dz.flatten()])[4:].view_as(call.dz)
    got = operators(call._replace(dz=dz))
    for name in ("dx", "dq"):
        assert relative_error(got[name], want[name]) < 1e-3, name


def test_an_ignored_token_has_gradient_zero_if_its_deviation_is_zero():
    """With ``norm_eps=0``, 1 / deviation of an ignored token is inf."""
    call = call_of(Case("float16", 3, 70, 96, 5, 1, "mask", True))
    dx = operators(call._replace(eps=0.0))["dx"]
    assert not dx[call.mask].any() and dx[~call.mask].isfinite().all()
