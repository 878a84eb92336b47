"""What a method measures on the user's data before it starts: gradients or inputs at its sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lrcompile.batches import Loss as Loss
from lrcompile.errors import AdapterError, SpecError
from lrcompile.matching import Matched
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.specs import Spec
from lrcompile.wrapping import refuse_meta


def calibrated(
    model: nn.Module, spec: Spec, matched: Matched, data: Iterable[Any] | None, loss: Loss | None
) -> tuple[Spec, Matched, Mapping[str, Any]]:
    """What the recipe's calibration found, by site name; the spec with what it decided (ranks, say), and what matched
    with its notes.

    Raises `SpecError` where the method needs data and has none, or takes none and was given some; what its calibration
    raises; `AdapterError` for a model without values.
    """
    method = recipe(spec.method)
    if method.calibration is None:
        if data is not None or loss is not None:
            raise SpecError(f"{spec.method} starts without data: leave out data= and loss=", field="data")
        return spec, matched, {}
    if data is None:
        raise SpecError(
            f"{spec.method} measures on your data how its factors start: apply(model, spec, data=batches, loss=fn), a"
            " batch being a dict (model(**batch)) or a tuple (model(*batch)), and loss(output, batch) by default"
            " output.loss",
            field="data",
        )
    if loss is not None and not callable(loss):
        raise SpecError(f"loss is a function of (output, batch), got {loss!r}", field="loss")
    refuse_meta(model, f"apply {spec.method}, which runs it", AdapterError)
    calibration = part(method.calibration)(model, spec, matched.hit)
    spec, measured = calibration.run(data, loss)
    return spec, replace(matched, notes=(*matched.notes, *calibration.notes)), measured
