"""All tensor arguments and upstream gradients may be strided, expanded or offset views."""

import pytest
import torch
from drawing import Draw
from function_inputs import MAKERS
from public_functions import (
    arguments,
    differentiable,
    has_kernels,
    in_float64,
    leaves,
    public_functions,
    replaced,
    run,
    tensor_arguments,
)
from strided_views import EXPANDED, SAME_VALUES, lay_out

from mmfused.testing import relative_error

FUNCTIONS = public_functions()
SMALL = dict(
    batch=3,
    tokens=5,
    dim=7,
    heads=2,
    k_dim=3,
    v_dim=4,
    queries=3,
    head_dim=5,
    context_dim=7,
    keys=6,
    tokens_a=5,
    tokens_b=6,
)
SMALL |= dict(
    candidates=9,
    more=4,
    experts=5,
    k=2,
    num_segments=2,
    std=1.0,
    temperature=0.2,
    mean=0,
    out=3,
    hidden=6,
    objectives=3,
)
SMALL |= {"one expert": False, "large": 1.0, "sorted by a kernel": True}
# Options of each function that together use all its tensor arguments. Arguments that exclude each
# other are in different variants.
VARIANTS = {
    "query_pooling": [
        dict(packed=False, padding="mask", form="absorbed", per_sample=True, return_lse=False),
        dict(packed=False, padding="lengths", form="absorbed", per_sample=False, dropout=False),
        dict(packed=False, padding="mask", form="projected", per_sample=False, dropout=False),
        dict(packed=True, form="absorbed", per_sample=False, dropout=False),
    ],
    "pooling_weights": [
        dict(packed=False, padding="mask"),
        dict(packed=False, padding="lengths"),
        dict(packed=True),
    ],
    "gated_cross_attention": [
        dict(gate="channel", indicator=True, missing="zero", context_padding="mask"),
        dict(
            gate="token",
            indicator="batch",
            missing="constant",
            context_padding="lengths",
            dropout=False,
        ),
        dict(gate="none", pre_norm=False, missing="skip", context_padding="mask", dropout=False),
    ],
    "bidirectional_gated_cross_attention": [
        dict(gate="channel", indicator=True, missing="zero", a_padding="mask", b_padding="lengths"),
        dict(
            gate="token",
            indicator="batch",
            missing="skip",
            a_padding="lengths",
            b_padding="mask",
            dropout=False,
        ),
    ],
    "masked_info_nce": [
        dict(
            target=True,
            keys="both",
            ids="both",
            same_id="mean",
            symmetric=False,
            label_smoothing=0.1,
        ),
        dict(
            target=False, keys="both", ids="both", same_id="drop", symmetric=True, reduction="none"
        ),
    ],
    "topk_routing": [
        dict(score="sigmoid", balance="switch", indices=False),
        dict(score="softmax", balance="mse", renormalize=True),
    ],
    "topk_routing_from_input": [
        dict(score="sigmoid", balance="switch", indices=False),
        dict(score="softmax", balance="gshard", jitter=False),
    ],
    "grouped_linear": [dict(gather=True, combine=True), dict(gather=False, combine=False)],
    "grouped_mlp": [
        dict(activation="swiglu", packed=False),
        dict(activation="swiglu", packed=True),
        dict(activation="gelu"),
    ],
}
# Arguments that cannot be expanded: permutations with their counts, and a tensor that is written
# in place.
NOT_EXPANDED = (
    "routing.indices",
    "routing.order",
    "routing.position",
    "routing.offsets",
    "routing.tiles",
    "bias in place",
)
# These go through a LayerNorm, which divides the rounding errors of equal numbers by almost 0.
NOT_EXPANDED_LAST = ("x", "context", "a", "b")


def make(function, variant):
    draw = Draw(
        f"{function} {variant}", full=True, fixed=SMALL | VARIANTS.get(function, [{}])[variant]
    )
    return MAKERS[function](draw)


def in_layout(function, inputs, layout, only=None):
    """Return the arguments with all tensors, or only the one named ``only``, in ``layout``."""
    views = {}
    for path, tensor in leaves(inputs).items():
        kept = path in NOT_EXPANDED or (function == "update_selection_bias" and path == "bias")
        kept = kept or (layout == "expanded last" and path in NOT_EXPANDED_LAST)
        unchanged = (only is not None and path != only) or (kept and layout in EXPANDED)
        views[path] = tensor if unchanged else lay_out(tensor, layout)
    return replaced(inputs, views)


def upstream_of(layout):
    """Return a function that makes upstream gradients in ``layout``, equal in all runs."""

    def upstream(name, out):
        values = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64
        )
        return lay_out(values.float().double(), layout)

    return upstream


CASES = [(name, variant) for name in FUNCTIONS for variant in range(len(VARIANTS.get(name, [{}])))]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_variants_pass_every_tensor_argument(function):
    given = {
        path for name, variant in CASES if name == function for path in leaves(make(name, variant))
    }
    missing = set(tensor_arguments(FUNCTIONS[function])) - given
    assert not missing, (
        f"no test passes the tensors {sorted(missing)} to {function}: add them to its maker in "
        "function_inputs.py and to VARIANTS"
    )
    assert {path.split(".")[0] for path in given} <= set(arguments(FUNCTIONS[function])), (
        "the maker passes unknown arguments"
    )


def test_tensor_arguments_finds_tensors_and_tuples_of_tensors():
    def pool(
        x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor] | None = None, *, rate: float = 0.1
    ): ...

    assert tensor_arguments(pool) == ["x", "norm.0", "norm.1"]


@pytest.mark.parametrize("backend", ["reference", "composed", "fused"])
@pytest.mark.parametrize(("function", "variant"), CASES)
def test_every_tensor_may_be_a_view(function, variant, backend):
    if backend != "composed" and not has_kernels(function):
        pytest.skip("the function has no kernels, so all backends are the same")
    inputs = make(function, variant)
    if backend == "fused" and inputs.get("form") == "projected":
        pytest.skip("the projected form has no kernel")
    cache, faults = {}, []
    for layout in SAME_VALUES[1:] + EXPANDED:
        found = compare(function, inputs, backend, layout, cache)
        if found:
            failing = [
                path
                for path in leaves(inputs)
                if compare(function, inputs, backend, layout, cache, only=path)
            ]
            faults.append(f"{layout}: {', '.join(failing) or 'all together'}: {' '.join(found)}")
    assert not faults, "\n".join(faults)


def compare(function, inputs, backend, layout, cache, only=None):
    """Return the differences between results of views and of dense tensors with the same values.

    Floats are compared by their error, integers exactly.
    """
    views = in_layout(function, inputs, layout, only)
    wanted = differentiable(function, inputs)
    options = dict(wanted=wanted, upstream=upstream_of("contiguous" if only else layout))
    if layout in EXPANDED:  # expanding changes the values
        dense = in_layout(function, views, "contiguous")
        exact, plain = exact_and_plain(function, dense, backend, **options)
    else:
        if ("dense", backend) not in cache:
            cache["dense", backend] = exact_and_plain(function, inputs, backend, **options)
        exact, plain = cache["dense", backend]
    actual = run(function, views, backend, **options, layout="contiguous" if only else layout)
    integers = [name for name, value in exact.items() if not value.is_floating_point()]
    faults = [f"{name} differs." for name in integers if not torch.equal(actual[name], plain[name])]
    floats = [
        {name: value for name, value in part.items() if name not in integers}
        for part in (actual, exact, plain)
    ]
    actual, exact, plain = floats
    # A gradient that is 0 but for rounding has no relative error.
    exact = {name: x if x.norm() > 1e-12 else torch.zeros_like(x) for name, x in exact.items()}
    for name, want in exact.items():
        # A wrong stride gives an error near 1. The budget is wide because some CPUs round matrix
        # products differently for each layout.
        allowed = 10 * (relative_error(plain[name], want) + torch.finfo(plain[name].dtype).eps)
        error = relative_error(actual[name], want)
        if not error <= allowed:
            faults.append(f"{name}: relative error {error:.3e}, allowed {allowed:.3e}.")
    return faults


def exact_and_plain(function, inputs, backend, **options):
    return run(function, in_float64(inputs), "reference", **options), run(
        function, inputs, backend, **options
    )
