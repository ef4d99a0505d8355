"""Triton 3.6, the oldest supported one, can pass the arguments of every launch.

A tensor descriptor in a tuple compiles with each Triton, but the launcher of 3.6 expands only those
that are arguments of their own, so that the launch would fail on a GPU.
"""

import functools
import re
from typing import NamedTuple

import pytest
import torch
import triton
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from mmfused.cli.compiling import cases_of
from mmfused.kernels.recording import Launch, launches_for
from mmfused.ops import OPS

# What the launcher of 3.6 knows besides pointers, tuples and constants.
NUMBERS = {f"{sign}{bits}" for sign in "iu" for bits in (1, 8, 16, 32, 64)}
NUMBERS |= {"fp16", "bf16", "fp32", "fp64"}


def signature_of(launch: Launch):
    """Return pairs of name and type, as Triton finds them at a launch."""
    types = {name: mangle_type(value, True) for name, value in launch.args.items()}
    types |= dict.fromkeys(launch.constexprs, "constexpr")
    return tuple((name, types[name]) for name in launch.kernel.arg_names)


@functools.cache
def signatures():
    """Return the distinct pairs of kernel and signature of all launches on sm_80 and sm_90."""
    found = {}
    for arch in (80, 90):
        for op in OPS:
            for case in cases_of(op).CASES.values():
                with launches_for(arch) as launches:
                    cases_of(op).launch(case)
                found |= {(each.name, signature_of(each)): each for each in launches}
    return list(found)


def leaves(name, kind, nested=False):
    """Yield name, type and whether it is in a tuple for each parameter in an argument."""
    if isinstance(kind, tuple):
        for number, each in enumerate(kind):
            yield from leaves(f"{name}.{number}", each, True)
    else:
        yield name, kind, nested


def unknown(signature):
    """Return the names of the parameters that Triton 3.6 cannot pass."""
    every = [leaf for argument in signature for leaf in leaves(*argument)]
    return [
        name
        for name, kind, nested in every
        if not (kind.startswith("*") or kind in {*NUMBERS, "constexpr"})
        and (nested or not kind.startswith("tensordesc<"))
    ]


def test_triton_3_6_can_pass_the_arguments_of_every_launch():
    assert len({kernel for kernel, _ in signatures()}) > 20
    assert [(kernel, unknown(s)) for kernel, s in signatures() if unknown(s)] == []


class Pair(NamedTuple):
    first: object
    second: object


def example(first):
    tensor, number = torch.empty(32, 32, device="meta"), 5
    descriptor = TensorDescriptor.from_tensor(tensor, [16, 16])
    second = descriptor if first == "descriptor" else None
    arguments = {
        "x_desc": descriptor,
        "pair": Pair(tensor, Pair(number, second)),
        "n": 2**40,
        "one": 1,
        "eps": 0.5,
    }
    return tuple((name, mangle_type(value, True)) for name, value in arguments.items())


def test_a_descriptor_in_a_tuple_is_found():
    assert unknown(example("descriptor")) == ["pair.1.1"]
    assert unknown(example("none")) == []
    assert unknown((("x", "fp8e4nv"),)) == ["x"]


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="builds 3.6's launcher")
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_the_launcher_of_triton_3_6_passes_each_parameter(tma):
    for kernel, signature in [*signatures(), ("example", example("none"))]:
        assert parameters_of(signature, tma) == expected_parameters(signature, tma), kernel


def parameters_of(signature, tma):
    """Return the C types of the parameters in the source of Triton's launcher."""
    from triton.backends.nvidia.driver import make_launcher

    number = sum(str(kind).startswith("tensordesc") for _, kind in signature)
    source = make_launcher({}, dict(signature), [{}] * number if tma else None)
    declared = re.search(r"CUdeviceptr profile_scratch(.*?)\) \{", source)[1]
    passed = re.search(r"void \*params\[\] = \{ (.*) \}", source)[1].split(", ")
    names = re.findall(r"(\w+) arg\d+", declared)
    assert len(passed) == len(names) + 2
    return names


def expected_parameters(signature, tma):
    """Return the C types of the parameters that the compiled kernel has."""
    types = {"i": "int{}_t", "u": "uint{}_t", "fp": "uint{}_t"}
    found = []
    for _, kind, _ in (leaf for argument in signature for leaf in leaves(*argument)):
        if kind.startswith("tensordesc"):
            rank = kind.count(",") + 1
            pointer = ["CUdeviceptr", *["int64_t"] * (2 * rank), "int8_t"]
            found += ["CUtensorMap"] if tma else pointer
            found += ["int32_t"] * rank + ["int64_t"] * rank
        elif kind.startswith("*"):
            found.append("CUdeviceptr")
        elif kind != "constexpr":
            letters, bits = re.fullmatch(r"([a-z]+)(\d+)", kind).groups()
            found.append(types[letters].format(max(int(bits), 8)))
    return found
