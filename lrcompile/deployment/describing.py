"""The manifest written beside an exported model: what it is, how it is to be run, and what it is held to."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

import lrcompile
from lrcompile.verifying.replay import unit_roundoff
from lrcompile.verifying.verdict import Limits

SCHEMA = 1
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


def limits(has_nf4: bool, inner: torch.dtype, stored: torch.dtype | None) -> dict[str, Any]:
    """What the file is held to; weights `stored` more narrowly than the model computes (`inner`) add their rounding."""
    wider = 1.0 if stored is None else max(1.0, unit_roundoff(stored) / unit_roundoff(inner))
    reason = _REASON + (_REASON_NF4 if has_nf4 else "")
    if wider > 1:
        reason += (
            f"; bound_ratio times {wider:g}: folded weights are rounded to {str(stored).removeprefix('torch.')}"
        )
    return {"limits": Limits(bound_ratio=_BOUND * wider).to_dict(), "limits_reason": reason}


def ports(program: torch.export.ExportedProgram, names: Iterable[str], dimensions: Mapping[str, str]) -> dict[str, Any]:
    """Name, dtype and shape of each tensor that goes in and comes out; varying sizes by name."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}

    def port(name: str, value: Any) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else dimensions.get(str(size), str(size)) for size in value.shape]
        return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}

    signature = program.graph_signature
    given = [
        name for name in signature.user_inputs if isinstance(name, str) and isinstance(values.get(name), torch.Tensor)
    ]
    returned = [values[name] for name in signature.user_outputs if isinstance(name, str)]
    return {
        "inputs": [port(name, values[name]) for name in given],
        "outputs": [port(name, value) for name, value in zip(names, returned, strict=True)],
    }


def encoded(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
