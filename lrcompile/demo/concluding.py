"""From measurements and verdicts to rows, the notes under the table, and the results as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.demo.checking import Checked
from lrcompile.demo.measuring import CALLS, Measured
from lrcompile.demo.preparing import Prepared
from lrcompile.demo.rungs import ADAPTED, RUNGS, size_on_disk
from lrcompile.demo.table import Row
from lrcompile.pipeline import Pipeline
from lrcompile.recipes import recipe


def make_rows(measured: dict[str, Measured], checked: Checked, ready: Prepared, folder: Path) -> list[Row]:
    """One row a measured rung, in the order of the line."""
    truth = np.array(ready.test.labels)
    trained = measured[ADAPTED.key].logits.argmax(-1)
    rows = []
    for key, found in measured.items():
        answers = found.logits.argmax(-1)
        reference, numbers, holds = checked.claims.get(key, ("", None, None))
        rows.append(
            Row(
                key=key,
                title=RUNGS[key].title,
                accuracy=float((answers == truth).mean()),
                agreement=float((answers == trained).mean()),
                bound_ratio=numbers.bound_ratio if numbers else None,
                max_abs_error=numbers.max_abs_error if numbers else None,
                adapter_relative_error=checked.kept.get(key),
                reference=reference,
                holds=holds,
                size_bytes=size_on_disk(folder, RUNGS[key], ready.base_bytes),
                latency_ms=found.latency_ms,
                peak_bytes=found.peak_bytes,
            )
        )
    return rows


def described(ready: Prepared) -> str:
    """One line on the data, what it may give away included."""
    data = ready.data.summary()
    return (
        f"{data['train']} texts to train on, {data['test']} to test, {data['classes']} classes "
        f""
        f"(the most frequent one, {ready.data.labels[_majority(ready)]!r}, "
        f"is {data['majority_class_share']:.1%} of the test); "
        f"{data['test_texts_naming_their_label']:.1%} of the test texts contain their label's name; "
        f"{len(ready.batches)} steps"
    )


def beside_nf4(pipeline: Pipeline) -> bool:
    """Can the adapter of this method act beside codes of the base it was trained on?"""
    method = recipe(pipeline.spec.method)
    return method.nf4 is None or method.quantizes_base


def notes(pipeline: Pipeline, ready: Prepared) -> list[str]:
    """What the columns mean, in the words a reader of the table needs."""
    examples = min(pipeline.verify.examples, len(ready.test))
    batch = min(pipeline.train.batch_size, len(ready.test))
    width = max(map(len, ready.test.rows))
    method = recipe(pipeline.spec.method)
    left_out = [] if beside_nf4(pipeline) else [f"NF4 + adapter: left out, since {method.name} {method.nf4}"]
    return [
        *left_out,
        f"accuracy, agreement: {len(ready.test)} test texts; agreement = same label as the eager adapter",
        f"r, |error|: logits of {examples} test texts against float64 of the model named under 'against';"
        f" r in units of float32's own rounding there, limit {pipeline.verify.bound_ratio:g}",
        "error / effect: distance from float64 of the trained model, as a share of what the adapter changes;"
        f" limit {pipeline.verify.adapter_relative_error:g} where a rung claims to be exact, only reported where"
        " NF4 rounds weights",
        f"ms/batch: median of {CALLS} calls on {batch} × {width} tokens;"
        " peak: resident memory of a fresh process, libraries not counted",
    ]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no nan: a number that is not finite is written as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _majority(ready: Prepared) -> int:
    return int(np.bincount(ready.test.labels).argmax())
