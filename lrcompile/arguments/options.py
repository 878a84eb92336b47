"""What several commands take."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[Any]"

SET = "a field of the method's own (see: lrcompile methods NAME), its value as in YAML; may be repeated"
MODEL = "a local folder, package:NAME of an installed package, or a hub id (the only one that may use the network)"


def add(commands: Commands, name: str, run: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].split("\n")[0].rstrip("."),
        description=summary,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inputs", metavar="FILE", help="input tensors by name: .safetensors, .npz, or a golden")
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="an input text for the model's tokenizer; repeat it"
    )


def calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="FILE",
        help="texts to measure on: .txt, a text a line, or .jsonl or .csv with a column text; or stdlib-docstrings",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="of --data, at most N (default 128)")


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write the numbers as JSON; last and without FILE: print them so",
    )  # fmt: skip


def report_options(parser: argparse.ArgumentParser) -> None:
    json_option(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and pictures; one file, no network")
