"""Steps of one Llama-3-8B layer, bf16: with their optimizer, plain and by `compile_step`; then forward and backward
beside the frozen layer's, by the variants and the protocol of `benchmarks/train_step.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import lrcompile
from gpu.layers import LLAMA_8B, TINY, Layers, Sizes, batch
from gpu.section import Section

METHODS = ("lora", "dora", "qlora", "lora-fa", "vera", "galore")
PAIRS = 50
ROUNDS = 30


def main() -> None:
    section = Section()
    for rows in (5,) if section.dry else (512, 8192):
        if section.over(f"steps with optimizer, {rows}"):
            return
        _with_optimizer(section, TINY if section.dry else LLAMA_8B, rows)
    try:
        _beside_others(section)
    except ImportError as error:
        section.row(what="train_step", skipped=f"not installed: {error}")


def _beside_others(section: Section) -> None:
    from steps.cases import Case, build
    from steps.measuring import measure
    from steps.variants import variants
    from transformers import LlamaConfig, LlamaModel

    width, inside, heads, keys, rows = (32, 48, 4, 2, 5) if section.dry else (4096, 14336, 32, 8, 8192)

    def layer() -> LlamaModel:
        config = LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=inside, num_hidden_layers=1, num_attention_heads=heads,
            num_key_value_heads=keys, max_position_embeddings=rows, use_cache=False,
        )  # fmt: skip
        return LlamaModel(config)

    case = Case("layer", f"one layer, {width} wide, {rows} tokens", layer, (1, rows, width))
    for method in METHODS[:1] if section.dry else METHODS:
        if section.over(f"train_step {method}"):
            return
        torch.compiler.reset()
        model, x, w = build(case, torch.float32 if section.dry else torch.bfloat16, section.device.type)
        chosen, missing = variants(model, method, width)
        if section.dry:
            chosen = [
                each if each.compiled is None else replace(each, compiled=_quickly(each.compiled)) for each in chosen
            ]
        for name, result in measure(chosen, x, w, 2 if section.dry else PAIRS, lambda rounds: rounds).items():
            section.row(what="train_step", rows=rows, method=method, variant=name, **result)
        for name, reason in missing.items():
            section.row(what="train_step", rows=rows, method=method, variant=name, skipped=reason)


def _quickly(compiled: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda model, inner: compiled(model, "aot_eager" if inner is None else inner)


def _with_optimizer(section: Section, sizes: Sizes, rows: int) -> None:
    """AdamW on LoRA: a plain loop, the compiled model in one, `compile_step` by parts and whole."""
    options: dict[str, Any] = {"options": {"inner": "aot_eager"}} if section.dry else {}
    given = {name: value.detach() for name, value in batch(sizes, rows, torch.bfloat16, section.device).items()}
    steps: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for name in ("loop", "compiled loop", "parts", "whole"):
        torch.manual_seed(0)
        model = Layers(sizes, 1).to(section.device, torch.bfloat16)
        model = lrcompile.apply(model, lrcompile.spec("lora", rank=16, alpha=32, seed=1))
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-4)
        if name in ("parts", "whole"):
            step = lrcompile.compile_step(model, optimizer, whole=False if name == "parts" else None, **options)
            steps[name], reasons[name] = (lambda step=step: step(**given)), step.reason  # type: ignore[misc]
        else:
            call = model if name == "loop" else lrcompile.compile(model, **options)
            steps[name] = lambda call=call, optimizer=optimizer: _plain(call, optimizer, given)  # type: ignore[misc]
    first = {name: _seconds(section, step) + _seconds(section, step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2 if section.dry else ROUNDS + 3):
        for name, step in steps.items():
            taken = _seconds(section, step)
            if number >= 3 or section.dry:
                times[name].append(taken)
    for name, taken in times.items():
        ratio = statistics.median(one / other for one, other in zip(taken, times["loop"], strict=True))
        section.row(
            what="step with optimizer", rows=rows, variant=name, reason=reasons.get(name, ""), pairs=len(taken),
            ms=1e3 * statistics.median(taken), over="loop", ratio=ratio, two_first_s=first[name],
        )  # fmt: skip


def _plain(call: Any, optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
    optimizer.zero_grad()
    call(**given)["loss"].backward()
    optimizer.step()


def _seconds(section: Section, step: Callable[[], Any]) -> float:
    if not section.dry:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if not section.dry:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
