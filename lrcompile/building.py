"""Making the adapters of a spec, with their tensors filled, and the NF4 base some methods make beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lrcompile import sites
from lrcompile.nf4.modules import layout_of, nf4_weight, replace_codes
from lrcompile.progress import shown
from lrcompile.quantizing import is_nf4, quantize
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.adapter import Adapter, Start
from lrcompile.recipes.initialisers.random import generator_of
from lrcompile.recipes.recipe import part
from lrcompile.residuals import base_below
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.walking import submodule
from lrcompile.written import expect_writes

Built = list[tuple[Adapter, Start]]


def build(model: nn.Module, spec: Spec, hit: Sequence[Site], measured: Mapping[str, Any], started: bool) -> Built:
    """The adapters of all sites, their tensors filled; nothing of the model has changed yet."""
    method = recipe(spec.method)
    if method.form is None:
        return []
    form = part(method.form)
    placed = [_storage(model, spec, site) for site in hit]
    shared = form.share(spec, hit, dtype=placed[0][0], device=placed[0][1])
    built = []
    # a start from singular triplets takes seconds a site
    for site, (dtype, device) in shown(zip(hit, placed, strict=True), f"{spec.method}: starting factors", len(hit)):
        adapter = form.build(spec, site, shared, dtype=dtype, device=device)
        if method.writes_base:
            expect_writes(adapter, device)
        start = Start(
            site,
            spec,
            partial(base_weight, model, site),
            None if device.type == "meta" else generator_of(spec.seed, site.name, device),
            measured.get(site.name),
        )
        if started and device.type != "meta":
            with torch.no_grad():
                adapter.begin(start)
                if method.init is not None:
                    part(method.init)(adapter, start)
                adapter.finish(start)
        built.append((adapter, start))
    return built


def _storage(model: nn.Module, spec: Spec, site: Site) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of an adapter's tensors at `site`."""
    host = submodule(model, site.host)
    weight = host._parameters.get(site.slot)
    device = weight.device if weight is not None else next(host.buffers()).device
    own = weight.dtype if weight is not None else layout_of(host).dtype if is_nf4(host) else torch.float32
    wide = torch.promote_types(own, torch.float32)
    return getattr(torch, spec.dtype) if spec.dtype else wide, device


def base_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """The weight of `site` `[..., out, in]` in float32 (float64 for a float64 base), dequantized if need be."""
    host = submodule(model, site.host)
    if is_nf4(host):
        return nf4_weight(host, torch.promote_types(layout_of(host).dtype, torch.float32))
    held = base_below(model, site.parameter)
    if held is None:
        weight = sites.weight_of(model, site).detach()
    else:
        weight = (held.mT if site.transposed else held).to(model.get_parameter(site.parameter).device)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def make_base_nf4(model: nn.Module, spec: Spec, built: Built) -> None:
    hit = [start.site for _, start in built]
    plain = [site.name for site in hit if not is_nf4(submodule(model, site.host))]
    if plain:
        quantize(
            model,
            "nf4",
            block_size=spec.block_size,
            double_quant=spec.double_quant,
            compute_dtype=spec.compute_dtype,
            keep_base=spec.keep_base,
            targets="|".join(re.escape(each) for each in plain),
        )
    for _, start in built:
        if start.codes is not None:
            replace_codes(submodule(model, start.site.host), start.codes)


def stores_otherwise(spec: Spec) -> bool:
    """Does `attach` store base weights in another form, unless told not to?"""
    method = recipe(spec.method)
    return method.quantizes_base or (method.form is not None and part(method.form).holds_weight)
