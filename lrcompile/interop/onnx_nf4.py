"""`nf4_linear` in ONNX, its codes carried over bit for bit.

Where ONNX Runtime has a kernel for the layout this is com.microsoft's MatMulBnb4: y = x·(c[q]·m)ᵀ in float32.
Elsewhere it is spelled in standard ONNX: Gather the pair of values of each byte, Mul by the block's maximum, Reshape,
MatMul.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch.export import ExportedProgram

from lrcompile.dialect import nf4 as nf4  # registers torch.ops.lrcompile.nf4_linear
from lrcompile.interop.onnx_coded import KERNEL_BLOCKS, affine, constant, operator
from lrcompile.kernels.nf4_dequant import CODEBOOK, Nf4, decode_absmax
from lrcompile.passes.tensors import Tensors

NF4_LINEAR = torch.ops.lrcompile.nf4_linear.default
_KERNEL_ELEMENTS = 2**31  # the kernel counts elements in int32
_NF4 = 1

_matmul_bnb4 = operator("MatMulBnb4", "absmax", "quant_type", "transB")


def has_kernel(out_features: int, in_features: int, block_size: int, transposed: bool) -> bool:
    """transposed storage has none: the kernel's transB=0 computes x·Wᵀ all the same."""
    return not transposed and block_size in KERNEL_BLOCKS and out_features * in_features < _KERNEL_ELEMENTS


def expand_absmax(program: ExportedProgram) -> list[str]:
    """Replace double-quantized block maxima by their exact float32 values; returns the names of all codes."""
    tensors, names = Tensors(program), []
    for node in program.graph.nodes:
        if node.target is not NF4_LINEAR:
            continue
        x, codes, absmax, scale, offset, *rest = node.args
        names.append(tensors.targets[codes.name])
        if scale is not None:
            parts = [tensors.get(each) for each in (codes, absmax, scale, offset)]
            name = f"{tensors.targets[absmax.name]}_float32"
            node.args = (x, codes, tensors.add(name, decode_absmax(Nf4(*parts)), absmax), None, None, *rest)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return names


def translation(portable: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=…)`; the program's block maxima are expanded. `portable`: in
    standard ONNX throughout.
    """
    return {NF4_LINEAR: _translate_portable if portable else _translate}


def _translate(
    x: Any, codes: Any, absmax: Any, absmax_scale: Any, absmax_offset: Any, bias: Any,
    out_features: int, in_features: int, block_size: int, transposed: bool, compute_dtype: int,
) -> Any:  # fmt: skip
    return _translated(
        x, codes, absmax, bias, out_features, in_features, block_size, transposed, compute_dtype,
        has_kernel(out_features, in_features, block_size, transposed),
    )  # fmt: skip


def _translate_portable(
    x: Any, codes: Any, absmax: Any, absmax_scale: Any, absmax_offset: Any, bias: Any,
    out_features: int, in_features: int, block_size: int, transposed: bool, compute_dtype: int,
) -> Any:  # fmt: skip
    return _translated(x, codes, absmax, bias, out_features, in_features, block_size, transposed, compute_dtype, False)


def _translated(
    x: Any, codes: Any, absmax: Any, bias: Any, out_features: int, in_features: int, block_size: int, transposed: bool,
    compute_dtype: int, by_kernel: bool,
) -> Any:  # fmt: skip
    double = compute_dtype == ir.DataType.DOUBLE
    compute = ir.DataType.DOUBLE if double else ir.DataType.FLOAT

    def product(given: Any) -> Any:
        if by_kernel and not double:
            return _matmul_bnb4(
                given, codes, absmax, K=in_features, N=out_features, block_size=block_size, quant_type=_NF4, transB=1
            )
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        weight = _dequantized(codes, absmax, shape, block_size, compute)
        return op.MatMul(given, weight if transposed else op.Transpose(weight, perm=[1, 0]))

    return affine(x, bias, compute, product)


def _dequantized(codes: Any, absmax: Any, shape: tuple[int, int], block_size: int, compute: ir.DataType) -> Any:
    # Any: onnxscript types a result as any tensor at all, and an argument as the few it may be
    n = math.prod(shape)
    pairs = constant([(CODEBOOK[byte >> 4], CODEBOOK[byte & 15]) for byte in range(256)], compute.numpy())
    index: Any = op.Cast(codes, to=ir.DataType.INT32)
    flat: Any = op.Reshape(op.Gather(pairs, index, axis=0), constant([-1]))
    maxima: Any = op.Cast(absmax, to=compute)
    peaks: Any = op.Unsqueeze(maxima, constant([1]))
    if n % block_size == 0:
        weight: Any = op.Mul(op.Reshape(flat, constant([-1, block_size])), peaks)
    else:
        spread: Any = op.Expand(peaks, constant([-(-n // block_size), block_size]))
        weight = op.Mul(_first(flat, n), _first(op.Reshape(spread, constant([-1])), n))
    return op.Reshape(weight, constant(list(shape)))


def _first(values: Any, n: int) -> Any:
    return op.Slice(values, constant([0]), constant([n]))
