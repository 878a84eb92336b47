"""`apply`: attach one named adapter to every site a spec means, freeze the rest; `remove`: take it out, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lrcompile.attaching import attach, detach, require_attachable
from lrcompile.building import stores_otherwise
from lrcompile.calibrating import Loss, calibrated
from lrcompile.errors import AdapterError, SpecError
from lrcompile.interop.bitsandbytes import note, taken_over
from lrcompile.matching import match
from lrcompile.merging import unmerge
from lrcompile.proving import prove
from lrcompile.specs import Spec
from lrcompile.state import has_state, require_name, require_settled, state_of
from lrcompile.switching import activate as activate
from lrcompile.switching import disabled as disabled
from lrcompile.wrapping import refuse_wrapped
from lrcompile.written import refuse_written, removal_notes


def apply(
    model: nn.Module,
    spec: Spec,
    *,
    name: str = "default",
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """y = xWᵀ + b  becomes  y = xWᵀ + b + s·(xAᵀ)Bᵀ at every site of `spec`; in place, returns `model`.

    The new adapter is active alone and the only thing that trains. Base parameters keep their identity, names and
    bits. An `fx.GraphModule` (also the module of an exported program) gets the same rewrite on its nodes. With
    `example_inputs` (a dict of keyword or a tuple of positional arguments) it is proved on the spot that every adapter
    is reached, gets a gradient and merges; before the base is quantized, where the method does that. Weights that
    bitsandbytes holds in NF4 (`from_pretrained` with `load_in_4bit`) are taken over first, with the codes they have.

    A method that starts from data takes `data`, an iterable of batches (a dict for `model(**batch)`, a tuple for
    `model(*batch)`), and `loss(output, batch)`, by default `output.loss`.

    Raises `SpecError` and `TargetError` (see `match`), `AdapterError` for a name in use, a wrapped or a merged model.
    On any error the model is as it was.
    """
    if not isinstance(spec, Spec):
        raise SpecError(
            f"apply takes a Spec (lrcompile.spec(...), Spec.load, Spec.from_peft), got {type(spec).__name__}",
            field="method",
        )
    refuse_wrapped(model, "apply to")
    if torch.is_inference_mode_enabled():
        raise AdapterError("apply within torch.inference_mode(): its tensors could never train; leave the block first")
    with taken_over(model) as names:
        _applied(model, spec, name, example_inputs, data, loss)
    state_of(model).notes += note(names)
    return model


def _applied(
    model: nn.Module, spec: Spec, name: str, example_inputs: Any, data: Iterable[Any] | None, loss: Loss | None
) -> None:
    matched = match(model, spec)
    if data is not None:
        require_attachable(model, spec, name, matched)
    spec, matched, measured = calibrated(model, spec, matched, data, loss)
    if example_inputs is None:
        attach(model, spec, name, matched, measured=measured)
        return
    before = (dict(state_of(model).active), state_of(model).training) if has_state(model) else ({}, ())
    again = stores_otherwise(spec)
    # the proof puts values of its own into the factors, so those that are made anew afterwards need not start
    attach(model, spec, name, matched, quantize_base=False, measured=measured, started=not again)
    try:
        prove(model, name, example_inputs)
    except BaseException:
        detach(model, state_of(model), name, matched.hit, *before)
        raise
    if again:
        detach(model, state_of(model), name, matched.hit, *before)
        attach(model, spec, name, matched, measured=measured)
        state_of(model).dead = ()


def remove(model: nn.Module, name: str | None = None, *, keep_trained_weights: bool = False) -> nn.Module:
    """Take out one adapter, or all of them: weights, classes and `requires_grad` are then what they were before
    `apply`.

    A merged model is unmerged first. Raises `AdapterError` for a name that is not there, and for an adapter whose
    training has written base weights (`plora` after an unload, `galore` after a step): with `keep_trained_weights` it
    goes and they stay as they were written.
    """
    state = state_of(model)
    require_settled(state, "remove")
    names = list(state.specs) if name is None else [name]
    for each in names:
        require_name(state, each)
    if not keep_trained_weights:
        refuse_written(model, names, "restore what the model was before apply")
    if state.merged:
        unmerge(model)
    if keep_trained_weights:
        for each in names:
            state.trained.keep_written(model, each)
    state.notes += removal_notes(model, names)
    for each in names:
        active = {other: weight for other, weight in state.active.items() if other != each}
        training = tuple(other for other in state.training if other != each)
        detach(model, state, each, state.sites[each], active, training)
    return model
