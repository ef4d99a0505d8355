"""Tests that exported programs (torch.export, ONNX) match the module, also at other sizes.

A torch.export program without a kernel also has the module's gradients. A program with a kernel
raises if a gradient is needed.
"""

import pytest
import torch
from module_cases import D, case, floats, outputs, some
from torch import Tensor, nn
from torch.export import Dim, export

import mmfused
from mmfused import losses
from mmfused.library import active_exporter


class Flat(nn.Module):
    """Pass a tuple and a dict of arguments to a module; return the differentiable outputs."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, args, named):
        return outputs(self.module(*args, **named))


def flat(name: str):
    module, make = case(name)
    return Flat(module), make


def dynamic(args: tuple, named: dict, tokens: bool) -> tuple:
    """Return the dynamic dimensions of the arguments.

    The first dimension is the batch size; candidates have two rows more. With ``tokens``, the
    second dimension is the number of tokens; a context has one token more.
    """
    batch, length = Dim("batch", min=2, max=64), Dim("tokens", min=2, max=32)
    sizes = {args[0].shape[0]: batch, args[0].shape[0] + 2: batch + 2}
    lengths = {args[0].shape[1]: length, args[0].shape[1] + 1: length + 1} if tokens else {}

    def of(x: Tensor):
        second = {1: lengths[x.shape[1]]} if x.dim() > 1 and x.shape[1] in lengths else {}
        return {0: sizes[x.shape[0]]} | second if x.dim() else None

    return tuple(of(x) for x in args), {key: of(x) for key, x in named.items()}


def with_gradients(module, args, named) -> dict[str, Tensor]:
    """Return outputs, and gradients of the parameters and of floating-point arguments."""
    args = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in args)
    leaves = dict(module.named_parameters())
    leaves |= {str(i): x for i, x in enumerate(args) if x.is_floating_point()}
    outs = list(module(args, named))
    loss = sum(x.square().sum() for x in outs)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    values = {f"out{i}": x.detach() for i, x in enumerate(outs)}
    return values | dict(zip(leaves, found, strict=True))


def assert_close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def compare(exported, module, make, sizes) -> None:
    for batch, tokens in sizes:
        args, named = make(batch, tokens)
        want, got = (with_gradients(f, args, named) for f in (module, exported))
        assert want.keys() == got.keys()
        for name, value in want.items():
            if value is None:  # no output depends on this leaf
                assert got[name] is None
            else:
                assert_close(got[name], value, name)
        with torch.no_grad():
            for got_, want_ in zip(exported(args, named), module(args, named), strict=True):
                assert_close(got_, want_, "without gradients")


SIZES = [(2, 2), (5, 9), (64, 3)]
ANY_SIZE = [
    "pool lengths",
    "pool dropout",
    "gated constant",
    "experts swiglu",
    "contrastive symmetric",
    "contrastive keys",
]


@pytest.mark.parametrize("name", ANY_SIZE)
def test_export_with_dynamic_batch_and_tokens_matches_the_module(name):
    module, make = flat(name)
    args, named = make(4, 6)
    tokens = "contrastive" not in name
    exported = export(module, (args, named), dynamic_shapes=dynamic(args, named, tokens))
    compare(exported.module(), module, make, SIZES)
    own = {str(node.target) for node in exported.graph.nodes if "mmfused" in str(node.target)}
    assert own == ({"mmfused.segment_linear.default"} if "experts" in name else set())


STRICT = ["gated constant", "experts", "contrastive keys"]


@pytest.mark.parametrize("name", STRICT)
def test_strict_export_matches_the_module(name):
    module, make = flat(name)
    args, named = make(4, 6)
    shapes = dynamic(args, named, "contrastive" not in name)
    with mmfused.backend("composed"):
        exported = export(module, (args, named), dynamic_shapes=shapes, strict=True)
    compare(exported.module(), module, make, SIZES[:2])


@pytest.mark.parametrize("name", ["pool bias mask", "experts sigmoid", "contrastive"])
def test_export_of_one_size_matches_the_module(name):
    module, make = flat(name)
    compare(export(module, make(4, 6)).module(), module, make, [(4, 6)])


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(floats(3, 5, D))

    def forward(self, x, indices, scores):
        routing = mmfused.routing_from_indices(indices, scores.softmax(-1), 3)
        return mmfused.grouped_linear(x, routing, self.weight, combine=True)


def test_export_of_experts_with_given_indices_matches_the_module():
    def make(tokens, _):
        return (floats(tokens, D), torch.randint(0, 3, (tokens, 2)), floats(tokens, 2)), {}

    module, example = Flat(Routed()), make(4, None)
    exported = export(module, example, dynamic_shapes=dynamic(*example, False))
    compare(exported.module(), module, make, [(2, None), (9, None)])
    assert not any("expert_order" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("name", ["pool bias mask", "experts", "contrastive"])
def test_exported_kernel_raises_if_a_gradient_is_needed(name):
    module, make = case(name)
    module = Flat(module.float())
    args, named = make(2, 3)
    args = tuple(x.float() if x.is_floating_point() else x for x in args)
    with mmfused.backend("fused"):
        exported = export(module, (args, named)).module()
        with torch.no_grad():
            for got, want in zip(exported(args, named), module(args, named), strict=True):
                torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="holds the kernel without its gradient"):
        exported((args[0].requires_grad_(), *args[1:]), named)


class Losses(nn.Module):
    def forward(self, query, candidate, alignment):
        return (
            losses.positive_similarity(query, candidate),
            losses.product_hinge(query, candidate, scale=2.0),
            losses.product_consistency(
                (query, candidate), (candidate, query), (query, query), top=3
            ),
            losses.sigmoid_contrastive(query, candidate),
            *losses.dual_alignment(alignment, query.softmax(1)),
        )


def test_export_of_losses_with_dynamic_batch_matches_the_module(monkeypatch):
    def make(batch, _):
        return (floats(batch, D), floats(batch, D), floats(D, 3)), {}

    module = Flat(Losses())
    batch = Dim("batch", min=3, max=64)  # top=3 needs three rows in the exported graph
    # Make eager mode compute several blocks of pairs. The exported graph always has one block.
    monkeypatch.setattr(losses, "BLOCK_PAIRS", 64)
    shapes = (({0: batch}, {0: batch}, None), {})
    exported = export(module, make(6, None), dynamic_shapes=shapes)
    compare(exported.module(), module, make, [(3, None), (11, None), (64, None)])


# ---- ONNX ----------------------------------------------------------------------------------------


class Positional(nn.Module):
    def __init__(self, module, count: int, names: list[str]):
        super().__init__()
        self.module, self.count, self.names = module, count, names

    def forward(self, *tensors):
        named = dict(zip(self.names, tensors[self.count :], strict=True))
        return tuple(outputs(self.module(*tensors[: self.count], **named)))


def small(name: str):
    """Return a case; "experts" is a smaller module here, because the ONNX exporter is slow."""
    if name == "experts":
        module = mmfused.TopKMoE(D, 12, 2, 2, selection_bias=True)
        return module, lambda batch, tokens: (
            (floats(batch, tokens, D),),
            dict(token_padding_mask=some(batch, tokens)),
        )
    if name == "as many samples as heads":  # the exporter's optimizer can confuse the two sizes
        return mmfused.QueryPooling(32, 3, 4), lambda batch, tokens: ((floats(batch, 20, 32),), {})
    return case(name)


def check_onnx(module, make, is_dynamic: bool, sizes: list[int], tmp_path) -> None:
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    runtime = pytest.importorskip("onnxruntime")

    def tensors(args, named):
        return tuple(x.float() if x.is_floating_point() else x for x in (*args, *named.values()))

    args, named = make(4, 5)
    wrapped = Positional(module.float(), len(args), list(named)).eval()
    shapes = dynamic(args, named, False)
    shapes = ((*shapes[0], *shapes[1].values()),) if is_dynamic else None
    with mmfused.backend("composed"):
        options = dict(dynamo=True, dynamic_shapes=shapes, verbose=False)
        program = torch.onnx.export(wrapped, tensors(args, named), **options)
    assert not [node for node in program.model.graph if "mmfused" in node.domain + node.op_type]
    program.save(tmp_path / "module.onnx")
    session = runtime.InferenceSession(tmp_path / "module.onnx")
    for size in sizes:
        inputs = tensors(*make(size, 5))
        given = zip(program.model.graph.inputs, inputs, strict=True)
        given = {node.name: x.numpy() for node, x in given}
        used = {node.name for node in session.get_inputs()}
        got = session.run(None, {name: value for name, value in given.items() if name in used})
        with torch.no_grad():
            for value, want in zip(got, wrapped(*inputs), strict=True):
                torch.testing.assert_close(torch.from_numpy(value), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gated constant", "experts", "contrastive"])
def test_onnx_with_dynamic_batch_matches_the_module(name, tmp_path):
    check_onnx(*small(name), True, [2, 7], tmp_path)


def test_onnx_of_one_size_matches_the_module(tmp_path):
    check_onnx(*small("as many samples as heads"), False, [4], tmp_path)


def test_onnx_export_of_a_kernel_raises(monkeypatch):
    module, make = case("pool")
    x = make(2, 3)[0][0].float()
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with (
        mmfused.backend("fused"),
        pytest.raises(RuntimeError, match="cannot run here: ONNX has no such operator"),
    ):
        module.float()(x)


def test_graph_made_distinguishes_compile_from_export():
    def graph(x):
        return x + {None: 0, "export": 1, "onnx": 2}[active_exporter()]

    class Module(torch.nn.Module):
        def forward(self, x):
            return graph(x)

    x = torch.zeros(1)
    assert graph(x) == torch.compile(graph, backend="eager")(x) == 0
    for strict in (False, True):
        assert torch.export.export(Module(), (x,), strict=strict).module()(x) == 1
    assert torch.compile(graph, backend="eager")(x) == 0
