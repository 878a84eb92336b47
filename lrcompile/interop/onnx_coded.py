"""Linear maps on stored codes in ONNX: com.microsoft's operators for them, and what surrounds any such product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
from onnx.defs import OpSchema
from onnxscript import opset18 as op

KERNEL_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes these operators have kernels for; others load, and fail when the session runs."""


def operator(name: str, scales: str, *attributes: str) -> Any:
    """y = x·Wᵀ from (A: x, B: the codes of W, `scales`), K and N being W's `[N, K]`; all attributes are integers."""
    floats, codes = "T1", "T2"
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(*each) for each in (("A", floats), ("B", codes), (scales, floats))],
        outputs=[OpSchema.FormalParameter("Y", floats)],
        type_constraints=[(floats, ["tensor(float)"], ""), (codes, ["tensor(uint8)"], "")],
        attributes=[
            OpSchema.Attribute(each, OpSchema.AttrType.INT, required=True)
            for each in ("K", "N", "block_size", *attributes)
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, schema)


def affine(x: Any, bias: Any, compute: ir.DataType, product: Callable[[Any], Any]) -> Any:
    """product(x) + bias, formed in `compute`, in x's own type."""
    outside = x.dtype
    y = product(x if outside == compute else op.Cast(x, to=compute))
    if bias is not None:
        y = op.Add(y, bias if bias.dtype == compute else op.Cast(bias, to=compute))
    return y if outside == compute else op.Cast(y, to=outside)


def constant(values: Any, dtype: Any = np.int64) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(values, dtype)))
