"""What a spec means for a model: which sites it hits, which it leaves alone and why. Looks only; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lrcompile import sites, targeting
from lrcompile.errors import SpecError, TargetError
from lrcompile.names import endings, meant, within
from lrcompile.nf4.modules import is_nf4
from lrcompile.owners import owners_of_parameters
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.training_in_full import trained_in_full
from lrcompile.walking import submodule


@dataclass(frozen=True)
class Matched:
    hit: tuple[Site, ...]
    spared: tuple[tuple[Site, str], ...]
    """Sites left alone, and why."""
    trained: tuple[str, ...]
    """Base parameters trained in full: those of `train_modules`, and biases."""
    notes: tuple[str, ...]


def match(
    model: nn.Module, spec: Spec, *, allow_high_rank: bool = False, known_codes: frozenset[str] = frozenset()
) -> Matched:
    """The sites of `model` that `spec` adapts. `known_codes`: sites whose NF4 codes the method may have, whatever it
    would need to start there, because an adapter of it was made beside them.

    Raises `TargetError` for an entry that hits nothing and for a named site that cannot be adapted, `SpecError` for a
    rank above min(in, out) that no `rank_pattern` asks for (unless `allow_high_rank`).
    """
    found = _considered(model, spec, sites.find(model), known_codes)
    if recipe(spec.method).writes_base:
        found = _refuse_shared(model, spec, found)
    if spec.targets == targeting.ALL_LINEAR:
        hit, spared = _all_linear(model, spec, found)
    else:
        hit, spared = _named(model, spec, found)
    if not hit and recipe(spec.method).form is not None:
        reasons = "; ".join(f"{site.name}: {why}" for site, why in spared[:5]) or "it has no linear maps"
        raise TargetError(f"nothing to adapt in this {type(model).__name__} ({reasons})")
    trained = trained_in_full(model, spec, hit)
    form = recipe(spec.method).form
    if form is None:
        excluded = within(spec.exclude, {name.rpartition(".")[0] for name in trained})
        trained = tuple(name for name in trained if name.rpartition(".")[0] not in excluded)
        if not trained:
            raise TargetError(f"{spec.method} finds nothing to train in this {type(model).__name__}", field="bias")
        return Matched((), tuple(spared), trained, ())
    part(form).demand(spec, hit)
    names = [site.name for site in hit]
    targeting.require_patterns(names, spec.rank_pattern, "rank_pattern")
    targeting.require_patterns(names, spec.alpha_pattern, "alpha_pattern")
    if not allow_high_rank and not recipe(spec.method).any_rank:
        _check_ranks(spec, hit)
    in_full = frozenset(trained)
    if both := [site.name for site in hit if site.parameter in in_full]:
        raise TargetError(
            f"{both[0]!r} is both a target and trained in full (train_modules); choose one: adapt it, or train it",
            field="train_modules",
        )
    return Matched(tuple(hit), tuple(spared), trained, tuple(_tie_notes(model, hit)))


def _considered(model: nn.Module, spec: Spec, found: Sequence[Site], known_codes: frozenset[str]) -> list[Site]:
    """The sites, refused where the method's form, what it measures or its demands on the base do not go with them."""
    method, out = recipe(spec.method), []
    demanding = [part(path) for path in (method.form, method.calibration) if path is not None]
    for site in found:
        reason = site.refusal or next((why for each in demanding if (why := each.refusal(site))), None)
        if reason is None and method.quantizes_base and site.kind not in ("linear", "conv1d"):
            reason = f"{method.name} holds weights of nn.Linear and Conv1D in 4 bits, no others"
        codes = method.nf4 is not None and site.name not in known_codes and is_nf4(submodule(model, site.host))
        if reason is None and codes:
            reason = f"its weight is NF4 codes, and {method.name} {method.nf4}"
        out.append(site if reason == site.refusal else replace(site, refusal=reason))
    return out


def _refuse_shared(model: nn.Module, spec: Spec, found: Sequence[Site]) -> list[Site]:
    """A weight that another module holds too would change there as well when the method writes it."""
    out = []
    owners = owners_of_parameters(model)
    for site in found:
        weight = submodule(model, site.host)._parameters.get(site.slot)
        others = [name for name in owners.get(id(weight), ()) if name != site.parameter]
        reason = f"{spec.method} writes its weight, which is one with {', '.join(others)} and would change there too"
        out.append(replace(site, refusal=reason) if others and site.refusal is None else site)
    return out


def _all_linear(model: nn.Module, spec: Spec, found: Sequence[Site]) -> tuple[list[Site], list[tuple[Site, str]]]:
    heads = targeting.output_heads(model)
    names = [name for site in found for name in site.names]
    if spec.exclude:
        targeting.require_hits(names, spec.exclude, "exclude")
    excluded = meant(spec.exclude, names)
    in_full = within(spec.train_modules, [site.host for site in found])
    hit, spared = [], []
    for site in found:
        reason = _why_spared(model, spec, site, heads, excluded, in_full)
        if reason is None:
            hit.append(site)
        else:
            spared.append((site, reason))
    return hit, spared


def _why_spared(
    model: nn.Module, spec: Spec, site: Site, heads: dict[str, str], excluded: set[str], in_full: set[str]
) -> str | None:
    if not excluded.isdisjoint(site.names):
        return "excluded"
    if not any(targeting.in_layers(name, spec.layers) for name in site.names):
        return "not in the chosen layers"
    if site.host in in_full:
        return "trained in full (train_modules)"
    if site.form == "lookup":
        return "embedding"
    if site.host in heads:
        return heads[site.host]
    if targeting.is_router(model, site.host):
        return "mixture router"
    return site.refusal


def _named(model: nn.Module, spec: Spec, found: Sequence[Site]) -> tuple[list[Site], list[tuple[Site, str]]]:
    names = [name for site in found for name in site.names]
    _explain_other_modules(model, spec, names)
    targeting.require_hits(names, spec.targets, "targets")
    if spec.exclude:
        targeting.require_hits(names, spec.exclude, "exclude")
    targeted, excluded = meant(spec.targets, names), meant(spec.exclude, names)
    hit, spared = [], []
    for site in found:
        if targeted.isdisjoint(site.names):
            spared.append((site, "not targeted"))
        elif not excluded.isdisjoint(site.names):
            spared.append((site, "excluded"))
        elif not any(targeting.in_layers(name, spec.layers) for name in site.names):
            spared.append((site, "not in the chosen layers"))
        else:
            hit.append(site)
    if refused := [site for site in hit if site.refusal]:
        listed = "\n".join(f"  {site.name}: {site.refusal}" for site in refused[:8])
        raise TargetError(
            f"{len(refused)} of the targeted sites cannot be adapted:\n{listed}\nLeave them out with exclude=, or"
            " change them."
        )
    return hit, spared


def _explain_other_modules(model: nn.Module, spec: Spec, names: Sequence[str]) -> None:
    """An entry that names a module which is no site deserves better than "no such name"."""
    if isinstance(spec.targets, str):
        return
    there = {ending for name in names for ending in endings(name)}
    for entry in spec.targets:
        if entry in there:
            continue
        for name, module in model.named_modules():
            if name and meant((entry,), (name,)):
                raise TargetError(
                    f"targets: {entry!r} names {name!r}, a {type(module).__name__}, which holds no weight that is"
                    " one linear map;"
                    " adapters act on nn.Linear, Conv1D, nn.Embedding, nn.MultiheadAttention, 3-D expert weights and"
                    " raw matrices"
                )


def _check_ranks(spec: Spec, hit: Sequence[Site]) -> None:
    for site in hit:
        largest = min(site.in_features, site.out_features)
        if spec.rank > largest and not spec.rank_keys.hitting(site.name):
            raise SpecError(
                f"rank={spec.rank} is above {largest}, the most a {site.out_features}×{site.in_features} map can"
                f" have, at {site.name!r};"
                f" lower it, exclude the site, or ask for it with rank_pattern={{{site.name!r}: …}}",
                field="rank",
            )


def _tie_notes(model: nn.Module, hit: Sequence[Site]) -> list[str]:
    tied = {key: names for key, names in owners_of_parameters(model).items() if len(names) > 1}
    notes = []
    for site in hit if tied else ():
        names = tied.get(id(submodule(model, site.host)._parameters.get(site.slot)), ())
        if others := [name for name in names if name != site.parameter]:
            notes.append(
                f"{site.name} shares its weight with {', '.join(others)}: only this use is adapted; merging unties them"
            )
    return notes
