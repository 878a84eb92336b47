"""The manifest written beside an exported model: what it is, how it is to be run, and what it is held to."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import Captured, renamed
from lrcompile.deployment.declaring import Declared
from lrcompile.verifying.replay import unit_roundoff
from lrcompile.verifying.verdict import Limits

_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "onnx-ir", "transformers")
_BOUND = 16.0
_REASON = (
    "bound_ratio: correct float32 kernels stay under 4, 16 leaves room for another order of summation and still "
    "catches an int8 activation path; adapter_relative_error: above a merge into float16, below one that loses it"
)
_REASON_NF4 = (
    "; NF4 weights add nothing: the reference is float64 over the same dequantized weights, and the kernels form "
    "codebook times maximum and the product in float32"
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lrcompile": lrcompile.__version__, "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor the model itself holds; adapters are no part of it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lrcompile_adapters" in name.split(".") or not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data))
    return digest.hexdigest()


def limits(
    has_nf4: bool, inner: torch.dtype, stored: torch.dtype | None, declared: Declared | None = None
) -> dict[str, Any]:
    """What the file is held to; weights `stored` more narrowly than the model computes (`inner`) add their rounding, an
    approximate form what it was measured to cost.
    """
    wider = 1.0 if stored is None else max(1.0, unit_roundoff(stored) / unit_roundoff(inner))
    reason = _REASON + (_REASON_NF4 if has_nf4 and declared is None else "")
    if wider > 1:
        reason += f"; bound_ratio times {wider:g}: folded weights are rounded to {str(stored).removeprefix('torch.')}"
    held = Limits(bound_ratio=_BOUND * wider)
    if declared is not None:
        held, reason = declared.limits(held), reason + declared.reason
    return {"limits": held.to_dict(), "limits_reason": reason}


def ports(captured: Captured) -> dict[str, Any]:
    """Name, dtype and shape of each tensor that goes in and comes out; varying sizes by name."""
    program = captured.program
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}

    def port(name: str, value: Any) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else renamed(str(size), captured.dimensions) for size in value.shape]
        return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}

    returned = [values[name] for name in program.graph_signature.user_outputs if isinstance(name, str)]
    return {
        "inputs": [port(name, values[inside]) for inside, name in captured.inputs.items()],
        "outputs": [port(name, value) for name, value in zip(captured.outputs, returned, strict=True)],
    }


def encoded(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
