"""What an adapter was trained on: names, shapes and bits of the weights beside it, so that another base is noticed.

Bits are hashed whole when all of them are below 256 MiB, else at 4096 places spread over each weight. A base stored
otherwise (cast, quantized since) is compared by shape only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.int8.modules import is_int8
from lrcompile.nf4.modules import codes_of, is_nf4
from lrcompile.sites.site import Site
from lrcompile.state import State
from lrcompile.walking import submodule
from lrcompile.wording import listed

WHOLE = 256 << 20
_PLACES = 4096


def print_of(
    model: nn.Module, state: State | None, sites: Sequence[Site], *, sampled: bool | None = None
) -> dict[str, Any]:
    """`{"sampled": bool, "sites": {name: {"shape", "dtype", "sha256"}}}`, of the base below every adapter and merge."""
    held = {site.name: _base(model, state, site) for site in sites}
    if sampled is None:
        sampled = sum(t.numel() * t.element_size() for _, tensors in held.values() for t in tensors) >= WHOLE
    shapes = {
        site.name: [*([site.copies] if site.copies else []), site.out_features, site.in_features] for site in sites
    }
    return {
        "sampled": sampled,
        "sites": {
            name: {"shape": shapes[name], "dtype": dtype, "sha256": _digest(tensors, sampled)}
            for name, (dtype, tensors) in held.items()
        },
    }


def differences(
    recorded: dict[str, Any], model: nn.Module, state: State | None, sites: Sequence[Site]
) -> tuple[list[str], list[str]]:
    """What makes `model` another base than the recorded one, and what could not be compared."""
    there, faults, notes = recorded["sites"], [], []
    here = print_of(model, state, sites, sampled=recorded["sampled"])["sites"]
    if missing := [name for name in there if name not in here]:
        faults.append(f"it was made for {listed(missing)}, which its targets do not hit here")
    if added := [name for name in here if name not in there]:
        faults.append(f"its targets hit {listed(added)} here, which it does not have")
    stored_otherwise = []
    for name in [name for name in there if name in here]:
        theirs, ours = there[name], here[name]
        if theirs["shape"] != ours["shape"]:
            faults.append(f"{name} is {theirs['shape']} in its base and {ours['shape']} here")
        elif theirs["dtype"] != ours["dtype"]:
            stored_otherwise.append(f"{name} ({theirs['dtype']}, here {ours['dtype']})")
        elif theirs["sha256"] != ours["sha256"] and None not in (theirs["sha256"], ours["sha256"]):
            faults.append(f"the weight of {name} has other values")
    if stored_otherwise:
        notes.append(
            "the base is stored in another form than the adapter's was, so its bits were not compared:"
            f" {listed(stored_otherwise)}"
        )
    return faults, notes


def _base(model: nn.Module, state: State | None, site: Site) -> tuple[str, list[Tensor]]:
    """The dtype and the tensors of the weight without what merging or training in full put in its place."""
    host = submodule(model, site.host)
    if state is not None and site.name in state.folds:
        held = state.folds[site.name].base
        if held.data is None:
            assert held.codes is not None
            return "nf4", [t for t in held.codes[0] if t is not None]
        weight = held.data
    elif is_nf4(host):
        return "nf4", [t for t in codes_of(host) if t is not None]
    else:
        weight = getattr(host, site.slot)
        if state is not None and not is_int8(host):
            weight = state.residuals.get(site.parameter, state.trained.base.get(site.parameter, weight))
    return str(weight.dtype).removeprefix("torch."), [weight]


def _digest(tensors: Sequence[Tensor], sampled: bool) -> str | None:
    if any(tensor.is_meta for tensor in tensors):
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if sampled and flat.numel() > _PLACES:
            flat = flat[torch.linspace(0, flat.numel() - 1, _PLACES, dtype=torch.float64, device=flat.device).long()]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
