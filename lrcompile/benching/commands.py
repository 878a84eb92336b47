"""`lrcompile bench methods`."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from lrcompile.benching.running import Plan, bench
from lrcompile.benching.showing import draw, table
from lrcompile.benching.tasks import TASKS
from lrcompile.demo.sources import quiet
from lrcompile.errors import LrcompileError
from lrcompile.recipes import methods, recipe
from lrcompile.writing import atomic_file


def bench_methods(given: Namespace) -> int:
    quiet()
    plan = Plan(
        methods=_names(given.methods, methods(), "--methods"),
        tasks=_names(given.tasks, tuple(TASKS), "--tasks"),
        steps=_least("--steps", given.steps, 10),
        seeds=_least("--seeds", given.seeds, 1),
        rounds=_least("--rounds", given.rounds, 2),
        workers=_least("--workers", given.workers or os.cpu_count() or 1, 1),
    )
    folder = Path(given.out)
    result = bench(plan, folder, Console(stderr=True, highlight=False))
    with atomic_file(folder / "result.json") as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    with atomic_file(folder / "methods.png") as file:
        draw(result, file)
    print("\n\n".join(table(name, found) for name, found in result["tasks"].items()))
    print(f"\n{folder}: result.json, methods.png, trials.jsonl")
    return 0


def _names(given: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    if given is None:
        return known
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if unknown := [name for name in names if name not in known]:
        if option == "--methods":
            recipe(unknown[0])  # raises, naming the nearest
        raise LrcompileError(f"{option}: unknown {unknown[0]!r}; choose from {', '.join(known)}")
    if not names:
        raise LrcompileError(f"{option} names nothing; choose from {', '.join(known)}")
    return names


def _least(option: str, value: int, least: int) -> int:
    if value < least:
        raise LrcompileError(f"{option} is {value}; expected at least {least}")
    return value
