"""Dealing a sum of ranks out to sites."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrcompile.recipes import recipe
from lrcompile.specs import Spec


def redistributed(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks by site name that add up to `budget`: the largest of all `ratios` win, each site's first among them anyway.

    `ratios`: by site, what its directions explain, falling; as many as it may have at most. The budget is at least the
    number of sites and at most that of directions.
    """
    names = list(ratios)
    ranks = dict.fromkeys(names, 1)
    owners = [name for name in names for _ in ratios[name][1:]]
    rest = torch.cat([ratios[name][1:] for name in names])
    order = rest.argsort(descending=True, stable=True)[: budget - len(names)]
    for index in order.tolist():
        ranks[owners[index]] += 1
    return ranks


def with_ranks(spec: Spec, ranks: Mapping[str, int]) -> Spec:
    """`spec` with these ranks at these sites, each with the alpha that leaves its scale s as it was."""
    scale = recipe(spec.method).scale
    alphas = {}
    for name, rank in ranks.items():
        alpha = spec.alpha_of(name)
        alphas[name] = alpha * scale(spec, spec.rank_of(name), alpha) / scale(spec, rank, alpha)
    # a pattern also hits longer names that end in it, and the first hit counts
    longest_first = sorted(ranks, key=len, reverse=True)
    return replace(
        spec,
        rank_pattern={re.escape(name): ranks[name] for name in longest_first},
        alpha_pattern={re.escape(name): alphas[name] for name in longest_first},
    )
