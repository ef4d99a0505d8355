"""Tests that each class and function on an API page has an example, and that the examples run.

``test_docs.py`` tests that each public name is on an API page.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from mmfused import library

API = Path(__file__).resolve().parent.parent / "docs" / "api"
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))
NAMES = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", PAGES, re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for switch in (library._backend, library._router):
        monkeypatch.setattr(switch, "default", switch.default)
    # No global names: each example imports what it needs.
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    (test,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs={})
    assert test.examples, f"{name} has no example in its docstring"
    report = []
    result = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=report.append)
    assert not result.failed, "".join(report)
