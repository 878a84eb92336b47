"""Record the goldens of this project: tiny models of several families × methods × the forms they are shipped in.

    python golden/generate.py            record every case that is missing
    python golden/generate.py NAME ...   record these; to make one anew delete its folder first (git keeps the old one)

A case stores its weights, so it does not have to come out the same on another machine: it has to hold there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "benchmarks")]

from zoo.families import FAMILIES  # noqa: E402

import lrcompile  # noqa: E402 (after the path)
import lrcompile.golden  # noqa: E402


@dataclass(frozen=True)
class Recipe:
    """`family` is a row of the zoo; `nf4` quantizes the base before the adapter, `merged` folds it for good."""

    name: str
    family: str
    method: str
    reason: str
    fields: dict[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ("merged",)
    pipeline: str | None = None
    nf4: bool = False
    merged: bool = False
    dtype: torch.dtype = torch.float32
    second: dict[str, Any] | None = None


# fmt: off
RECIPES = (
    Recipe("llama-lora", "llama", "lora", "the pair on every linear map of a decoder, folded, kept beside, and in ONNX",
           {"rank": 5}, ("merged", "onnx", "onnx-inline", "onnx-inputs"), "merge-lora,expand-lora"),
    Recipe("llama-qlora", "llama", "lora", "NF4 codes and an adapter beside them come back to the bit",
           {"rank": 3, "targets": ["q_proj", "down_proj"]}, ("merged", "onnx"), nf4=True),
    Recipe("llama-two-adapters", "llama", "lora", "two adapters at other weights act together",
           {"rank": 3, "targets": ["q_proj", "v_proj"]}, ("merged",),
           second={"rank": 2, "targets": ["v_proj", "up_proj"], "seed": 1}),
    Recipe("mistral-dora-bfloat16", "mistral", "dora", "the norms of DoRA in bfloat16, with a sliding window",
           {"rank": 4, "targets": ["q_proj", "o_proj"]}, (), dtype=torch.bfloat16),
    Recipe("qwen2-dora", "qwen2", "dora", "DoRA's gains are not lost by folding, nor in ONNX",
           {"rank": 4}, ("merged", "onnx-inline", "onnx-inputs")),
    Recipe("gpt2-rslora", "gpt2", "rslora", "Conv1D stores its weight the other way round, c_attn three in one",
           {"rank": 4, "targets": ["c_attn", "c_fc"]}, ("merged", "onnx")),
    Recipe("gpt2-ia3", "gpt2", "ia3", "gains on outputs and on inputs of maps",
           {"targets": ["c_attn", "mlp.c_proj"], "feedforward": ["mlp.c_proj"]}),
    Recipe("bert-lora", "bert", "lora", "an encoder with a rank pattern, stored as NF4 while exporting",
           {"rank": 5, "rank_pattern": {"value": 3}}, ("merged", "onnx-nf4"), "merge-lora,expand-lora"),
    Recipe("bert-vera", "bert", "vera", "projections that all sites share",
           {"rank": 16, "targets": ["query", "value"]}, ("merged", "onnx-inline")),
    Recipe("roberta-merged", "roberta", "lora", "what is shipped after a final merge is an ordinary model",
           {"rank": 4}, ("onnx", "pt2"), merged=True),
    Recipe("t5-hira", "t5", "hira", "an update that multiplies the weight, in an encoder and a decoder",
           {"rank": 4, "targets": ["q", "v", "wo"]}, ("merged", "onnx")),
    Recipe("vit-pissa", "vit", "pissa", "the offset of a principal start is carried along, on pictures",
           {"rank": 4, "targets": ["q_proj", "v_proj"]}, ("merged",)),
    Recipe("vit-bitfit", "vit", "bitfit", "an adapter that is biases only", {}, ("merged",)),
    Recipe("mixtral-lora", "mixtral", "lora", "3-D weights of experts, and a router that must choose the same ones",
           {"rank": 3, "targets": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}, ("merged",)),
    Recipe("mamba-lora", "mamba", "lora", "a state-space model, whose scan is no linear map",
           {"rank": 3, "targets": ["in_proj", "out_proj"]}, ("merged",)),
)
# fmt: on


def make(recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a case, its adapters away from their start, and inputs for it."""
    family = next(each for each in FAMILIES if each.name == recipe.family)
    model, inputs = family.build()
    model = model.to(recipe.dtype)
    inputs = {k: v.to(recipe.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if recipe.nf4:
        lrcompile.quantize(model, "nf4", block_size=32)
    for name, fields in {"default": recipe.fields, "second": recipe.second}.items():
        if fields is not None:
            lrcompile.apply(model, lrcompile.spec(recipe.method, **{"seed": 0, **fields}), name=name)
            move(model)
    if recipe.second is not None:
        lrcompile.activate(model, {"default": 0.5, "second": 1.0})
    if recipe.merged:
        lrcompile.merge(model, final=True)
    return model, inputs


def move(model: nn.Module) -> None:
    """As training would: whatever may train leaves its starting value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.1 * step.to(parameter.dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(recipe.name for recipe in RECIPES))
    wanted = parser.parse_args().names
    unknown = sorted(set(wanted) - {recipe.name for recipe in RECIPES})
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}")
    for recipe in RECIPES:
        folder = HERE / recipe.name
        if (wanted and recipe.name not in wanted) or (folder.exists() and not wanted):
            continue
        model, inputs = make(recipe)
        lrcompile.golden.record(
            folder, model, inputs, pipeline=recipe.pipeline, forms=recipe.forms, reason=recipe.reason
        )
        print(f"recorded {folder.name}: {sum(file.stat().st_size for file in folder.iterdir()) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
