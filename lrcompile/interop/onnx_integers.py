"""`integer_linear` in ONNX: com.microsoft's MatMulNBits, whose layout the codes have already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from lrcompile.interop.onnx_coded import KERNEL_BLOCKS, affine, constant, operator
from lrcompile.passes.nodes import INTEGER_LINEAR

_INTEGERS = 4  # accuracy_level: the kernel may round each block of the input to 8 bits
_FLOATS = 1
_matmul_nbits = operator("MatMulNBits", "scales", "bits", "accuracy_level")


def translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=…)`."""
    return {INTEGER_LINEAR: _translate}


def _translate(
    x: Any, codes: Any, scales: Any, bias: Any, in_features: int, bits: int, block_size: int, integer_inputs: bool
) -> Any:
    out_features = int(codes.shape[0])

    def product(given: Any) -> Any:
        if block_size in KERNEL_BLOCKS:
            return _matmul_nbits(
                given, codes, scales, K=in_features, N=out_features, bits=bits, block_size=block_size,
                accuracy_level=_INTEGERS if integer_inputs else _FLOATS,
            )  # fmt: skip
        assert bits == 8  # whole rows of 4 bits have neither a kernel nor a use
        return _whole_rows(given, codes, scales, out_features, in_features, integer_inputs)

    return affine(x, bias, ir.DataType.FLOAT, product)


def _whole_rows(x: Any, codes: Any, scales: Any, out_features: int, in_features: int, integer_inputs: bool) -> Any:
    """In standard operators: y = r·s·(x̂·Ŵᵀ) by MatMulInteger, x̂ = round(x/r), r = max|x|/127 of each row.

    The codes leave their zero point of 128 behind in operations on constants, which runtimes evaluate when they load:
    signed weights are what MatMulInteger is fastest with.
    """
    whole: Any = op.Reshape(codes, constant([out_features, -1]))
    whole = op.Slice(whole, constant([0]), constant([in_features]), constant([1]))  # an odd row has one code more
    centred: Any = op.Sub(op.Cast(whole, to=ir.DataType.INT32), constant(128, np.int32))
    per_output: Any = op.Reshape(scales, constant([out_features]))
    if not integer_inputs:
        weight: Any = op.Cast(centred, to=ir.DataType.FLOAT)
        return op.Mul(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), per_output)
    weight = op.Cast(centred, to=ir.DataType.INT8)
    signed: Any = op.Transpose(weight, perm=[1, 0])
    peak: Any = op.ReduceMax(op.Abs(x), constant([-1]), keepdims=1)
    step: Any = op.Max(op.Div(peak, constant(127, np.float32)), constant(np.finfo(np.float32).tiny, np.float32))
    rounded: Any = op.Add(op.Round(op.Div(x, step)), constant(128, np.float32))
    product: Any = op.MatMulInteger(op.Cast(rounded, to=ir.DataType.UINT8), signed, constant(128, np.uint8))
    return op.Mul(op.Mul(op.Cast(product, to=ir.DataType.FLOAT), step), per_output)
