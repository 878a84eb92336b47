"""One rule says which uses of a weight are a linear map, for code traced by fx and for graphs of torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lrcompile.sites.weight_uses import NotALinearMap, reads_of, uses_of

IN, OUT = 5, 7


class Uses(nn.Module):
    def __init__(self, body, *shape: int):
        super().__init__()
        self.w, self.body = nn.Parameter(torch.randn(*shape)), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.w)


def uses(body, *shape, x: Tensor | None = None):
    """The uses in both forms a graph comes in; they must agree."""
    module = Uses(body, *shape)
    traced: Any = fx.Tracer().trace(module)
    found = uses_of(reads_of(traced)["w"], module.w.shape)
    if x is not None:
        program: Any = torch.export.export(module, (x,)).module()
        exported = uses_of(reads_of(program.graph)["w"], module.w.shape)
        assert [(u.form, u.transposed) for u in exported] == [(u.form, u.transposed) for u in found]
    return found


X = torch.randn(3, IN)
STORED = {  # as [out, in]
    "F.linear": lambda x, w: F.linear(x, w),
    "keyword": lambda x, w: F.linear(x, weight=w),
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x.matmul(w.t())": lambda x, w: x.matmul(w.t()),
    "torch.mm": lambda x, w: torch.mm(x, w.transpose(0, 1)),
    "negative dims": lambda x, w: torch.mm(x, w.transpose(-1, -2)),
    "mixed dims": lambda x, w: torch.mm(x, w.transpose(0, -1)),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "permute a list": lambda x, w: x @ w.permute([-1, 0]),
    "twice": lambda x, w: x @ w.t().contiguous().t().T,
    "cast": lambda x, w: F.linear(x, w.to(x.dtype)),
    "cast of x by w": lambda x, w: F.linear(x.to(w), w),
    "type_as": lambda x, w: F.linear(x.type_as(w), w.type_as(x)),
    "float()": lambda x, w: F.linear(x, w.double().float()),
    "addmm": lambda x, w: torch.addmm(torch.ones(OUT), x, w.t(), beta=2.0),
    "shape of w": lambda x, w: F.linear(x, w) * w.shape[0] * w.size(1),
}
FLIPPED = {  # as [in, out]
    "x @ w": lambda x, w: x @ w,
    "x @ w, twice": lambda x, w: x @ w + x.tanh() @ w,
    "F.linear(w.T)": lambda x, w: F.linear(x, w.T),
    "addmm": lambda x, w: torch.addmm(torch.ones(OUT), x, w),
    "x.mm": lambda x, w: x.mm(w),
}


@pytest.mark.parametrize("body", STORED.values(), ids=STORED)
def test_a_weight_stored_as_out_in_is_found(body):
    assert {(u.form, u.transposed) for u in uses(body, OUT, IN, x=X)} == {("product", False)}


@pytest.mark.parametrize("body", FLIPPED.values(), ids=FLIPPED)
def test_a_weight_stored_as_in_out_is_found(body):
    assert {(u.form, u.transposed) for u in uses(body, IN, OUT, x=X)} == {("product", True)}


STACKS = {
    "bmm": (lambda x, w: torch.bmm(x, w), True),
    "bmm of transposes": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), False),
    "matmul": (lambda x, w: x @ w.mT, False),
    "permute": (lambda x, w: x @ w.permute(0, 2, 1), False),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.ones(1, 1, 5), x, w), True),
}


@pytest.mark.parametrize(("body", "transposed"), STACKS.values(), ids=STACKS)
def test_a_stack_of_maps_is_found(body, transposed):
    (use,) = uses(body, 4, 5, 5, x=torch.randn(4, 3, 5))
    assert use.transposed is transposed


def test_a_lookup_is_found_with_its_padding_row_counted_from_the_start():
    ids = torch.tensor([1, 2])
    (use,) = uses(lambda x, w: F.embedding(x, w), OUT, IN, x=ids)
    assert (use.form, use.transposed, use.padding_idx) == ("lookup", True, None)
    (use,) = uses(lambda x, w: F.embedding(x, w, padding_idx=2), OUT, IN, x=ids)
    assert use.padding_idx == 2
    (use,) = uses(lambda x, w: F.embedding(x, w, -1), OUT, IN)
    assert use.padding_idx == OUT - 1


OTHER = {
    "left factor": (lambda x, w: w @ x.T, "left factor"),
    "both factors": (lambda x, w: w @ w, "both factors"),
    "einsum": (lambda x, w: torch.einsum("ni,oi->no", x, w), "einsum"),
    "elementwise": (lambda x, w: F.linear(x, w * 2), "mul"),
    "norm beside": (lambda x, w: F.linear(x, w) + w.norm(), "norm"),
    "bias of addmm": (lambda x, w: torch.addmm(w, x, torch.ones(5, 5)), "addmm"),
    "alpha": (lambda x, w: torch.addmm(x, x, w, alpha=2), "alpha"),
    "slice": (lambda x, w: F.linear(x, w[:3]), "getitem"),
    "returned": (lambda x, w: (F.linear(x, w), w), "output"),
    "both ways": (lambda x, w: F.linear(x, w) + x @ w, "both as stored and transposed"),
    "max_norm": (lambda x, w: F.embedding(x, w, max_norm=1.0), "max_norm"),
    "out=": (lambda x, w: torch.mm(x, w, out=x.clone()), "out="),
    "reshaped": (lambda x, w: F.linear(x, w.reshape(5, 5)), "reshape"),
    "assigned": (lambda x, w: w.add_(1).sum() + x, "add_"),
}


@pytest.mark.parametrize(("body", "reason"), OTHER.values(), ids=OTHER)
def test_any_other_use_is_refused_with_what_it_is(body, reason):
    with pytest.raises(NotALinearMap, match=reason):
        uses(body, 5, 5)


@pytest.mark.parametrize(
    "body",
    [lambda x, w: x @ w.transpose(0, 1), lambda x, w: x @ w.permute(1, 0, 2), lambda x, w: x @ w.transpose(0, -1)],
)
def test_a_stack_rearranged_by_more_than_a_transpose_is_refused(body):
    with pytest.raises(NotALinearMap, match="more than a transpose"):
        uses(body, 4, 4, 4)


def test_a_weight_never_used_has_no_uses():
    assert uses(lambda x, w: x * 2, OUT, IN) == []
