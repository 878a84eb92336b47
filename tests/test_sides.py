"""lrcompile verify holds any two of model, adapter, .onnx, .pt2 and golden against each other, or says why not."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lrcompile
import lrcompile.golden as golden
from lrcompile.demo.opening import open_model
from lrcompile.demo.tiny import write_tiny_bert
from lrcompile.verification import verify

pytest.importorskip("transformers")

IDS = torch.tensor([[2, 7, 8, 3, 5], [2, 9, 3, 0, 0]])
GIVEN = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, adapter, the adapted model in ONNX, a golden of it, and inputs."""
    folder = tmp_path_factory.mktemp("sides")
    write_tiny_bert(folder / "base", layers=1)
    model = open_model(str(folder / "base")).model
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["query", "value"], seed=0))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    lrcompile.save(model, folder / "adapter")
    lrcompile.export(model, folder / "model.onnx", GIVEN, adapters="inline")
    golden.record(folder / "golden", model, GIVEN, reason="the adapted model, for comparisons")
    save_file(GIVEN, folder / "in.safetensors")
    np.savez(folder / "in.npz", **{name: value.numpy() for name, value in GIVEN.items()})  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ONNX files of one function, folded and not, and one of another; a golden whose model nobody can rebuild."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["0"], seed=0))
    model.get_parameter("0.lrcompile_adapters.weight.default.B").data.normal_(std=0.3)
    x = (torch.randn(6, 12),)
    lrcompile.export(model, folder / "merged.onnx", x, adapters="merge")
    lrcompile.export(model, folder / "inline.onnx", x, adapters="inline")
    golden.record(folder / "golden", model, x, reason="for comparisons")
    base = lrcompile.remove(copy.deepcopy(model))
    lrcompile.export(base, folder / "base.onnx", x)
    np.savez(folder / "in.npz", x[0].numpy())
    return folder


def refused(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ("adapter", "model.onnx", ("--inputs", "in.npz", "--base", "base")),
        ("model.onnx", "adapter", ("--inputs", "in.safetensors", "--base", "base")),
        ("base", "model.onnx", ("--inputs", "golden", "--adapter", "adapter")),
        ("golden", "model.onnx", ()),
        ("model.onnx", "golden", ()),
        ("golden", "golden", ()),
        ("adapter", "golden", ("--base", "base")),
        ("golden", "adapter", ("--base", "base")),
    ],
)
def test_any_two_forms_of_one_model_hold_against_each_other(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch, a: str, b: str, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(made)
    code, out, err = run("verify", a, b, *options, "--json")
    assert code == 0, out + err
    verdict = json.loads(out)
    assert verdict["rungs"][0]["name"] == "float64"
    assert verdict["adapter_relative_error"] < 1e-4
    if a.endswith(".onnx"):
        assert "is the reference" in verdict["note"]


def test_a_base_without_its_adapter_does_not_hold_and_report_and_repro_say_where(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(made)
    options = ("--json", tmp_path / "v.json", "--html", tmp_path / "v.html", "--repro", tmp_path / "repro")
    code, out, err = run("verify", "base", "model.onnx", "--inputs", "in.npz", *options)
    assert code == 1, out + err
    assert "first divergence: encoder.layer.0.attention.self.query" in out
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["ok"] is False
    assert found["divergence"]["name"] == "encoder.layer.0.attention.self.query"
    assert found["versions"]["onnxruntime"]
    assert found["session"]["model.onnx"]["config"]["session.qdq_matmulnbits_accuracy_level"] == "0"
    assert "Error along depth" in (tmp_path / "v.html").read_text()
    assert (tmp_path / "repro" / "run.py").is_file()


def test_texts_become_the_inputs_that_the_file_takes(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    code, out, err = run("verify", "adapter", "model.onnx", "--base", "base", "--text", "abc", "--text", "de f")
    assert code == 0, out + err  # the tokenizer also gives token_type_ids, which was no input of the export


def test_the_base_of_an_adapter_is_the_folder_it_names_and_never_a_download(
    run: Run, made: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (made / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named, ok in ((str(made / "base"), True), ("somebody/else", False), (None, False)):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        result = run("verify", adapter, made / "model.onnx", "--inputs", made / "in.npz")
        if ok:
            assert result[0] == 0, result[2]
        else:
            assert "name it with --base" in refused(result)


def test_two_graphs_are_held_to_the_rounding_of_the_first_and_a_lost_adapter_is_named(
    run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain)
    code, out, err = run("verify", "merged.onnx", "inline.onnx", "--inputs", "in.npz", "--base", "base.onnx", "--json")
    assert code == 0, out + err
    verdict = json.loads(out)
    assert verdict["dtype"] == "float32, measured on merged.onnx"
    assert 0 < verdict["bound_ratio"] < 8
    assert verdict["adapter_relative_error"] < 1e-4
    code, out, _ = run("verify", "merged.onnx", "base.onnx", "--inputs", "in.npz")
    assert code == 1
    assert "first divergence: 0, made by Gemm" in out


def test_of_two_graphs_each_places_own_error_is_told_from_what_it_inherits(plain: Path, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(plain / "merged.onnx")
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name.startswith("0.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    x = (torch.randn(6, 12),)
    verdict = verify(plain / "merged.onnx", tmp_path / "wrong.onnx", x, repro=tmp_path / "repro")
    assert not verdict.ok
    found = {place.name: place for place in verdict.places if not place.name.startswith("entering")}
    assert list(found) == ["0", "1", "2"]
    assert all(place.bound_ratio > 1000 for place in found.values())
    assert found["0"].local_ratio == pytest.approx(found["0"].bound_ratio, rel=0.1)
    assert all(own is not None and own < 8 for own in (found["1"].local_ratio, found["2"].local_ratio))
    assert "of it its own" in str(verdict)
    alone = subprocess.run([sys.executable, tmp_path / "repro" / "run.py"], capture_output=True, text=True)
    assert alone.returncode == 1, alone.stdout + alone.stderr


def test_a_float_model_held_against_quantized_weights_says_what_to_hold_instead(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(made)
    options = ("--inputs", "in.npz")
    file, merged, stored = tmp_path / "q.onnx", tmp_path / "merged", tmp_path / "stored"
    export = ("export", "base", file, "--adapter", "adapter", "--adapters", "merge", "--quantize", "nf4", *options)
    assert run(*export)[0] == 0
    code, out, err = run("verify", "base", file, "--adapter", "adapter", *options)
    assert code == 1, out + err
    assert "weights quantized (encoder.layer.0" in out
    assert "lrcompile merge MODEL ADAPTER --out DIR" in out
    assert "lrcompile quantize MODEL --out DIR" in out
    assert run("merge", "base", "adapter", "--out", merged)[0] == 0
    assert run("quantize", merged, "--out", stored)[0] == 0
    code, out, err = run("verify", stored, file, *options)  # as it said
    assert code == 0, out + err
    code, out, _ = run("verify", "base", "model.onnx", *options)  # wrong for another reason
    assert (code, "weights quantized" in out) == (1, False)


def test_between_graphs_of_other_exporters_places_are_values_by_name(plain: Path, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(plain / "merged.onnx")
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.save(proto, tmp_path / "a.onnx")
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name.startswith("2.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, tmp_path / "b.onnx")
    verdict = verify(tmp_path / "a.onnx", tmp_path / "b.onnx", (torch.randn(6, 12),))
    assert not verdict.ok
    assert verdict.first_divergence == f"%{proto.graph.output[0].name}"
    assert len(verdict.places) == len(proto.graph.node)


def test_d_of_a_graph_is_that_of_the_module_it_came_from(plain: Path) -> None:
    """Measured in float32 and in ONNX Runtime instead of float64: of the same size, not the same bits."""
    from lrcompile.interop.onnxruntime import OnnxRunner
    from lrcompile.verifying.input_files import read_inputs
    from lrcompile.verifying.references import FileReference, ModuleReference

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    lrcompile.export(model, plain / "same.onnx", (torch.randn(6, 12),))
    sets = read_inputs(plain / "in.npz")
    module = ModuleReference(model, sets)
    own = module.own(sets, None)
    graph = OnnxRunner(plain / "same.onnx")
    file = FileReference(graph, graph)
    ours, theirs = (judge.expected(sets, own)[0].bounds["output"].bound for judge in (module, file))
    assert 0.3 < theirs / ours < 3


def test_recorded_outputs_of_a_model_nobody_can_rebuild_are_held_against_a_graph_but_not_against_themselves(
    run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain)
    for pair in (("golden", "inline.onnx"), ("inline.onnx", "golden")):
        code, out, err = run("verify", *pair, "--json")
        assert code == 0, out + err
        assert json.loads(out)["dtype"] == "float32, measured on inline.onnx"
    assert run("verify", "golden", "base.onnx")[0] == 1
    assert "nothing says how far rounding" in refused(run("verify", "golden", "golden"))


@pytest.mark.slow
def test_a_package_is_held_against_a_graph_and_refused_against_a_package(
    run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain)
    torch.manual_seed(5)  # another model than the fixture's
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    x = (torch.randn(6, 12),)
    lrcompile.export(model, plain / "model.pt2", x)
    lrcompile.export(model, plain / "of_it.onnx", x)
    for pair in (("model.pt2", "of_it.onnx"), ("of_it.onnx", "model.pt2")):
        code, out, err = run("verify", *pair, "--inputs", "in.npz")
        assert code == 0, out + err
    assert run("verify", "model.pt2", "base.onnx", "--inputs", "in.npz")[0] == 1
    assert "neither is a module or an ONNX graph" in refused(
        run("verify", "model.pt2", "model.pt2", "--inputs", "in.npz")
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.onnx", "inline.onnx", "--inputs", "in.npz"), "there is no file nowhere.onnx"),
        (("inline.onnx", "merged.onnx"), "have no tokenizer: give --inputs"),
        (("inline.onnx", "merged.onnx", "--inputs", "nowhere.npz"), "there is no file nowhere.npz"),
        (("inline.onnx", "merged.onnx", "--inputs", "base.onnx"), "inputs come from"),
        (("golden", "merged.onnx", "--inputs", "in.npz"), "holds its own inputs"),
        (("inline.onnx", "merged.onnx", "--inputs", "in.npz", "--adapter", "x"), "an adapter is loaded into a model"),
        (("golden", "golden", "--build", "json:loads"), "build="),
        (("inline.onnx", "merged.onnx", "--inputs", "in.npz", "--repro", "."), "not empty"),
        (("inline.onnx", "merged.onnx", "--inputs", "in.npz", "--html", "no/such/folder.html"), "cannot write"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(
    run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(plain)
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    assert said in refused(run("verify", *arguments))
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before


def test_a_changed_golden_is_no_side(run: Run, plain: Path, tmp_path: Path) -> None:
    case = tmp_path / "golden"
    case.mkdir()
    for file in (plain / "golden").iterdir():
        (case / file.name).write_bytes(file.read_bytes())
    data = bytearray((case / "data.safetensors").read_bytes())
    data[-1] ^= 1
    (case / "data.safetensors").write_bytes(data)
    assert "sha256 differs" in refused(run("verify", case, plain / "merged.onnx"))


def test_a_file_as_reference_has_a_bound_only_beside_a_graph(plain: Path) -> None:
    with pytest.raises(lrcompile.VerificationError, match="the reference must be"):
        verify(3, plain / "merged.onnx", (torch.randn(6, 12),))
