"""Tests of every public function by fuzzing with fixed seeds, and tests of fuzzing itself.

`make fuzz MINUTES=60` draws new seeds.
"""

import functools

import pytest
import torch
from drawing import Draw
from function_inputs import MAKERS
from fuzz_refusals import ANYTHING_GOES, BAD_OPTIONS
from fuzzing import Case, attempt
from public_functions import arguments, leaves, public_functions, tensor_arguments

import mmfused

FUNCTIONS = public_functions()
SEEDS = range(6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fuzzing_with_fixed_seeds_finds_no_fault(function):
    faults = {seed: fault for seed in SEEDS if (fault := attempt(function, seed)[0])}
    assert not faults


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument_is_drawn_by_some_seed(function):
    missing, seed = set(arguments(FUNCTIONS[function])), 0
    while missing and seed < 200:
        missing -= set(MAKERS[function](Draw(seed, fixed={"sorted by a kernel": False})))
        seed += 1
    assert not missing, (
        f"{function} takes {sorted(missing)}: add these arguments to its maker in MAKERS."
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_option_has_invalid_values_or_accepts_any_value(function):
    tensors = {path.split(".")[0] for path in tensor_arguments(FUNCTIONS[function])}
    unknown = set(arguments(FUNCTIONS[function])) - tensors - set(BAD_OPTIONS) - set(ANYTHING_GOES)
    assert not unknown, (
        f"{function} takes {sorted(unknown)}: add invalid values to fuzz_refusals.py."
    )


def test_case_depends_only_on_its_seed():
    for seed in range(5):
        first, second = (Case("masked_info_nce", seed) for _ in range(2))
        assert first.describe() == second.describe()
        for x, y in zip(leaves(first.inputs).values(), leaves(second.inputs).values(), strict=True):
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def test_relative_error_of_1e_5_is_a_fault(monkeypatch):
    right = mmfused.masked_info_nce

    @functools.wraps(right)
    def wrong(*args, **options):
        out = right(*args, **options)
        return out if mmfused.library.current_backend() == "reference" else out * 1.00001

    monkeypatch.setattr(mmfused, "masked_info_nce", wrong)
    cases = [Case("masked_info_nce", seed) for seed in range(150)]
    cases = [
        case
        for case in cases
        if case.dtype == torch.float32 and case.kind == "values" and case.backend == "composed"
    ]
    large = [
        case
        for case in cases
        if float(case.inputs["temperature"]) > 0.1 and len(case.inputs["candidate"]) > 2
    ]
    assert len(large) > 3
    assert sum(bool(case.faults()) for case in large) > len(large) / 2  # a loss of 0 stays 0
