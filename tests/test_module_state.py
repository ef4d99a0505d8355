"""Modules can be copied, pickled, built on the meta device, loaded with assign=True and reset."""

import copy
import io
import pickle

import pytest
import torch
from children_cases import MODULES
from torch import nn

import mmfused
from mmfused.models.fluid_experts import ExpertLinear

D = 16
AVAILABLE = [[True, True, True, False], [True, True, True, True]]


def mixture():
    available = torch.tensor(AVAILABLE, device="cpu")
    options = dict(activation="swiglu", selection_bias=True, available=available, num_segments=2)
    return mmfused.TopKMoE(D, D, 4, **options)


# name -> (make, inputs, call)
ALL = {name: (case.make, case.inputs, case.call) for name, case in MODULES.items()} | {
    "QTransform": (
        lambda: mmfused.QTransform(D, 3, depth=2, num_heads=2),
        lambda: (torch.randn(2, 5, D),),
        lambda m, x: m(x),
    ),
    "TokenGate": (
        lambda: mmfused.TokenGate(D, (D, 8)),
        lambda: (torch.randn(2, 5, D), torch.randn(2, 5, D)),
        lambda m, a, b: m(a, b),
    ),
    "BidirectionalGatedCrossAttention, shared": (
        lambda: mmfused.BidirectionalGatedCrossAttention(D, 2, share_weights=True),
        MODULES["BidirectionalGatedCrossAttention"].inputs,
        MODULES["BidirectionalGatedCrossAttention"].call,
    ),
    "TopKMoE, segments": (
        mixture,
        lambda: (torch.randn(6, D), torch.tensor([0, 1] * 3)),
        lambda m, x, segments: m(x, segments=segments)[0],
    ),
    "MaskedInfoNCE": (
        lambda: mmfused.MaskedInfoNCE(0.2),
        lambda: (torch.randn(6, D), torch.randn(6, D)),
        lambda m, query, candidate: m(query, candidate),
    ),
    "MaskedInfoNCE, learned": (
        lambda: mmfused.MaskedInfoNCE(0.2, learnable_temperature=True),
        lambda: (torch.randn(6, D), torch.randn(6, D)),
        lambda m, query, candidate: m(query, candidate),
    ),
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("name", ALL)
def test_copies_give_the_same_output_and_share_no_memory(name, copied):
    make, inputs, call = ALL[name]
    module, inputs = make(), inputs()
    out = call(module, *inputs)
    if out.requires_grad:
        out.sum().backward()  # the parameters to copy have gradients
    twin = copied(module)
    assert torch.equal(call(twin, *inputs), call(module, *inputs))
    for original, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(original, other) and original.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_a_module_on_the_meta_device_loads_a_state_with_assign(name):
    make, inputs, call = ALL[name]
    module, inputs = make(), inputs()
    with torch.device("meta"):
        empty = make()
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(call(empty, *inputs), call(module, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_reset_parameters_after_to_empty_equals_a_new_module(name, dtype):
    make, inputs, call = ALL[name]
    new = make()
    with torch.device("meta"):
        empty = make()
    empty.to(dtype).to_empty(device="cpu")
    # Fill the uninitialized memory, so that the result does not depend on its contents.
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else False)
    for module in (new.to(dtype), empty):
        torch.manual_seed(5)
        module.reset_parameters()
    state, expected = empty.state_dict(), new.state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )
    call(empty, *(x.to(dtype) if x.is_floating_point() else x for x in inputs()))


@pytest.mark.parametrize("name", ALL)
def test_reset_parameters_draws_from_the_constructors_distribution(name):
    torch.manual_seed(5)
    many = [ALL[name][0]() for _ in range(10)]
    states = [dict(module.named_parameters()) for module in many]
    fresh = {key: torch.stack([state[key].detach() for state in states]) for key in states[0]}
    for module in many:
        for parameter in module.parameters():
            parameter.data.fill_(9.0)
        module.reset_parameters()
    for key, values in fresh.items():
        again = torch.stack([module.get_parameter(key).detach() for module in many])
        assert abs(again.mean() - values.mean()) <= 0.5 * values.std() + 1e-6, key
        torch.testing.assert_close(again.std(), values.std(), rtol=0.3, atol=1e-6, msg=key)


def test_submodules_can_be_reset_in_any_order():
    """FSDP calls reset_parameters of each submodule that has parameters itself."""
    module = nn.ModuleList(make() for make, *_ in ALL.values())
    module.append(ExpertLinear(4, D, 8, norm=True))
    parts = {part for part in module.modules() if any(True for _ in part.parameters(recurse=False))}
    assert all(hasattr(part, "reset_parameters") for part in parts)
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_reset_parameters_restores_the_available_experts():
    with torch.device("meta"):
        moe = mixture()
    moe.to_empty(device="cpu")
    moe.available.fill_(False)
    moe.reset_parameters()
    assert moe.available.tolist() == AVAILABLE and not moe.selection_bias.any()
