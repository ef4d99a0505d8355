"""Hooks, adapters and parametrizations on a module's children act as if each child were called.

If a backend does not support a modification, the call of the module raises an error.
"""

import itertools

import pytest
import torch
from children_cases import ATTACHMENTS, BACKENDS, MODULES, children, outcome
from torch import nn

import mmfused
from mmfused.testing import over_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On "fused", these attachments are tested in all modules, the others only in QueryPooling. Refused
# calls are always tested.
IN_ALL_MODULES = (
    "LoRA",
    "pruning",
    "spectral_norm",
    "forward hook",
    "norm: pruning",
    "norm: forward hook",
)


def is_tested(module, attachment, backend):
    result = outcome(module, attachment, backend)
    chosen = backend != "fused" or attachment in IN_ALL_MODULES or module == "QueryPooling"
    return result == "refused" or (result == "equal" and chosen)


CASES = [case for case in itertools.product(MODULES, ATTACHMENTS, BACKENDS) if is_tested(*case)]


def build(name, attachment, attach=True):
    torch.manual_seed(0)
    module = MODULES[name].make()
    for parameter in module.parameters():
        # If biases were 0 and norm weights 1, the use of a wrong parameter might go unnoticed.
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data += scale * torch.randn_like(parameter)
    attached = ATTACHMENTS[attachment]
    if attach:
        kind = nn.Linear if attached.to == "linear" else nn.LayerNorm
        module = attached.attach(module, children(module, kind))
    return module if attached.training is None else module.train(attached.training)


def results(call, module, inputs, dtype):
    inputs = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(2)  # for the dropout of adapters
    out = call(module, *inputs)
    leaves = {f"d{i}": x for i, x in enumerate(inputs) if x.requires_grad}
    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out), allow_unused=True)
    filled = (
        torch.zeros_like(x) if g is None else g
        for x, g in zip(leaves.values(), gradients, strict=True)
    )
    return {"out": out.detach(), **dict(zip(leaves, filled, strict=True))}


@pytest.mark.parametrize(("name", "attachment", "backend"), CASES, ids=map(" | ".join, CASES))
def test_attachments_act_as_if_children_were_called(name, attachment, backend):
    attached, case = ATTACHMENTS[attachment], MODULES[name]
    if attached.needs:
        pytest.importorskip(attached.needs)
    module = build(name, attachment)
    plain_module = build(name, attachment, not attached.neutral)
    torch.manual_seed(1)
    inputs = case.inputs()
    with mmfused.backend(backend):
        if outcome(name, attachment, backend) == "refused":
            message = (
                "must be called.*: remove what is attached .* or use backend 'auto' or 'composed'"
            )
            with pytest.raises(RuntimeError, match=message):
                case.call(module, *inputs)
        elif not attached.gradients:
            with torch.no_grad():
                out = case.call(module, *inputs)
                torch.testing.assert_close(out, case.plain(plain_module, *inputs))
        else:
            exact = results(case.plain, build(name, attachment).double(), inputs, torch.float64)
            actual = results(case.call, module, inputs, torch.float32)
            plain = results(case.plain, plain_module, inputs, torch.float32)
            # The exact gradient of a key bias is 0. The float32 gradient is pure rounding error.
            noise = {n for n, x in exact.items() if x.norm() < 1e-10}
            assert all(actual[n].norm() < 1e-4 for n in noise)
            budget = [
                {n: x for n, x in d.items() if n not in noise} for d in (actual, exact, plain)
            ]
            # A loose bound is enough here. The tests of each op use a factor of 2.
            assert not over_budget(*budget, factor=8)


def test_the_cases_cover_every_outcome_and_attachment():
    assert {outcome(*case) for case in CASES} == {"equal", "refused"}
    assert {attachment for _, attachment, _ in CASES} == set(ATTACHMENTS)


# ---- LoRA ----------------------------------------------------------------------------------------

ADAPTED = {name: (case.make, case.inputs, case.call) for name, case in MODULES.items()} | {
    "QTransform": (
        lambda: mmfused.QTransform(16, 3, depth=2, num_heads=2),
        lambda: (torch.randn(2, 5, 16),),
        lambda m, x: m(x),
    ),
    "TokenGate": (
        lambda: mmfused.TokenGate(16),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 5, 16)),
        lambda m, a, b: m(a, b),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAPTED)
def test_lora_changes_the_output_trains_and_merges(name, backend):
    peft = pytest.importorskip("peft")
    make, inputs, call = ADAPTED[name]
    module, inputs = make(), inputs()
    names = children(module, nn.Linear)
    with mmfused.backend(backend):
        base = call(module, *inputs).detach()
        config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(module), config)
        out = call(model.base_model.model[0], *inputs)
        assert (out - base).abs().max() > 1e-2
        # The gradient of out.sum() would be 0, as the sum of QTransform's LayerNorm is constant.
        out.backward(torch.randn_like(out))
        gradients = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
        assert len(gradients) == 2 * len(names)
        assert all(g.abs().max() > 0 for g in gradients.values())
        with model.disable_adapter():
            disabled = call(model.base_model.model[0], *inputs)
        torch.testing.assert_close(disabled, base, rtol=0, atol=1e-6)
        merged = call(model.merge_and_unload()[0], *inputs)
        torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_on_expert_weights_trains_and_merges(backend):
    """peft's target_parameters parametrizes weights that are not in a child module."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["moe.w_up", "moe.w_down"],
        init_lora_weights=False,
    )
    model, x = nn.ModuleDict({"moe": mmfused.TopKMoE(16, 16, 4)}), torch.randn(7, 16)
    model.forward = lambda x: model["moe"](x)[0]
    base = model(x)
    adapted = peft.get_peft_model(model, config)
    with mmfused.backend(backend):
        out = adapted(x)
        out.sum().backward()
        assert (out - base).abs().max() > 1e-2
        assert all(p.grad.any() for n, p in adapted.named_parameters() if "lora" in n)
        torch.testing.assert_close(adapted.merge_and_unload()(x), out, rtol=1e-5, atol=1e-5)


def test_items_of_a_batch_may_use_different_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(mmfused.QueryPooling(16, 2, 2)), config).eval()
    model.add_adapter("other", config)
    x = torch.randn(2, 3, 16)
    mixed, alone = model(x, adapter_names=["default", "other"]), []
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        alone.append(model(x)[i])
    assert (alone[0] - model(x)[0]).abs().max() > 1e-2
    torch.testing.assert_close(mixed, torch.stack(alone))


# ---- state and counts ----------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [True, False], ids=["hooked", "plain"])
def test_an_item_gives_the_same_result_alone_and_in_a_batch(attach):
    """The larger batch folds out_proj into v_proj, unless out_proj has a hook."""
    module, calls = mmfused.QueryPooling(8, 4, 1, out_proj=True), []
    if attach:
        module.out_proj.register_forward_hook(lambda m, args, out: calls.append(1) or out.square())
    x = torch.randn(4, 9, 8)
    torch.testing.assert_close(module(x[:1]), module(x)[:1])
    assert len(calls) == 2 * attach


def test_pruned_weight_follows_the_optimizer():
    module = mmfused.QueryPooling(16, 2)
    torch.nn.utils.prune.l1_unstructured(module.k_proj, "weight", 0.5)
    optimizer, x, seen = torch.optim.SGD(module.parameters(), lr=1.0), torch.randn(2, 3, 16), []
    for _ in range(3):
        module(x).square().sum().backward()
        seen.append(module.k_proj.weight.detach().clone())
        optimizer.step()
    assert not torch.equal(seen[1], seen[2]) and (seen[2] == 0).sum() == 16 * 16 // 2


@pytest.mark.parametrize("name", MODULES)
def test_spectral_norm_iterates_once_per_forward(name):
    """In training mode, each computation of the weight is a step of the power iteration."""
    module, plain = build(name, "old spectral_norm"), build(name, "old spectral_norm")
    inputs = MODULES[name].inputs()
    MODULES[name].call(module, *inputs)
    MODULES[name].plain(plain, *inputs)
    for (key, ours), theirs in zip(module.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), key


def test_a_wrong_output_of_a_child_is_an_error():
    module = mmfused.TopKMoE(8, 8, 4)
    module.router = nn.Sequential(nn.Linear(8, 5))
    message = r"TopKMoE.router: got shape \(3, 5\) as output, expected \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        module(torch.randn(3, 8))
    module = mmfused.GatedCrossAttention(8, 2)
    module.k_proj.register_forward_hook(lambda m, args, out: None if out is None else (out,))
    message = "GatedCrossAttention.k_proj: got a tuple as output, expected"
    with pytest.raises(ValueError, match=message):
        module(torch.randn(1, 3, 8), torch.randn(1, 3, 8))


def test_called_children_get_no_nan_from_ignored_tokens():
    module = mmfused.QueryPooling(8, 2, 2)
    moe = mmfused.TopKMoE(8, 8, 4)
    for child in (module.k_proj, module.v_proj, moe.router):
        child.register_forward_hook(lambda m, args, out: out + 0)
    x, ignore = torch.randn(2, 3, 8), torch.tensor([[False, False, True]] * 2)
    x[ignore] = float("nan")
    (module(x, ignore).sum() + moe(x, token_padding_mask=ignore)[0].sum()).backward()
    assert all(p.grad.isfinite().all() for p in (*module.parameters(), *moe.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tensor_on_both_sides_gets_both_norms(backend):
    for name in ("GatedCrossAttention", "BidirectionalGatedCrossAttention"):
        module, y = build(name, "LoRA", attach=False), torch.randn(2, 5, 16)
        with mmfused.backend(backend):
            out, want = MODULES[name].call(module, y, y), MODULES[name].plain(module, y, y)
        torch.testing.assert_close(out, want)
        out.sum().backward()
        assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("QueryPooling", "k_proj"),
        ("QueryPooling", "v_proj"),
        ("GatedCrossAttention", "q_proj"),
        ("GatedCrossAttention", "out_proj"),
        ("GatedCrossAttention", "gate_proj"),
        ("TopKMoE", "router"),
    ],
)
def test_a_child_that_is_none_is_an_error(name, child, backend):
    module = MODULES[name].make()
    setattr(module, child, None)
    message = f"{child}: got None, expected|w_g: got None with gate 'channel', expected"
    error = pytest.raises((TypeError, ValueError), match=message)
    with mmfused.backend(backend), error:
        MODULES[name].call(module, *MODULES[name].inputs())


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_called_children_get_the_full_batch_once(backend):
    """Samples without context are not skipped if children are called."""
    module, calls = mmfused.BidirectionalGatedCrossAttention(16, 2), []
    for child in (module.norm_a, module.to_a.k_proj):
        child.register_forward_hook(
            lambda m, args, out: calls.append(len(out)) or out * torch.ones(4)[:, None, None]
        )
    a, b = torch.randn(4, 5, 16), torch.randn(4, 3, 16)
    present = torch.tensor([True, False, True, True])
    ignore = torch.zeros(4, 5, dtype=torch.bool)
    ignore[0, 3:] = True
    with mmfused.backend(backend):
        outs = module(a, b, b_present=present, a_key_padding_mask=ignore)
    assert calls == [4, 4] and torch.equal(outs[0][1], a[1])
    module.norm_a._forward_hooks.clear()
    module.to_a.k_proj._forward_hooks.clear()
    torch.testing.assert_close(outs, module(a, b, b_present=present, a_key_padding_mask=ignore))


def test_hooks_on_a_direction_are_called():
    module, calls = mmfused.BidirectionalGatedCrossAttention(16, 2), []
    module.to_a.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.to_b.register_forward_hook(lambda m, args, out: calls.append("after"))
    module(torch.randn(1, 2, 16), torch.randn(1, 3, 16))
    assert calls == ["before", "after"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_tokens_keep_their_dtype_if_a_child_casts_its_weight(dtype):

    class Stored(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype))

    for name in ("QueryPooling", "GatedCrossAttention", "TopKMoE"):
        module = MODULES[name].make()
        for child in children(module, nn.Linear):
            linear = module.get_submodule(child)
            linear.__class__ = Stored
            linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        inputs = MODULES[name].inputs()
        out = MODULES[name].call(module, *inputs)
        torch.testing.assert_close(out, MODULES[name].plain(module, *inputs))


@pytest.mark.parametrize("attachment", ["LoRA", "forward hook", "pruning"])
@pytest.mark.parametrize("name", ["QueryPooling", "GatedCrossAttention", "TopKMoE"])
def test_attachments_compile_without_a_graph_break(name, attachment):
    if ATTACHMENTS[attachment].needs:
        pytest.importorskip(ATTACHMENTS[attachment].needs)
    module, case = build(name, attachment), MODULES[name]
    inputs = case.inputs()
    want = case.call(module, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: case.call(module, *args), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(*inputs), want)


# ---- sharded children ----------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    if dist.is_initialized():
        pytest.skip("a process group is already initialized")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("inside", [False, True], ids=["child", "inside"])
@pytest.mark.parametrize("name", MODULES)
def test_children_under_fully_shard_match_plain_children(name, inside, one_rank):
    from torch.distributed.fsdp import fully_shard

    module, plain = (build(name, "LoRA", attach=False) for _ in range(2))
    for child in children(module, nn.Linear):
        inner = module.get_submodule(child)
        if inside:  # the called child contains the sharded module, as with an adapter
            module.set_submodule(child, nn.Sequential(inner))
        fully_shard(inner, mesh=one_rank)
    inputs = MODULES[name].inputs()
    out, want = MODULES[name].call(module, *inputs), MODULES[name].plain(plain, *inputs)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    want.sum().backward()
    for (key, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        gradient = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(gradient, theirs.grad, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", MODULES)
def test_children_with_tensor_parallelism_are_rejected(name, one_rank):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    module = MODULES[name].make()
    sharded = {"router", "k_proj", "to_a.k_proj"} & set(children(module, nn.Linear))
    parallelize_module(module, one_rank, {child: ColwiseParallel() for child in sharded})
    with pytest.raises(TypeError, match="got a shard .*, expected a complete weight"):
        MODULES[name].call(module, *MODULES[name].inputs())


def test_a_direction_that_is_sharded_separately_is_rejected(one_rank):
    from torch.distributed.fsdp import fully_shard

    module = mmfused.BidirectionalGatedCrossAttention(16, 2)
    fully_shard(module.to_a, mesh=one_rank)
    message = "Attention.to_a: got a sharded module, expected fully_shard on the whole"
    with pytest.raises(TypeError, match=message):
        module(torch.randn(1, 2, 16), torch.randn(1, 3, 16))
