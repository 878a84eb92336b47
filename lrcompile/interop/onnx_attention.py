"""Attention with a boolean mask as torch means it: softmax over the keys a row attends, zero where it attends none.

torch's translation masks with the lowest finite number, so a row that attends no key (a padding token before the
prompt) comes out as the mean of all values where torch gives zero. Its test for NaN, which such a row was to meet, is
replaced by the mask itself: Where(mask, softmax(scores + bias), 0), which changes no other row.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common
from onnxscript import rewriter
from onnxscript.rewriter import pattern


def zero_unattended(model: ir.Model) -> int:
    """Rewrite every masked softmax of `model`; returns how many there were."""
    count = rewriter.RewriteRuleSet([_RULE]).apply_to_model(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return count


def _target(op: Any, scores: Any, mask: Any, zero: Any, low: Any) -> Any:
    weights = op.Softmax(op.Add(scores, op.Where(mask, zero, low)), axis=-1, _outputs=["weights"])
    return op.Where(op.IsNaN(weights), zero, weights)


def _replacement(op: Any, scores: Any, mask: Any, zero: Any, low: Any, weights: Any) -> Any:
    return op.Where(mask, weights, zero)


def _check(_: Any, zero: ir.Value, low: ir.Value, **others: Any) -> bool:
    constants = [ir.convenience.get_const_tensor(value) for value in (zero, low)]
    if any(tensor is None or tensor.size != 1 for tensor in constants):
        return False
    nothing, least = (float(tensor.numpy().item()) for tensor in constants)  # type: ignore[union-attr]
    return nothing == 0 and least <= -65504  # float16's lowest


_RULE = pattern.RewriteRule(_target, _replacement, _check, name="zero unattended rows", remove_nodes=False)
