"""Tensors and buffers on the pages of files that have no name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._inductor import codecache

from lrcompile.interop import paging

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="elsewhere everything stays in memory")
MIB = 1 << 20


def _anonymous() -> int:
    """Bytes of the process's memory that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_tensor_is_laid_out_alike_in_a_storage_of_its_own(tmp_path, dtype):
    whole = torch.arange(400 * 600, dtype=torch.float32).view(400, 600).to(dtype)
    for tensor in (whole, whole.T, whole[100:300]):
        made = paging.empty_like(tensor, tmp_path)
        assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), dtype)
        assert made.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(made.copy_(tensor), tensor)
    assert paging.empty_like(whole, tmp_path, torch.float64).dtype is torch.float64
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what is anonymous is read there")
def test_what_is_written_to_it_is_no_memory_of_the_process(tmp_path):
    before = _anonymous()
    paged = paging.empty_like(torch.empty(64 * MIB, dtype=torch.uint8), tmp_path).fill_(1)
    assert _anonymous() - before < 8 * MIB
    plain = torch.ones(64 * MIB, dtype=torch.uint8)
    assert _anonymous() - before > 56 * MIB
    assert torch.equal(paged, plain)


def test_small_tensors_stay_in_memory(tmp_path):
    tensor = torch.ones(paging.SMALL - 1, dtype=torch.uint8)
    assert paging.empty_like(tensor, tmp_path / "missing").shape == tensor.shape


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, full_disk):
    with pytest.raises(OSError, match="too large"):
        paging.empty_like(torch.empty(2 * MIB, dtype=torch.uint8), tmp_path)
    assert os.listdir(tmp_path) == []


def test_inductor_collects_constants_there_within_the_block_alone(tmp_path):
    assert "bytearray" in codecache.AotCodeCompiler.compile.__code__.co_names  # or nothing is gained any more
    for raised in (None, KeyboardInterrupt()):
        try:
            with paging.paged_constants(tmp_path):
                made = vars(codecache)["bytearray"](MIB)
                assert isinstance(made, paging.Pages)
                assert isinstance(vars(codecache)["bytearray"](10), bytearray)
                assert (len(made), bytes(made[:9])) == (MIB, bytes(9))
                if raised:
                    raise raised
        except KeyboardInterrupt:
            pass
        assert "bytearray" not in vars(codecache)
    assert os.listdir(tmp_path) == []
