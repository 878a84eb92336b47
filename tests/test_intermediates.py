"""The first divergence is the place that was broken: in modules, in graphs and in ONNX files, found in one run of each
side.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lrcompile.verification import verify
from lrcompile.verifying.intermediates import reference_places
from lrcompile.verifying.provenance import Step, graph_scopes, scope_values


class Block(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(torch.tanh(self.up(self.norm(x)))), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(10) for _ in range(3))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def broken(model: nn.Module, name: str) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[0] += 0.1
    return other


PLACES = ["blocks.0.norm", "blocks.1.up", "blocks.2.down", "head"]
INPUTS = (torch.linspace(-1, 1, 50).reshape(5, 10).sin(),)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["module", "program", "graph"])
def test_the_broken_module_is_named(place: str, form: str) -> None:
    model = Model()
    other = broken(model, f"{place}.weight")
    candidate: Any = other
    if form == "program":
        candidate = torch.export.export(other, INPUTS)
    elif form == "graph":
        candidate = fx.symbolic_trace(other)
    verdict = verify(model, candidate, INPUTS)
    assert verdict.first_divergence == place
    assert verdict.divergence is not None
    assert verdict.divergence.bound_ratio > 1000
    assert verdict.divergence.inherited_ratio < 16, "what came before was right, so the error is its own"


def test_in_a_flat_reference_the_node_is_named() -> None:
    model = Model()
    reference = torch.export.export(model, INPUTS).module()
    candidate = torch.export.export(broken(model, "blocks.1.up.weight"), INPUTS).module()
    verdict = verify(reference, candidate, INPUTS)
    assert verdict.first_divergence is not None
    node = next(node for node in candidate.graph.nodes if f"%{node.name}" == verdict.first_divergence)
    assert "blocks.1.up" in str(node.meta["nn_module_stack"])


def test_a_correct_candidate_diverges_nowhere_when_asked() -> None:
    model = Model()
    verdict = verify(model, torch.export.export(model, INPUTS), INPUTS, locate=True)
    assert verdict.first_divergence is None
    assert "all 13 places compared stay within their bounds" in str(verdict.note)


def test_every_place_has_the_exact_value_and_a_bound() -> None:
    model = Model()
    places = reference_places(model, INPUTS, 2**-24)
    exact = nn.functional.layer_norm(INPUTS[0].double(), (10,))
    assert (places["blocks.0.norm"].exact - exact).abs().max() < 1e-14
    assert list(places)[:3] == ["entering blocks.0", "entering blocks.0.norm", "blocks.0.norm"]
    assert list(places)[-1] == "head"
    assert all(place.bound > 0 for place in places.values())


def test_a_module_called_twice_or_with_two_outputs_is_no_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.pair = nn.Linear(3, 3), Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(self.one(self.one(x)))
            return a + b

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), x.cos()

    assert reference_places(Twice(), (torch.ones(2, 3),), 2**-24).keys() == {"entering pair"}


def test_looking_leaves_modules_graphs_and_hooks_as_they_were() -> None:
    model = Model().train()
    graph = torch.export.export(model, INPUTS).module()
    code = graph.code
    verify(model, broken(model, "head.weight"), INPUTS)
    verify(model, graph, INPUTS, locate=True)
    assert graph.code == code
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_value_written_over_later_is_compared_as_it_was() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = y * 2
            y.zero_()
            return z

    model = Overwrites()
    places = reference_places(model, (torch.ones(2, 3),), 2**-24)
    assert places["linear"].exact.abs().max() > 0


def test_the_value_of_a_scope_is_the_last_one_used_outside() -> None:
    steps = [
        Step(["a"], ["x"], frozenset({"m"})),
        Step(["b"], ["a"], frozenset({"m", "m.inner"})),
        Step(["c"], ["b"], frozenset({"m"})),
        Step(["d"], ["c", "a"], frozenset()),
    ]
    assert scope_values(steps, ["d"]) == {"m": ["c", "a"], "m.inner": ["b"]}


def test_unused_nodes_and_placeholders_have_no_scope() -> None:
    graph = fx.symbolic_trace(Model()).graph
    scopes = graph_scopes(graph)
    assert scopes.leaving["head"] == ["head"]
    assert scopes.entering["head"] == ["add_2"]
    assert not any("placeholder" in key for key in scopes.leaving)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = Model()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(model, INPUTS, dynamo=True, verbose=False).save(str(path))  # type: ignore[union-attr]
    return model, path


def test_a_correct_onnx_file_holds_under_pinned_settings(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    verdict = verify(model, path, INPUTS, locate=True)
    assert verdict.ok
    assert verdict.bound_ratio < 4
    session = verdict.session["model.onnx"]
    assert session["config"] == {"session.qdq_matmulnbits_accuracy_level": "0"}
    assert session["provider"] == "CPUExecutionProvider"
    assert session["threads"] == torch.get_num_threads()
    assert verdict.first_divergence is None


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_initializer_is_traced_to_its_module(
    exported: tuple[nn.Module, Path], tmp_path: Path, place: str
) -> None:
    import onnx

    model, path = exported
    proto = onnx.load(path)
    node = next(
        node
        for node in proto.graph.node
        if any(entry.key.endswith("name_scopes") and f"'{place}'" in entry.value for entry in node.metadata_props)
        and any(name in {tensor.name for tensor in proto.graph.initializer} for name in node.input)
    )
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name in node.input)
    value = onnx.numpy_helper.to_array(tensor).copy()
    value.reshape(-1)[0] += 0.1
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    wrong = tmp_path / "wrong.onnx"
    onnx.save(proto, wrong)
    verdict = verify(model, wrong, INPUTS)
    assert not verdict.ok
    assert verdict.first_divergence == place


def test_an_onnx_file_without_provenance_says_so(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    import onnx

    model, path = exported
    proto = onnx.load(path)
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    verdict = verify(broken(model, "head.weight"), tmp_path / "bare.onnx", INPUTS)
    assert not verdict.ok
    assert "could be traced" in str(verdict.note)


@pytest.mark.slow
def test_a_tiny_bert_in_onnx_runtime_holds_and_a_changed_layer_is_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    onnx = pytest.importorskip("onnx")
    config = transformers.BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=31
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 31, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    path = tmp_path / "bert.onnx"
    torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False).save(str(path))  # type: ignore[union-attr]
    assert verify(model, path, inputs).bound_ratio < 8
    proto = onnx.load(path)
    node = next(
        node
        for node in proto.graph.node
        if node.op_type == "MatMul"
        and any("'encoder.layer.1.output.dense'" in entry.value for entry in node.metadata_props)
    )
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[1])
    value = onnx.numpy_helper.to_array(tensor).copy()
    value[3, 5] += 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(proto, path)
    verdict = verify(model, path, inputs)
    assert not verdict.ok
    assert verdict.first_divergence == "encoder.layer.1.output.dense"


def test_the_limits_and_hashes_of_a_manifest_count(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    import json
    import shutil

    from lrcompile.verifying.manifest import sha256

    model, path = exported
    own = tmp_path / "model.onnx"
    shutil.copy(path, own)
    content: dict[str, Any] = {
        "schema": 1,
        "limits": {"bound_ratio": 1e-9},
        "session": {"graph_optimization_level": "disabled", "threads": 2},
        "sha256": {"model.onnx": sha256(own)},
    }
    manifest = tmp_path / "model.manifest.json"
    manifest.write_text(json.dumps(content))
    verdict = verify(model, own, INPUTS)
    assert not verdict.ok
    assert verdict.limits.bound_ratio == 1e-9
    assert verdict.session["model.onnx"]["graph_optimization_level"] == "disabled"
    assert verdict.session["model.onnx"]["threads"] == 2
    manifest.write_text(json.dumps({**content, "limits": {}, "sha256": {"model.onnx": "0" * 64}}))
    verdict = verify(model, own, INPUTS)
    assert verdict.bound_ratio < 4
    assert not verdict.ok
    assert "sha256 differs" in verdict.failures[0]
