"""`integer_linear` in ONNX: com.microsoft's MatMulNBits, whose layout the codes have already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript
from onnx.defs import OpSchema
from onnxscript import opset18 as op

from lrcompile.passes.nodes import INTEGER_LINEAR

_INTEGERS = 4  # accuracy_level: the kernel may round each block of the input to 8 bits
_FLOATS = 1

_FLOAT, _BYTES = "T1", "T2"
_SCHEMA = OpSchema(
    "MatMulNBits",
    "com.microsoft",
    1,
    inputs=[
        OpSchema.FormalParameter("A", _FLOAT),
        OpSchema.FormalParameter("B", _BYTES),
        OpSchema.FormalParameter("scales", _FLOAT),
    ],
    outputs=[OpSchema.FormalParameter("Y", _FLOAT)],
    type_constraints=[(_FLOAT, ["tensor(float)"], ""), (_BYTES, ["tensor(uint8)"], "")],
    attributes=[
        OpSchema.Attribute(name, OpSchema.AttrType.INT, required=True)
        for name in ("K", "N", "bits", "block_size", "accuracy_level")
    ],
)
_matmul_nbits = onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), "MatMulNBits", _SCHEMA)


def translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=…)`."""
    return {INTEGER_LINEAR: _translate}


def _translate(
    x: Any, codes: Any, scales: Any, bias: Any, in_features: int, bits: int, block_size: int, integer_inputs: bool
) -> Any:
    outside, compute = x.dtype, ir.DataType.FLOAT
    given = x if outside == compute else op.Cast(x, to=compute)
    y: Any = _matmul_nbits(
        given, codes, scales, K=in_features, N=int(codes.shape[0]), bits=bits, block_size=block_size,
        accuracy_level=_INTEGERS if integer_inputs else _FLOATS,
    )  # fmt: skip
    if bias is not None:
        y = op.Add(y, bias if bias.dtype == compute else op.Cast(bias, to=compute))
    return y if outside == compute else op.Cast(y, to=outside)
