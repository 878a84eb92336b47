"""Every kind of model, its adapter folded or beside its weights, in ONNX Runtime and as an AOTInductor package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo.families import FAMILIES

import lrcompile
from lrcompile.verifying.outputs import named_outputs, named_tensors

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

KINDS = ("llama", "gpt2", "bert", "t5", "vit", "mixtral")
FORMS = ("merge", "inline")
BY_NAME = {family.name: family for family in FAMILIES}
SLOW = pytest.mark.slow


def _adapted(name: str) -> tuple[Any, Any]:
    """A family's tiny model with an update of the size of its weights at every linear map, and inputs."""
    model, inputs = BY_NAME[name].build()
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, alpha=5, seed=0))
    _wake(model)
    return model.eval(), inputs


def _wake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lrcompile_adapters" in name and not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def _holds(exported: lrcompile.Export, form: str) -> None:
    verdict = exported.verify()
    assert verdict.ok, verdict
    assert verdict.adapter_relative_error is not None
    assert verdict.adapter_relative_error < 1e-5
    sites = exported.manifest["adapters"]
    assert (sites["folded"] if form == "merge" else sites["inline"]) != []
    assert (sites["inline"] if form == "merge" else sites["folded"]) in ([], {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["vit", *(pytest.param(name, marks=SLOW) for name in KINDS if name != "vit")])
def test_onnx_runtime_computes_each_kind(tmp_path, name, form):
    model, inputs = _adapted(name)
    _holds(lrcompile.export(model, tmp_path / "m.onnx", inputs, adapters=form), form)


_LOADING = """
import sys
for name in ("lrcompile", "transformers", "onnx", "onnxruntime"):
    sys.modules[name] = None  # importing it is an error from here on
import torch
from safetensors.torch import load_file, save_file
with torch.no_grad():
    outputs = torch._inductor.aoti_load_package(sys.argv[1])(**load_file(sys.argv[2]))
outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
save_file({name: value.contiguous() for name, value in outputs.items()}, sys.argv[3])
"""


def _in_a_fresh_process(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a process gets from the package that has torch and safetensors alone."""
    given, returned = path.with_name("given.safetensors"), path.with_name("returned.safetensors")
    save_file(inputs, given)
    done = subprocess.run(
        [sys.executable, "-c", _LOADING, *map(str, (path, given, returned))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(returned)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return {"y": self.down(torch.tanh(self.up(x)))}


@pytest.mark.parametrize("form", ["inline", pytest.param("merge", marks=SLOW)])
def test_a_package_is_loaded_where_there_is_only_torch(tmp_path, form):
    model, x = Small(), torch.randn(3, 6)
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, seed=0))
    _wake(model)
    exported = lrcompile.export(model, tmp_path / "m.pt2", {"x": x}, adapters=form)
    _holds(exported, form)
    returned = _in_a_fresh_process(exported.path, {"x": torch.cat([x, x])})
    expected = model.eval()(torch.cat([x, x]))["y"].detach()
    assert float((returned["y"] - expected).abs().max()) <= 16 * 2**-24 * 9 * float(expected.abs().max())


@SLOW
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_a_package_of_each_kind_holds_and_needs_only_torch(tmp_path, name, form):
    model, inputs = _adapted(name)
    exported = lrcompile.export(model, tmp_path / "m.pt2", inputs, adapters=form)
    _holds(exported, form)
    returned = _in_a_fresh_process(exported.path, named_tensors(inputs))
    with torch.no_grad():
        expected = named_outputs(model(**inputs))
    for port in exported.manifest["outputs"]:
        got, want = returned[port["name"]], expected[port["name"]]
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max()), port
