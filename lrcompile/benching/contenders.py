"""What each method is given: a rank that spends the same number of parameters, and fields in proportion to the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import lrcompile
from lrcompile.planning import plan
from lrcompile.recipes import recipe

REFERENCE_RANK = 8
"""LoRA's rank; what it trains is everyone's budget."""
_MOST = 256
"""The largest rank that a paper of the family uses with models of this size."""


def fields_of(method: str, steps: int, rank: int, lr: float) -> dict[str, Any]:
    """The method's own fields for a run of `steps`, where it has no usual value or that is meant for long runs."""
    own: dict[str, dict[str, Any]] = {
        "adalora": {
            "target_rank": max(1, rank * 2 // 3), "total_steps": steps, "tinit": steps // 10, "tfinal": steps // 3,
        },
        "delta-lora": {"start_step": steps // 4, "ratio": 0.5},
        "galore": {"update_proj_gap": max(1, steps // 4), "scale": 1.0},
        "q-galore": {"update_proj_gap": max(1, steps // 4), "scale": 1.0},
        "lora-drop": {"warmup_steps": max(2, steps // 5)},
        "plora": {"period": max(1, steps // 3), "momentum": 1.0},
        "lora-sb": {"first_lr": lr},
    }  # fmt: skip
    quantized = {"compute_dtype": "float32"} if recipe(method).quantizes_base else {}  # the tasks' activations are
    return {**own.get(method, {}), **quantized}


def spec_of(method: str, *, rank: int, steps: int, lr: float, seed: int, head: Sequence[str]) -> lrcompile.Spec:
    """The spec of one contender. alpha = 2·rank, as is usual."""
    given: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank, "seed": seed, "train_modules": list(head)}
    lacks = recipe(method).lacks
    given = {key: value for key, value in given.items() if key not in lacks}
    return lrcompile.spec(method, **given, **fields_of(method, steps, rank, lr))


def matched_rank(method: str, model: nn.Module, budget: int, head: Sequence[str]) -> int:
    """The rank at which `method` trains the most it can without exceeding `budget` parameters beside the head.

    1 where the method has no rank. A method that cannot reach the budget gets its largest rank.
    """
    if "rank" in recipe(method).lacks:
        return 1
    low, high = 1, _MOST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(method, model, middle, budget, head) else (low, middle - 1)
    return low


def _fits(method: str, model: nn.Module, rank: int, budget: int, head: Sequence[str]) -> bool:
    try:
        return trained(method, model, rank, head) <= budget
    except lrcompile.SpecError:  # a rank that no site can have
        return False


def trained(method: str, model: nn.Module, rank: int, head: Sequence[str]) -> int:
    """Parameters `method` trains at `rank`, those of the head not counted."""
    spec = spec_of(method, rank=rank, steps=100, lr=1e-3, seed=0, head=head)
    whole = plan(model, spec).trainable
    return whole - sum(p.numel() for name in head for p in model.get_submodule(name).parameters())
