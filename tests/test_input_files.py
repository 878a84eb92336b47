"""Inputs from files: what is written comes back; what claims to be huge, or is a pickle, is refused unread."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lrcompile.golden as golden
from lrcompile.errors import VerificationError
from lrcompile.verifying.input_files import read_inputs


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_of_every_plain_type_come_back(tmp_path: Path, compressed: bool) -> None:
    arrays = {
        "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "mask": np.array([[True, False]]),
        "pixels": np.asfortranarray(np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)),
        "half": np.ones((0, 5), np.float16),
        "scalar": np.array(3.5),
        "swapped": np.arange(3, dtype=">i4"),
    }
    save: Any = np.savez_compressed if compressed else np.savez
    save(tmp_path / "in.npz", **arrays)
    (found,) = read_inputs(tmp_path / "in.npz")
    assert isinstance(found, dict)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array)
        assert found[name].dtype == torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).dtype


def test_unnamed_arrays_are_positional_and_safetensors_and_goldens_work_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", np.ones(2), np.zeros(3))
    (found,) = read_inputs(tmp_path / "in.npz")
    assert isinstance(found, tuple)
    assert [tuple(each.shape) for each in found] == [(2,), (3,)]
    save_file({"x": torch.ones(2)}, tmp_path / "in.safetensors")
    (named,) = read_inputs(tmp_path / "in.safetensors")
    assert isinstance(named, dict)
    assert named["x"].tolist() == [1, 1]
    sets: list[Any] = [(torch.randn(2, 3),), (torch.randn(4, 3),)]
    golden.record(tmp_path / "golden", torch.nn.Linear(3, 2), sets, reason="two input sets")
    again = read_inputs(tmp_path / "golden")
    assert [torch.equal(one[0], two[0]) for one, two in zip(again, sets, strict=True)] == [True, True]  # type: ignore[index]


def test_a_small_file_that_expands_to_much_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as handle:
        np.lib.format.write_array_header_1_0(
            handle, {"descr": "<f4", "fortran_order": False, "shape": (40 << 20,)}
        )
        for _ in range(160):
            handle.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(VerificationError, match="claims to expand to"):
        read_inputs(path)


def array(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", array((1 << 40,), b""), "claims"),
        ("x.npy", array((2,), bytes(4)), "announces"),
        ("x.npy", array((2,), bytes(12)), "announces|claims"),
        ("x.npy", array((-1,), b""), "shape|not a readable"),
        ("x.npy", array((1,), bytes(8), "|O"), "objects never"),
        ("x.npy", array((1,), bytes(8), "<M8[s]"), "plain numbers"),
        ("x.npy", array((1,), b"\2", "|b1"), "neither 0 nor 1"),
        ("x.npy", b"\x93NUMPY\x07\x00", "version"),
        ("x.npy", b"", "not a readable"),
        ("x.txt", b"text", "no plain .npy"),
        ("../x.npy", array((1,), bytes(4)), ""),
    ],
)
def test_a_malformed_member_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / "in.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    if not message:  # a name is never a path: nothing is written anywhere
        assert list(read_inputs(path)[0]) == ["../x"]
        assert [each.name for each in tmp_path.iterdir()] == ["in.npz"]
        return
    with pytest.raises(VerificationError, match=message):
        read_inputs(path)


def test_a_pickle_in_a_member_is_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(VerificationError, match="objects never"):
        read_inputs(tmp_path / "in.npz")


def test_empty_missing_and_other_files_are_refused_with_what_would_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "in.pt").write_bytes(b"x")
    for name, message in (("empty.npz", "holds no tensor"), ("in.pt", "come from"), ("no.npz", "there is no file")):
        with pytest.raises(VerificationError, match=message):
            read_inputs(tmp_path / name)


def test_mutated_files_are_refused_or_read_and_never_crash(tmp_path: Path) -> None:
    chance = random.Random(0)
    np.savez_compressed(tmp_path / "in.npz", x=np.arange(50.0), ids=np.arange(12).reshape(3, 4))
    whole = (tmp_path / "in.npz").read_bytes()
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            act = chance.randrange(4)
            if act == 0:
                data[at] ^= 1 << chance.randrange(8)
            elif act == 1:
                data[at : at + 4] = struct.pack("<I", chance.choice([0, 1, 2**31, 2**32 - 1]))
            elif act == 2:
                del data[at:]
            else:
                data[at:at] = chance.randbytes(8)
        (tmp_path / "bad.npz").write_bytes(data)
        try:
            found = read_inputs(tmp_path / "bad.npz")[0]
        except VerificationError:
            refused += 1
        else:
            assert sum(each.nbytes for each in found.values()) < 10_000  # type: ignore[union-attr]
    assert refused > 200
