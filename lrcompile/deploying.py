"""What becomes of adapters and weights when a model leaves: folded, kept beside, quantized, on the captured program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from lrcompile.errors import ExportError
from lrcompile.folding import ADAPTERS, Recipe, fold_adapters, site_of
from lrcompile.program_nf4 import nf4_sites, quantize_program, spell_out_adapted
from lrcompile.programs import Tensors

FORMS = ("auto", "merge", "inline")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """The checked arguments of an export that say what to do with adapters and weights."""

    adapters: str = "auto"
    into: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.adapters == "inputs":
            raise ExportError(
                "adapters='inputs' (adapters as graph inputs, swapped at run time) is not supported in this version; "
                f"choose one of {', '.join(map(repr, FORMS))}"
            )
        if self.adapters not in FORMS:
            raise ExportError(f"adapters={self.adapters!r}: choose one of {', '.join(map(repr, FORMS))}")
        if self.into is not None and self.into not in DTYPES:
            raise ExportError(f"into={self.into!r}: choose one of {', '.join(map(repr, DTYPES))}")
        if self.quantize not in (None, "nf4"):
            raise ExportError(f"quantize={self.quantize!r}: 'nf4' is the format there is")


@dataclass(frozen=True)
class Deployed:
    """What was done to a program; `recipes` compute the weights it names."""

    recipes: dict[str, Recipe]
    adapters: dict[str, Any]
    nf4: list[str]
    stored: torch.dtype | None  # of weights that a merge dequantized


def deploy(program: ExportedProgram, model: nn.Module, plan: Plan) -> Deployed:
    """Rewrite `program` in place as `plan` says. `model` is only asked which of its parts are heads and routers.

    Raises ExportError when a merge was asked for that cannot be done; "auto" keeps such adapters beside their weight.
    """
    stored = nf4_sites(program)
    if stored and plan.quantize:
        raise ExportError(
            f"quantize={plan.quantize!r}: NF4 weights are in the model already ({stored[0]}, …); leave it out"
        )
    sites = _adapted(program)
    form = plan.adapters
    if form == "auto":
        form = "inline" if stored or plan.quantize else "merge"
    recipes: dict[str, Recipe] = {}
    folded, kept = [], dict.fromkeys(sites, "kept beside the weight") if form == "inline" else {}
    if plan.into is not None and (form != "merge" or not stored):
        raise ExportError(
            f"into={plan.into!r} says what a merge makes of NF4 weights; here adapters={plan.adapters!r} and there are "
            f"{'NF4' if stored else 'no NF4'} weights. Leave it out"
        )
    if form == "merge" and sites:
        if on_nf4 := [site for site in sites if site in stored]:
            recipes = spell_out_adapted(program, _into(plan, on_nf4))
        result = fold_adapters(program, recipes)
        recipes, folded, kept = result.recipes, result.sites, result.kept
        if kept and plan.adapters == "merge":
            reasons = "; ".join(f"{site}: {reason}" for site, reason in kept.items())
            raise ExportError(f"adapters='merge' cannot fold {reasons}. Use adapters='inline', which keeps every pair")
    if plan.quantize:
        recipes = quantize_program(program, model, recipes)
    return Deployed(
        recipes, {"form": form, "folded": folded, "inline": kept}, nf4_sites(program), DTYPES.get(plan.into or "")
    )


def _adapted(program: ExportedProgram) -> list[str]:
    tensors = Tensors(program)
    return list(dict.fromkeys(site_of(node, tensors) for node in program.graph.nodes if node.target in ADAPTERS))


def _into(plan: Plan, sites: list[str]) -> torch.dtype:
    if plan.into is None:
        raise ExportError(
            f"adapters='merge' on weights stored as NF4 ({sites[0]}{', …' if len(sites) > 1 else ''}): rounding "
            "back to NF4 would erase a small update. Keep the pair beside the base with adapters='inline' (exact, the "
            "default), or give into='float32' or into='bfloat16' to dequantize and fold"
        )
    return DTYPES[plan.into]
