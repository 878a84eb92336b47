"""nn.Embedding: the same pair read by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile


def adapted(padding: int | None = None, dtype=torch.float64, vocabulary=11, width=5, rank=3):
    base: Any = nn.Embedding(vocabulary, width, padding_idx=padding, dtype=dtype)
    model: Any = nn.Sequential(base)
    lrcompile.apply(model, lrcompile.spec("lora", rank=rank, alpha=4.5, targets=["0"], seed=0))
    return model, model[0].lrcompile_adapters["weight"]["default"]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    ids=st.lists(st.lists(st.integers(0, 10), min_size=2, max_size=2), max_size=4),
    padding=st.sampled_from([None, 0, 10]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    index=st.sampled_from([torch.int64, torch.int32]),
)
def test_at_the_start_it_is_the_base_and_then_the_formula(ids, padding, dtype, index):
    model, adapter = adapted(padding, dtype)
    rows = torch.tensor(ids, dtype=index).reshape(-1, 2)
    base: Any = nn.functional.embedding(rows, model[0].weight)
    assert torch.equal(model(rows), base)
    nn.init.normal_(adapter.A)
    # code, scale and sum each round once; products of three terms
    true = (model[0].weight.double() + 1.5 * (adapter.B.double() @ adapter.A.double()).T)[rows.long()]
    size = (model[0].weight.double().abs() + 1.5 * (adapter.B.double().abs() @ adapter.A.double().abs()).T)[rows.long()]
    assert bool(((model(rows).double() - true).abs() <= 10 * torch.finfo(dtype).eps * size).all())


def test_at_the_start_the_gradient_of_B_is_exactly_zero_and_that_of_A_is_not():
    model, adapter = adapted()
    model(torch.arange(11)).sum().backward()
    assert not adapter.B.grad.any()
    assert adapter.A.grad.any()


def test_the_gradients_are_those_of_the_weights():
    model, adapter = adapted()
    nn.init.normal_(adapter.A)
    ids, up = torch.tensor([3, 1, 3, 10]), torch.randn(4, 5, dtype=torch.float64)
    model(ids).backward(up)
    G = torch.zeros(5, 11, dtype=torch.float64).index_add_(1, ids, up.T)  # ∂W as [out, in]
    torch.testing.assert_close(adapter.A.grad, 1.5 * adapter.B.T @ G)
    torch.testing.assert_close(adapter.B.grad, 1.5 * G @ adapter.A.T)


def test_the_padding_row_never_learns():
    model, adapter = adapted(padding=2)
    model(torch.tensor([2, 2, 4])).sum().backward()
    assert not adapter.A.grad[:, 2].any()
    assert adapter.A.grad[:, 4].any()


def test_it_merges_and_unmerges():
    model, adapter = adapted(dtype=torch.float32)
    nn.init.normal_(adapter.A)
    ids, before = torch.arange(11), model[0].weight.detach().clone()
    y = model(ids)
    lrcompile.merge(model)
    torch.testing.assert_close(model(ids), y)
    lrcompile.unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_the_call_is_that_of_the_original():
    model, _ = adapted()
    assert torch.equal(model[0](input=torch.tensor([1])), model(torch.tensor([1])))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse"), ({"scale_grad_by_freq": True}, "frequency")],
)
def test_what_no_adapter_can_follow_is_refused(options, reason):
    with pytest.raises(lrcompile.TargetError, match=reason):
        lrcompile.apply(nn.Sequential(nn.Embedding(11, 5, **options)), lrcompile.spec("lora", rank=2, targets=["0"]))


def test_all_linear_leaves_embeddings_alone():
    model: Any = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 3))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2))
    assert {row.name: row.reason for row in lrcompile.report(model).sites if not row.adapted} == {"0": "embedding"}
