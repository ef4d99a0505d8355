"""The documentation site: the API pages have every public name, and Sphinx gives no warnings."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmfused.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ("mmfused", "mmfused.losses", "mmfused.models", "mmfused.data", "mmfused.testing")
BUILDS = ("sphinx", "furo", "myst_parser", "sphinx_copybutton")


def public_names(module_name):
    """The names in ``__all__``, or else the module's own functions; no modules."""
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module_name and name[0] != "_"
    ]
    return {f"{module_name}.{n}" for n in names if not inspect.ismodule(getattr(module, n))}


@pytest.mark.parametrize("module_name", PUBLIC)
def test_every_public_name_is_on_one_api_page_once(module_name):
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/api").glob("*.md"))
    directive = r"^\.\. (?:auto(?:class|function)|py:data):: (\S+)$"
    counts = Counter(re.findall(directive, pages, re.MULTILINE))
    wrong = {name: counts[name] for name in public_names(module_name) if counts[name] != 1}
    assert not wrong, f"names that docs/api does not have exactly once: {wrong}"


def test_the_site_builds_without_warnings(tmp_path):
    missing = [name for name in BUILDS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (extra docs)")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*sphinx, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "html/searchindex.js").read_text(encoding="utf-8")
    assert "mmfused.QueryPooling" in index or '"QueryPooling"' in index


def test_every_command_is_on_the_page_of_the_command_line():
    page = (ROOT / "docs" / "api" / "cli.md").read_text()
    assert set(re.findall(r"command-help:: (\w+)", page)) == set(COMMANDS)
