"""`lrcompile demo`, `run` and `train`: options over the default pipeline, or a pipeline file."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

from rich.console import Console

import lrcompile
from lrcompile.commands import names, values
from lrcompile.demo import line
from lrcompile.pipeline import Pipeline


def demo(given: Namespace) -> int:
    return _run(from_options(given))


def run(given: Namespace) -> int:
    pipeline = Pipeline.load(given.file)
    return _run(replace(pipeline, out=given.out) if given.out else pipeline)


def train(given: Namespace) -> int:
    pipeline = from_options(given)
    if not given.out:
        pipeline = replace(pipeline, out="lrcompile-adapter")
    folder = line.train(pipeline, _console())
    print(
        f"wrote {folder}/adapter and {folder}/base; next: lrcompile merge {folder}/base {folder}/adapter --out merged"
    )
    return 0


def from_options(given: Namespace) -> Pipeline:
    """The default pipeline with every option that was given in its place."""
    start = Pipeline()
    data = _given(source=given.data, limit=given.limit, max_length=given.max_length)
    training = _given(
        epochs=given.epochs, lr=given.lr, head_lr=given.head_lr, batch_size=given.batch_size, seed=given.seed
    )
    fields = _given(rank=given.rank, alpha=given.alpha, seed=given.seed) | values(given.set)
    fields |= _given(targets=names(given.targets) if given.targets is not None else None)
    method = given.method or start.spec.method  # what the spec of the default pipeline says of LoRA, others say anew
    spec = lrcompile.spec(method, **{"train_modules": start.spec.train_modules, "seed": start.spec.seed} | fields)
    whole = _given(model=given.model, out=given.out)
    return replace(
        start,
        data=replace(start.data, **data),
        train=replace(start.train, **training),
        spec=spec,
        **whole,
    )


def _run(pipeline: Pipeline) -> int:
    outcome = line.run(pipeline, _console())
    print()
    print(outcome.text)
    print(f"\n{outcome.folder}: result.json, rungs.png, adapter, merged, ONNX files")
    if not outcome.ok:
        print("a rung does not hold its bound; the verdict above says where")
    return 0 if outcome.ok else 1


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
