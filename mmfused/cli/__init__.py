"""The ``mmfused`` command.

Each subcommand is a module of this package with ``HELP``, ``add_arguments(parser)``, and
``run(args)``, which returns the exit code. If the command line starts with a subcommand, the
modules of the other subcommands are not imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

import mmfused
from mmfused.extras import from_extra

COMMANDS = (
    "demo",
    "train",
    "data",
    "eval",
    "embed",
    "export",
    "convert",
    "ablate",
    "bench",
    "tune",
    "inspect",
    "env",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    The exit code is 0 for success, 1 if a package is missing or a check failed, 2 for any other
    error, 3 if `mmfused tune` stopped at its budget, and 128 + N if signal N stopped the command.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with from_extra("models"):
            args = _make_parser(argv).parse_args(argv)
            _check_not_empty(args)
            # The function `run` in the subcommand's module, for example in train.py.
            return args.run(args)
    except ImportError as error:
        print(f"mmfused: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the output has stopped, as in `mmfused env | head`. Python would complain
        # when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if stopped by SIGPIPE
    except (ValueError, OSError, RuntimeError) as error:
        print(f"mmfused: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print("mmfused: error: there is not enough memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmfused: interrupted", file=sys.stderr)
        return 130


def _check_not_empty(args: argparse.Namespace) -> None:
    """Raise ValueError if the value of an option is empty or blank."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name}: got {value!r}, expected a non-empty string")


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        try:
            import shtab
        except ImportError as error:
            raise ImportError("shtab is not installed: pip install shtab") from error
        _, shell, _ = values
        print(shtab.complete(parser, shell))
        parser.exit()


def _make_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmfused",
        description="Fused kernels for multimodal retrieval and classification models.",
    )
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_PrintCompletion,
        help="print the completion script for a shell; needs the package shtab",
    )
    parser.add_argument("--version", action="version", version=f"mmfused {mmfused.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}"
    )
    used = [name for name in COMMANDS if argv[:1] == [name]]
    for name in used or COMMANDS:
        module = importlib.import_module(f"mmfused.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
