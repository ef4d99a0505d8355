"""Tests of ``pytest --ptx``: what skips a test, and what fails one."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def markers():
    """Yield file, line and arguments of each use of ``pytest.mark.not_on_ptx``."""
    for path in sorted(TESTS.glob("*.py")):
        tree = ast.parse(path.read_text())
        called = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "not_on_ptx":
                call = called.get(node)
                yield f"{path.name}:{node.lineno}", call.args if call else []


def test_at_most_20_tests_are_skipped_on_ptx_each_for_a_reason():
    found = dict(markers())
    assert len(found) <= 20
    for place, args in found.items():
        assert len(args) == 1 and isinstance(args[0], ast.Constant) and args[0].value, place


def test_not_on_ptx_marks_single_tests():
    """A marked class or module would hide how many tests are skipped."""
    for path in sorted(TESTS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.Assign):
                text = ast.unparse(getattr(node, "value", None) or ast.Tuple(node.decorator_list))
                assert "mark.not_on_ptx" not in text, f"{path.name}:{node.lineno}"
