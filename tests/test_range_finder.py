"""The leading singular directions of a product, without the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zoo.processes import spawn
from zoo.projected import find_directions

from lrcompile.recipes.range_finder import leading_directions


def factors(
    rows: int, n: int, m: int, *, decay: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """a and b such that the singular values of aᵀb fall by `decay` each."""
    U, V = (torch.linalg.qr(torch.randn(k, m, dtype=torch.float64)).Q for k in (n, m))
    b = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64)).Q[:, :m]
    a = b @ torch.diag(decay ** torch.arange(m)).double() @ U.t()
    return a.to(dtype), (b @ V.t()).to(dtype)


def sine(P: Tensor, Q: Tensor) -> float:
    """Of the largest principal angle between two row spaces."""
    return float(torch.linalg.matrix_norm(P - P @ Q.t() @ Q, 2))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(0, 8),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_they_are_orthonormal_whatever_the_rank_of_the_product(m, more, rank, rows, dtype):
    rank = min(rank, m)
    a, b = torch.randn(rows, m + more, dtype=dtype), torch.randn(rows, m, dtype=dtype)
    P = leading_directions(a, b, rank, seed=0)
    assert P is not None
    assert P.shape == (rank, m)
    assert P.dtype == dtype
    assert (P @ P.t() - torch.eye(rank, dtype=dtype)).abs().max() < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_they_are_the_leading_singular_directions(rank):
    a, b = factors(40, 33, 21, decay=0.5)
    expected = torch.linalg.svd(a.t() @ b).Vh[:rank]
    P = leading_directions(a, b, rank, seed=0)
    assert P is not None
    assert sine(P, expected) < 2.0**-40 * 10  # (σ_{r+8}/σ_r)^(2·2+1)
    assert torch.allclose((P * expected).sum(1).abs(), torch.ones(rank).double(), atol=1e-9)


def test_without_a_gap_they_still_hold_nearly_all_that_is_to_be_had():
    a, b = torch.randn(64, 90, dtype=torch.float64), torch.randn(64, 70, dtype=torch.float64)
    G = a.t() @ b
    P = leading_directions(a, b, 16, seed=3)
    assert P is not None
    assert (G @ P.t()).norm() > 0.98 * torch.linalg.svdvals(G)[:16].norm()


def test_a_full_rank_is_a_basis_of_everything():
    a, b = torch.randn(3, 14, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)  # G has rank 3 only
    P = leading_directions(a, b, 9, seed=0)
    assert P is not None
    assert torch.allclose(P.t() @ P, torch.eye(9).double(), atol=1e-13)


def test_the_product_is_never_formed():
    rows, n, m = 5, 61, 47
    seen: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
            return result

    with Shapes():
        leading_directions(torch.randn(rows, n), torch.randn(rows, m), 4, seed=0)
    assert seen
    assert max(torch.Size(shape).numel() for shape in seen) <= max(n, m) * (4 + 8)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone():
    a, b = torch.randn(6, 20), torch.randn(6, 15)
    state = torch.get_rng_state()
    first, second, other = (leading_directions(a, b, 4, seed=seed) for seed in (1, 1, 2))
    assert first is not None
    assert second is not None
    assert other is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_product_without_directions_gives_none(value):
    a = torch.randn(4, 9)
    a[1] *= value
    if value == 0.0:
        a.zero_()
    assert leading_directions(a, torch.randn(4, 6), 3, seed=0) is None


@pytest.mark.parametrize("factor", [1e-18, 1e18])
def test_the_size_of_the_product_does_not_matter(factor):
    a, b = factors(20, 15, 11, decay=0.5, dtype=torch.float32)
    P, Q = (leading_directions(a * f, b, 3, seed=0) for f in (1.0, factor))
    assert P is not None
    assert Q is not None
    assert sine(Q, P) < 1e-5


@pytest.mark.slow
def test_every_process_of_a_group_finds_the_directions_of_the_summed_product(tmp_path):
    a, b = factors(20, 15, 11, decay=0.5)
    torch.save((a, b), tmp_path / "data.pt")
    spawn(tmp_path / "store", find_directions, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = leading_directions(a, b, 3, seed=0)
    assert alone is not None
    assert torch.equal(first, second)
    assert sine(first, alone) < 1e-10
