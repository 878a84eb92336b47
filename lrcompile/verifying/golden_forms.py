"""The forms a golden's model is put into at a check: what a user ships, held to float64 of the model it came from."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lrcompile.errors import VerificationError
from lrcompile.verifying.outputs import Inputs
from lrcompile.verifying.verdict import Limits, Verdict

FORMS = {
    "merged": "lrcompile.merge of a copy",
    "onnx": "an .onnx file: adapters folded, or kept beside NF4 weights",
    "onnx-inline": "an .onnx file with each adapter beside its weight",
    "onnx-inputs": "an .onnx file that is given its adapters when it runs",
    "onnx-nf4": "an .onnx file whose weights are stored as NF4, against the same rounded weights",
    "pt2": "a compiled package; takes a C++ compiler and a while",
}
_EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx": (".onnx", {}),
    "onnx-inline": (".onnx", {"adapters": "inline"}),
    "onnx-inputs": (".onnx", {"adapters": "inputs"}),
    "onnx-nf4": (".onnx", {"quantize": "nf4"}),
    "pt2": (".pt2", {}),
}


def check_forms(forms: Any) -> list[str]:
    """The forms as a list; `VerificationError` for one that there is not, or that stands twice."""
    if isinstance(forms, str) or not isinstance(forms, Sequence) or not all(isinstance(each, str) for each in forms):
        raise VerificationError(f"forms must be a list of names, not {forms!r}; there are {', '.join(FORMS)}")
    unknown = [each for each in forms if each not in FORMS]
    if unknown or len(set(forms)) != len(forms):
        raise VerificationError(f"unknown or repeated forms {unknown or list(forms)}; there are {', '.join(FORMS)}")
    return list(forms)


def through(form: str, model: nn.Module, inputs: list[Inputs], limits: Limits) -> Verdict:
    """The model in that form, held to the limits on every input set; files go to a temporary folder."""
    import lrcompile

    if form == "merged":
        merged = copy.deepcopy(model)
        lrcompile.merge(merged, into="float32" if _holds_nf4(model) else "keep")
        return lrcompile.verify(model, merged, inputs, limits=limits)
    suffix, options = _EXPORTS[form]
    with tempfile.TemporaryDirectory() as folder:
        exported = lrcompile.export(model, Path(folder, f"model{suffix}"), inputs[0], **options)
        return exported.verify(inputs, limits=limits)


def _holds_nf4(model: nn.Module) -> bool:
    from lrcompile.nf4.modules import is_nf4

    return any(is_nf4(module) for module in model.modules())
