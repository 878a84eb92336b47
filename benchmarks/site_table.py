"""Make docs/sites.md: which uses of a weight an adapter follows, measured on every model of the zoo.

python benchmarks/site_table.py [--only NAME ...] [--output docs/sites.md]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from zoo.awkward import CASES
from zoo.conformance import CHECKS, Build, Outcome, check
from zoo.families import FAMILIES

import lrcompile

INTRODUCTION = """# Where adapters act

Made by `python benchmarks/site_table.py`; do not edit. Every model below is tiny, random and real: {families} families
of `transformers` {transformers} built from configs, and {cases} plain modules that use a weight in an awkward way,
on torch {torch}. `tests/test_families.py` and `tests/test_awkward.py` hold each line to what it says.

| check | promise |
|---|---|
| start | with B = 0 the outputs are those of the base (its unfused path), bit for bit |
| live | in eval, setting any single B to zero changes the outputs by more than rounding |
| copied | a deep copy computes the same bits |
| disabled | inside `disabled` the outputs are the base's, bit for bit |
| merged | in eval and in train, merged equals unmerged within {limit} roundings of the parameters |
| unmerged | `unmerge` gives every parameter back, the same object with the same bits |
| loaded | saved and loaded into a new copy of the base: the same bits |
| exported | `torch.export` holds one dialect node or more a host, and equals eager within {limit} roundings |
| gradients | in train, every A and B gets a gradient, and nothing of the base does |
| removed | `remove` gives back classes, bits, `requires_grad`, `state_dict` keys, outputs |

*error* is the largest difference between merged and unmerged outputs, divided by the adapter's own effect. A line that
says *refused* shows the error `apply` raises; the model is left as it was.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="families or cases to run, and print instead of writing"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "sites.md")
    options = parser.parse_args()
    rows = [row for row in _rows() if not options.only or row[0] in options.only]
    if not rows:
        parser.error(f"--only {' '.join(options.only)}: no family or case has such a name")
    torch.set_num_threads(1)
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lines: dict[str, list[str]] = {}
    failed = 0
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(rows))
        for name, group, targets, build, spec, exports in rows:
            progress.update(task, description=name)
            outcome = check(build, spec, exports=exports)
            failed += bool(outcome.failures)
            lines.setdefault(group, []).append(_line(name, targets, outcome, exports))
            progress.advance(task)
    text = "\n\n".join(_table(group, found) for group, found in lines.items()) + "\n"
    if options.only:
        print(text)
    else:
        import transformers

        introduction = INTRODUCTION.format(
            families=len(FAMILIES), cases=len(CASES), limit=16, torch=torch.__version__.partition("+")[0],
            transformers=transformers.__version__,
        )  # fmt: skip
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(f"{introduction}\n{text}", encoding="utf-8")
        print(f"{options.output}: {len(rows)} rows, {failed} with a failure")
    return 1 if failed else 0


def _rows() -> Iterator[tuple[str, str, str, Build, lrcompile.Spec, bool]]:
    common = {"rank": 3, "alpha": 5, "seed": 0}
    for family in FAMILIES:
        ranks = dict.fromkeys(family.narrow, 1)
        spec = lrcompile.spec("lora", **common, exclude=family.bypassed, rank_pattern=ranks)
        yield family.name, family.kind, "all-linear", family.build, spec, family.base_exports
        if family.also:
            spec = lrcompile.spec("lora", **common, targets=family.also)
            yield family.name, family.kind, ", ".join(family.also), family.build, spec, family.base_exports
    for case in CASES:
        spec = lrcompile.spec("lora", **common, targets=case.targets)
        targets = case.targets if isinstance(case.targets, str) else ", ".join(case.targets)
        yield case.name, "plain modules", targets, case.build, spec, case.exports


def _table(group: str, lines: list[str]) -> str:
    head = ["model", "targets", "sites", "spared", *CHECKS, "error"]
    return "\n".join([f"## {group.capitalize()}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def _line(name: str, targets: str, outcome: Outcome, exports: bool) -> str:
    if outcome.refusal:
        cells = ["refused: " + re.sub(r"\s+", " ", outcome.refusal).replace("|", "\\|"), *[""] * (len(CHECKS) + 2)]
    else:
        marks = ["✗ " + outcome.failures[c] if c in outcome.failures else "✓" for c in CHECKS]
        if not exports:
            marks[CHECKS.index("exported")] = "the base does not"
        cells = [_counted(outcome.sites), _counted(outcome.spared), *marks, f"{outcome.relative_error:.1e}"]
    return f"| {name} | `{targets}` | {' | '.join(cells)} |"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))


if __name__ == "__main__":
    sys.exit(main())
