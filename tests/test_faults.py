"""Faults that kill fine-tunes silently, put in on purpose: each verdict fails and names the guilty place, in a module,
a graph and an ONNX file, with its own share told from what later places inherit; and the repro shows it by itself.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.verification import verify
from lrcompile.verifying.verdict import Limits, Verdict

WIDTH = 32  # a multiple of NF4's smallest block; square, so that a transposed adapter fits
INPUTS = (torch.linspace(-3, 3, 7 * WIDTH).reshape(7, WIDTH).sin(),)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sharpness = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = self.q(h) @ self.k(h).transpose(-1, -2) * (self.sharpness / WIDTH**0.5)
        return x + self.o(scores.softmax(-1) @ self.v(h))


def blocks(method: str = "lora", nf4: bool = False, **fields: Any) -> nn.Module:
    model = nn.Sequential(*(Block() for _ in range(2)), nn.Linear(WIDTH, 5)).eval()
    if nf4:
        lrcompile.quantize(model, "nf4", block_size=32, exclude=["2"])
    lrcompile.apply(model, lrcompile.spec(method, rank=3, alpha=6, targets=["q", "o"], seed=0, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".B", ".m")):
                parameter.add_(0.2 * torch.randn_like(parameter).abs())
    return model


def factor(model: nn.Module, site: str, name: str) -> Tensor:
    return model.get_parameter(f"{site}.lrcompile_adapters.weight.default.{name}")


def swapped_nibbles(model: nn.Module) -> None:
    codes = model.get_buffer("1.k.weight_codes")
    codes.copy_((codes >> 4) | (codes << 4))


def scaled_twice(model: nn.Module) -> None:
    factor(model, "1.o", "B").data.mul_(2.0)  # s = alpha / rank = 2


def transposed(model: nn.Module) -> None:
    down, up = factor(model, "1.q", "A"), factor(model, "1.q", "B")
    down.data, up.data = up.data.t().contiguous(), down.data.t().contiguous()


def sharper(model: nn.Module) -> None:
    model.get_submodule("1").sharpness = WIDTH**-0.5


FAULTS: dict[str, tuple[Callable[[nn.Module], None], str, dict[str, Any]]] = {
    "the nibbles of NF4 codes swapped": (swapped_nibbles, "1.k", {"nf4": True}),
    "a scale applied twice": (scaled_twice, "1.o", {}),
    "a transposed adapter": (transposed, "1.q", {}),
    "scores divided twice, between the modules": (sharper, "entering 1.o", {}),
}


# a process that imports torch takes seconds
ALONE = {
    "module": ("the nibbles of NF4 codes swapped",),
    "program": ("scores divided twice, between the modules",),
}


def broken(fault: str) -> tuple[nn.Module, nn.Module, str]:
    act, place, fields = FAULTS[fault]
    model = blocks(**fields)
    other = copy.deepcopy(model)
    act(other)
    return model, other, place


def blames(verdict: Verdict, place: str) -> None:
    assert not verdict.ok
    assert verdict.first_divergence == place, str(verdict)
    found = verdict.divergence
    assert found is not None
    assert found.local_ratio is not None
    assert found.local_ratio > 100, "the error is its own"
    assert found.inherited_ratio < 16
    others = [row for row in verdict.places if row.name != place]
    assert all(row.local_ratio is None or row.local_ratio < 16 for row in others), "all others only inherit it"
    assert any(row.bound_ratio > 16 for row in others), "which some do"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["module", "program"])
def test_a_fault_in_a_module_or_graph_is_named(fault: str, form: str, tmp_path: Path) -> None:
    model, other, place = broken(fault)
    candidate: Any = torch.export.export(other, INPUTS) if form == "program" else other
    alone = fault in ALONE[form]
    verdict = verify(model, candidate, INPUTS, repro=tmp_path / "repro" if alone else None)
    blames(verdict, place)
    if alone:
        shows_it_alone(tmp_path / "repro")


@pytest.mark.parametrize(
    "fault",
    [
        "the nibbles of NF4 codes swapped",
        "scores divided twice, between the modules",
        pytest.param("a scale applied twice", marks=pytest.mark.slow),
        pytest.param("a transposed adapter", marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_an_onnx_file_is_named_with_its_node(fault: str, tmp_path: Path) -> None:
    model, other, place = broken(fault)
    path = lrcompile.export(other, tmp_path / "model.onnx", INPUTS, adapters="inline").path
    verdict = verify(model, path, INPUTS, repro=tmp_path / "repro")
    blames(verdict, place)
    assert verdict.divergence is not None
    assert verdict.divergence.node is not None
    if "nibbles" in fault:
        assert "MatMulBnb4" in shown_operators(tmp_path / "repro")
    shows_it_alone(tmp_path / "repro")


def test_an_adapter_of_dora_shipped_as_lora_is_named() -> None:
    model = blocks("dora")
    shipped = blocks("lora")
    shipped.load_state_dict(model.state_dict(), strict=False)  # all but the gains has a place
    verdict = verify(model, shipped, INPUTS)
    assert not verdict.ok
    assert verdict.first_divergence == "0.q"
    guilty = [place.name for place in verdict.places if place.local_ratio is not None and place.local_ratio > 16]
    assert guilty == ["0.q", "0.o", "1.q", "1.o"], "each site that lost its gain, and nothing else"


def test_int8_accumulation_in_one_product_is_named(tmp_path: Path) -> None:
    model = blocks()
    path = lrcompile.export(model, tmp_path / "model.onnx", INPUTS, adapters="merge").path
    int8_product(path, "1.v")
    verdict = verify(model, path, INPUTS, limits=Limits(), repro=tmp_path / "repro")
    blames(verdict, "1.v")
    assert "MatMulInteger" in shown_operators(tmp_path / "repro")
    shows_it_alone(tmp_path / "repro")


def test_an_update_that_a_cast_erased_is_named_though_every_place_stays_in_its_bound() -> None:
    model = blocks()
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.mul_(1e-9 if name.startswith("1.o") else 1e-6)
    lost = copy.deepcopy(model)
    for site in ("0.q", "1.q"):
        factor(lost, site, "B").data.zero_()
    verdict = verify(model, lost, INPUTS)
    assert not verdict.ok
    assert verdict.bound_ratio < 16
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.endswith(".q")
    assert verdict.divergence is not None
    assert verdict.divergence.effect_error == pytest.approx(1.0, abs=0.1)
    assert "of its adapter's effect" in str(verdict)


@pytest.mark.slow
def test_the_guilty_weight_of_a_package_is_named_and_correct_ones_are_measured_place_by_place(tmp_path: Path) -> None:
    model, other, _ = broken("a transposed adapter")
    wrong = lrcompile.export(other, tmp_path / "wrong.pt2", INPUTS).path
    verdict = verify(model, wrong, INPUTS, repro=tmp_path / "repro")
    assert not verdict.ok
    assert verdict.first_divergence == "1.q"
    assert verdict.divergence is not None
    assert verdict.divergence.node == "the weight 1.q.weight"
    shows_it_alone(tmp_path / "repro")
    right = lrcompile.export(model, tmp_path / "right.pt2", INPUTS).path
    verdict = verify(model, right, INPUTS, locate=True)
    assert verdict.ok
    assert {"0.q", "1.o", "2"} <= {place.name for place in verdict.places}
    assert "compiled again" in str(verdict.note)


def test_a_repro_never_replaces_a_folder_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(lrcompile.VerificationError, match="not empty"):
        verify(blocks(), blocks(), INPUTS, repro=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_comparison_that_holds_leaves_no_repro(tmp_path: Path) -> None:
    model = blocks()
    assert verify(model, copy.deepcopy(model), INPUTS, repro=tmp_path / "repro").ok
    assert not (tmp_path / "repro").exists()


def shows_it_alone(folder: Path) -> None:
    """In a process that cannot import the project, the saved part leaves the bound too."""
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "lrcompile.py").write_text("raise ImportError('the project is not here')\n")
    environment = {**os.environ, "PYTHONPATH": str(hidden)}
    done = subprocess.run(
        [sys.executable, folder / "run.py"], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "r = " in done.stdout
    assert (folder / "README.md").read_text().startswith("# A part of")


def shown_operators(folder: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


def int8_product(path: Path, site: str) -> None:
    """What an optimizer does that lowers a product to int8: x and W as 8 bits, an integer product, scaled back."""
    import onnx

    proto = onnx.load(path)
    at, node = next(
        (index, node)
        for index, node in enumerate(proto.graph.node)
        if node.op_type in ("MatMul", "Gemm")
        and any(entry.key.endswith("name_scopes") and f"'{site}'" in entry.value for entry in node.metadata_props)
    )
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[1])
    value = onnx.numpy_helper.to_array(weight)
    value = value.T if any(entry.name == "transB" and entry.i for entry in node.attribute) else value
    step = np.abs(value).max() / 127
    codes = np.rint(value / step).astype(np.int8)
    proto.graph.initializer.extend(
        [onnx.numpy_helper.from_array(codes, "codes"), onnx.numpy_helper.from_array(np.array(step, np.float32), "step")]
    )
    make = onnx.helper.make_node
    new = [
        make("DynamicQuantizeLinear", [node.input[0]], ["x8", "x8_scale", "x8_zero"]),
        make("MatMulInteger", ["x8", "codes", "x8_zero"], ["y32"]),
        make("Cast", ["y32"], ["y_float"], to=onnx.TensorProto.FLOAT),
        make("Mul", ["x8_scale", "step"], ["y_step"]),
        make("Mul", ["y_float", "y_step"], ["y_scaled"]),
        make("Add", ["y_scaled", node.input[2]], [node.output[0]]),
    ]
    for each in new:
        each.metadata_props.extend(node.metadata_props)
    kept = [*proto.graph.node[:at], *new, *proto.graph.node[at + 1 :]]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.save(proto, path)
    path.with_suffix(".manifest.json").unlink()
