"""Sphinx extension: how the API pages render this library's docstrings and commands.

* Equations and tables, which docstrings indent below a paragraph, become literal blocks.
* The comments at the fields of dataclasses and named tuples become descriptions of the fields.
* ``.. command-help:: train`` shows what ``mmfused train --help`` prints.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_SECTION = re.compile(r"^(Args|Attributes|Examples?|Note|Raises|Returns|Yields|Warning):$")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("command-help", CommandHelp)
    # Before napoleon, which has the default priority of 500.
    app.connect("autodoc-process-docstring", _process, priority=400)
    # After autodoc has merged the type hints into the field lists.
    app.connect("object-description-transform", _move_return_type, priority=600)
    return {"parallel_read_safe": True}


class CommandHelp(SphinxDirective):
    """The help of a subcommand of ``mmfused``, as a literal block."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the literal block."""
        from mmfused.cli import _make_parser

        parser = _make_parser(self.arguments)
        commands = next(a for a in parser._actions if a.dest == "command").choices
        assert commands is not None
        text = commands[self.arguments[0]].format_help()
        return [nodes.literal_block(text, text, language="text")]


def _process(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    lines: list[str],
) -> None:
    lines[:] = _with_literal_blocks(lines)
    if what == "class" and (dataclasses.is_dataclass(obj) or _is_tuple(obj)):
        sections = [i for i, line in enumerate(lines) if _SECTION.match(line)]
        if not {"Args:", "Attributes:"} & {lines[i] for i in sections}:
            fields = [f"    {name}: {text}" for name, text in _field_comments(obj).items()]
            first = sections[0] if sections else len(lines)
            lines[first:first] = ["", "Args:", *fields, ""] if fields else []


def _with_literal_blocks(lines: list[str]) -> list[str]:
    """Make a code block of each block that is indented below a blank line.

    The items of a section such as Args follow their heading without a blank line. Blocks below a
    paragraph that ends in ``::`` and below a line that begins with ``..`` stay as they are.
    """
    out: list[str] = []
    for i, line in enumerate(lines):
        before = [old for old in lines[:i] if old.strip()][-1:]
        if (
            before
            and not lines[i - 1].strip()
            and line.startswith("    ")
            and before[0][0] not in " .*-"
            and not before[0].endswith("::")
            and not _SECTION.match(before[0])
        ):
            out += [".. code-block:: text", ""]
        out.append(line)
    return out


def _is_tuple(obj: Any) -> bool:
    return issubclass(obj, tuple) and hasattr(obj, "_fields")


def _field_comments(cls: type) -> dict[str, str]:
    """Return the comment at each field: at the end of its lines, or else on the lines above it."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("mmfused"):
            continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        body = ast.parse("\n".join(lines)).body[0]
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            assert node.end_lineno is not None and node.end_col_offset is not None
            text = _comment(lines[node.end_lineno - 1][node.end_col_offset :])
            above = node.lineno - 2
            if not text:
                while lines[above].strip().startswith("#"):
                    text = f"{_comment(lines[above])} {text}"
                    above -= 1
            out[node.target.id] = text.strip()
    return {name: text for name, text in out.items() if text}


def _comment(line: str) -> str:
    return line.partition("#")[2].strip()


def _move_return_type(app: Sphinx, domain: str, kind: str, content: Any) -> None:
    """Move the return type, which autodoc appends, to the description of the returned value."""
    for fields in content.findall(nodes.field_list):
        named = {field[0].astext(): field for field in fields}
        if "rtype" in named and "returns" in named:
            fields.remove(named["rtype"])
            fields.insert(fields.index(named["returns"]) + 1, named["rtype"])
