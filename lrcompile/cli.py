"""The command line. Only argparse is imported here: `--help` and `methods` answer before torch could load.

Exit codes: 0 done and it holds, 1 something does not hold, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from lrcompile.arguments.deployment import export, merge, quantize, verify
from lrcompile.arguments.goldens import golden
from lrcompile.arguments.lists import bench, lists
from lrcompile.arguments.training import line, plan
from lrcompile.errors import LrcompileError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user can cause is one line on standard error, never a
    traceback.
    """
    given = _parser().parse_args(argv)
    try:
        module, function = given.run.split(":")
        return getattr(import_module(f"lrcompile.{module}"), function)(given)
    except KeyboardInterrupt:
        print("lrcompile: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except (LrcompileError, OSError) as error:
        print(f"lrcompile: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    from lrcompile import __version__

    parser = _Parser(
        prog="lrcompile",
        description="Adapt a model's linear maps, train, fold, quantize, export, and prove each step.",
        epilog="Start with: lrcompile demo. Each command explains itself: lrcompile COMMAND --help.",
    )
    parser.add_argument("--version", action="version", version=f"lrcompile {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (line, plan, merge, quantize, export, verify, golden, lists, bench):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
