"""Tests that every public class and function has an example in its docstring, and that it runs."""

import doctest
import importlib
import inspect

import pytest

from mmfused import library

MODULES = (
    "mmfused",
    "mmfused.losses",
    "mmfused.models",
    "mmfused.data",
    "mmfused.testing",
    "mmfused.training.run",
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_objects(module):
    """Return the public classes and functions of a module, by full name."""
    names = getattr(module, "__all__", None)
    if names is None:  # then those that the module defines
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    found = {f"{module.__name__}.{name}": getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }


OBJECTS = {
    name: value
    for module in MODULES
    for name, value in public_objects(importlib.import_module(module)).items()
}


@pytest.mark.parametrize("name", OBJECTS)
def test_docstring_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library._backend, "default", library._backend.default)
    # No global names: each example imports what it needs.
    (test,) = doctest.DocTestFinder(recurse=False).find(OBJECTS[name], name, globs={})
    assert test.examples, f"{name} has no example in its docstring"
    report = []
    result = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=report.append)
    assert not result.failed, "".join(report)
