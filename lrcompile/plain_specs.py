"""The plain `lora` spec that gives known sites known ranks and scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lrcompile.errors import AdapterError, SpecError
from lrcompile.factoring import Pair
from lrcompile.interop.peft_matching import patterns_for
from lrcompile.matching import match
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.wording import listed


def plain_spec(model: nn.Module, spec: Spec, sites: Sequence[Site], pairs: Sequence[Pair]) -> Spec:
    """The `lora` spec with these ranks and scales at these sites, in the words of `spec` where they mean them."""
    ranks = {site.name: pair.rank for site, pair in zip(sites, pairs, strict=True)}
    alphas = {site.name: _alpha(pair.scale, pair.rank) for site, pair in zip(sites, pairs, strict=True)}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    fields = {
        "method": "lora",
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": patterns_for({}, rank, ranks),
        "alpha_pattern": patterns_for({}, alpha, alphas),
        **{key: getattr(spec, key) for key in ("dropout", "bias", "train_modules", "dtype", "seed")},
    }
    own = {"targets": spec.targets, "exclude": spec.exclude, "layers": spec.layers}
    for targets in (own, {"targets": tuple(ranks)}):
        plain = Spec.from_dict(fields | targets)
        if _means(model, plain, ranks):
            return plain
    raise AdapterError(f"no lora spec means exactly these sites: {listed(list(ranks))}")


def _means(model: nn.Module, spec: Spec, wanted: Mapping[str, int]) -> bool:
    try:
        return {site.name for site in match(model, spec, allow_high_rank=True).hit} == set(wanted)
    except SpecError:
        return False  # these words do not suit lora here; others are tried


def _alpha(scale: float, rank: int) -> float:
    """The roundest number that, divided by the rank, is `scale` to the last bit."""
    product = scale * rank
    near = (round(product, 9), product, math.nextafter(product, 0), math.nextafter(product, math.inf))
    return next((alpha for alpha in near if alpha / rank == scale), product)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
