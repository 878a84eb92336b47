"""The line: baseline, adapter, merge, NF4, ONNX, measure, verify; one table, one picture, one `result.json`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lrcompile
from lrcompile.budgets import Allocation
from lrcompile.demo.checking import Checked, Claim, check
from lrcompile.demo.concluding import beside_nf4, described, make_rows, notes, write_json
from lrcompile.demo.folders import save_classifier
from lrcompile.demo.measuring import TEST, Measured, measure
from lrcompile.demo.model import TextClassifier
from lrcompile.demo.picture import draw
from lrcompile.demo.preparing import RESULT, Prepared, prepare, write_test
from lrcompile.demo.rungs import (
    ADAPTED,
    BUDGET,
    BUDGET_ONNX,
    FP32_ONNX,
    INLINE_ONNX,
    MERGED,
    NF4,
    NF4_ONNX,
    RUNGS,
)
from lrcompile.demo.showing import Show
from lrcompile.demo.table import table
from lrcompile.demo.training import encode_once, fit_adapter, fit_head, give_own_rate
from lrcompile.deployment.describing import versions
from lrcompile.errors import require
from lrcompile.pipeline import Pipeline
from lrcompile.quantizing import quantization_of
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part as named
from lrcompile.writing import atomic_folder

GRAPHS = {"fp32": FP32_ONNX, "nf4": NF4_ONNX, "nf4-inline": INLINE_ONNX, "budget": BUDGET_ONNX}
CALIBRATED_ON = 128
"""Training texts that a budget is measured on."""


@dataclass(frozen=True)
class Outcome:
    ok: bool
    text: str
    folder: Path


def run(pipeline: Pipeline, console: Console) -> Outcome:
    """Run the whole line and write its folder, all of it or nothing. `ok` says whether every rung holds."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "onnx")
    require("matplotlib", "demo")
    show = Show(console)
    with show.stage("reading data and model"):
        ready = prepare(pipeline)
    console.print(f"  {described(ready)}")
    with atomic_folder(pipeline.out) as folder:
        text, ok = _Line(pipeline, ready, folder, show).run()
    return Outcome(ok, text, Path(pipeline.out))


def train(pipeline: Pipeline, console: Console) -> Path:
    """The training part of the line alone: writes `base/`, `adapter/` and `result.json`, all or nothing."""
    show = Show(console)
    with show.stage("reading data and model"):
        ready = prepare(pipeline)
    console.print(f"  {described(ready)}")
    with atomic_folder(pipeline.out) as folder:
        losses = _Line(pipeline, ready, folder, show).train_adapter()
        summary = {
            "pipeline": pipeline.to_dict(),
            "data": ready.data.summary(),
            "losses": losses,
            "seconds": show.seconds,
        }
        write_json(folder / RESULT, summary)
    return Path(pipeline.out)


class _Line:
    """One run, writing into `folder`: the stages of `run` in their order."""

    def __init__(self, pipeline: Pipeline, ready: Prepared, folder: Path, show: Show):
        self.pipeline, self.ready, self.folder, self.show = pipeline, ready, folder, show
        self.untrained: TextClassifier = copy.deepcopy(ready.model)
        self.trained: TextClassifier = ready.model
        self.quantized_base = recipe(pipeline.spec.method).quantizes_base
        self.targets = [name for name in pipeline.export if name != "nf4-inline" or beside_nf4(pipeline)]
        self.allocation: Allocation | None = None
        if pipeline.budget is not None:
            self.targets.append("budget")

    def run(self) -> tuple[str, bool]:
        losses = {"baseline": self.train_baseline(), "adapter": self.train_adapter()}
        merged, loss_of_merge = self.merge()
        nf4 = self.quantize(merged)
        models = {"fp32": merged, "nf4": nf4}
        if self.pipeline.budget is not None:
            models["budget"] = self.within(merged, self.pipeline.budget)
        if "nf4-inline" in self.targets:
            models["nf4-inline"] = self.inline()
        for target in [name for name in models if name in self.targets]:
            with self.show.stage(f"exporting ONNX, {target}"):
                lrcompile.export(models[target], self.folder / GRAPHS[target].files[0], self.inputs(4))
        measured = self.measure()
        with self.show.stage("verifying every rung against float64"):
            checked = check(self.trained, self.untrained, self.claims(models), self.inputs(), self.pipeline.verify)
        return self.conclude(measured, checked, loss_of_merge, losses)

    def train_baseline(self) -> list[float]:
        ready, rate = self.ready, self.pipeline.train.head_lr
        model = copy.deepcopy(self.untrained)
        chunks = -(-len(ready.train) // len(ready.batches[0]))
        with self.show.steps("encoding once for the frozen baseline", chunks) as tick:
            features = encode_once(model, ready.train, len(ready.batches[0]), tick)
        with self.show.steps("training the frozen baseline's head", len(ready.batches)) as tick:
            losses = fit_head(model, features, ready.train, ready.batches, rate, tick)
        save_classifier(self.folder / "baseline", model, ready.tokenizer, ready.named)
        return losses

    def train_adapter(self) -> list[float]:
        ready, part = self.ready, self.pipeline.train
        torch.manual_seed(part.seed)
        method = recipe(self.pipeline.spec.method)
        data = map(ready.train.labelled, ready.batches) if method.calibration is not None else None
        lrcompile.apply(self.trained, self.pipeline.spec, data=data)
        # The base as the adapter needs to find it again: NF4 for a method that quantizes it, else the encoder by name.
        base: Any = lrcompile.remove(copy.deepcopy(self.trained)) if self.quantized_base else self.untrained
        save_classifier(self.folder / "base", base, ready.tokenizer, ready.named)
        cls = torch.optim.AdamW if method.optimizer is None else named(method.optimizer)
        optimizer = lrcompile.optimizer(self.trained, cls, lr=part.lr, weight_decay=0.0)
        give_own_rate(optimizer, list(self.trained.head.parameters()), part.head_lr)
        with self.show.steps(f"training with {self.pipeline.spec.method}", len(ready.batches)) as tick:
            losses = fit_adapter(self.trained, optimizer, ready.train, ready.batches, tick)
        lrcompile.save(self.trained, self.folder / "adapter")
        return losses

    def merge(self) -> tuple[TextClassifier, float]:
        with self.show.stage("merging"):
            merged = copy.deepcopy(self.trained)
            report = lrcompile.merge(merged, into="float32" if self.quantized_base else "keep", final=True)
            save_classifier(self.folder / "merged", merged, self.ready.tokenizer, self.ready.inside)
        return merged, report.adapter_relative_error

    def quantize(self, merged: TextClassifier) -> TextClassifier:
        with self.show.stage("quantizing to NF4"):
            model = copy.deepcopy(merged)
            lrcompile.quantize(model, "nf4", exclude=["head"])
            save_classifier(self.folder / "nf4", model, self.ready.tokenizer, self.ready.inside)
        return model

    def within(self, merged: TextClassifier, budget: Mapping[str, float]) -> TextClassifier:
        size, texts = self.pipeline.train.batch_size, self.ready.train
        rows = list(range(0, len(texts), max(1, len(texts) // CALIBRATED_ON)))[:CALIBRATED_ON]
        data = [texts.batch(rows[start : start + size]) for start in range(0, len(rows), size)]
        with self.show.stage("quantizing within the budget"):
            model = copy.deepcopy(merged)
            lrcompile.quantize(model, budget=budget, data=data, exclude=["head"])
            save_classifier(self.folder / "budget", model, self.ready.tokenizer, self.ready.inside)
        done = quantization_of(model)
        self.allocation = None if done is None else done.allocation
        return model

    def inline(self) -> TextClassifier:
        """An NF4 base with the adapter beside it: nothing of the adapter is rounded away."""
        if self.quantized_base:
            return self.trained
        model = copy.deepcopy(self.untrained)
        lrcompile.quantize(model, "nf4", exclude=["head"])
        lrcompile.load(model, self.folder / "adapter")
        return model.eval()

    def inputs(self, count: int | None = None) -> dict[str, torch.Tensor]:
        """The first test texts as one batch."""
        count = min(count or self.pipeline.verify.examples, len(self.ready.test))
        return self.ready.test.batch(list(range(count)))

    def measure(self) -> dict[str, Measured]:
        write_test(self.folder / TEST, self.ready.test)
        optional = [*GRAPHS.values(), *([BUDGET] if "budget" not in self.targets else [])]
        wanted = [rung for rung in RUNGS.values() if rung not in optional]
        wanted += [GRAPHS[target] for target in self.targets]
        measured = {}
        for rung in (rung for rung in RUNGS.values() if rung in wanted):
            with self.show.stage(f"measuring {rung.title}"):
                measured[rung.key] = measure(self.folder, rung, self.pipeline.train.batch_size)
        return measured

    def claims(self, models: Mapping[str, TextClassifier]) -> list[Claim]:
        def graph(target: str) -> dict[str, Any]:
            rung = GRAPHS[target]
            return {rung.key: str(self.folder / rung.files[0])} if target in self.targets else {}

        exact = {MERGED.key: models["fp32"]} | graph("fp32") | (graph("nf4-inline") if self.quantized_base else {})
        claims = [Claim("adapter", self.trained, ADAPTED.key, exact)]
        if "nf4" in self.targets:
            claims.append(Claim("merged NF4", models["nf4"], NF4.key, graph("nf4")))
        if "budget" in self.targets:
            claims.append(Claim("within budget", models["budget"], BUDGET.key, graph("budget")))
        if "nf4-inline" in self.targets and not self.quantized_base:
            claims.append(Claim("NF4 + adapter", models["nf4-inline"], None, graph("nf4-inline")))
        return claims

    def conclude(
        self, measured: dict[str, Measured], checked: Checked, loss_of_merge: float, losses: dict[str, list[float]]
    ) -> tuple[str, bool]:
        rows = make_rows(measured, checked, self.ready, self.folder)
        data = self.ready.data.summary()
        draw(rows, float(str(data["majority_class_share"])), self.folder / "rungs.png")
        ok = checked.ok
        write_json(
            self.folder / RESULT,
            {
                "ok": ok,
                "pipeline": self.pipeline.to_dict(),
                "data": data,
                "steps": len(self.ready.batches),
                "rungs": [asdict(row) for row in rows],
                "merge_adapter_relative_error": loss_of_merge,
                "allocation": None if self.allocation is None else self.allocation.to_dict(),
                "verdicts": {name: verdict.to_dict() for name, verdict in checked.verdicts.items()},
                "losses": losses,
                "seconds": self.show.seconds,
                "versions": versions(),
            },
        )
        failed = [f"{name}\n{verdict}" for name, verdict in checked.verdicts.items() if not verdict.ok]
        allocation = [] if self.allocation is None else [str(self.allocation)]
        return "\n\n".join([*allocation, table(rows, notes(self.pipeline, self.ready)), *failed]), ok
