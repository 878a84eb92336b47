"""Goldens: a case rebuilds from its own files alone, drift on either side fails, and nothing in a case is trusted."""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrcompile
import lrcompile.golden as golden
from lrcompile.errors import LrcompileError, VerificationError
from lrcompile.verifying.golden_files import DATA, MANIFEST, WEIGHTS, pack, read_tensors, seal, unpack
from lrcompile.verifying.manifest import sha256
from lrcompile.verifying.verdict import Limits

transformers = pytest.importorskip("transformers")


def mlp() -> nn.Sequential:
    """Also what `build=` names."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=31
    )
    return transformers.BertModel(config)


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 31, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, seed=0, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    return model


def edit(case: Path, **changes: Any) -> None:
    """As somebody would who knows how a manifest is sealed."""
    manifest = case / MANIFEST
    content = json.loads(manifest.read_text()) | changes
    manifest.write_text(json.dumps(content | {"seal": seal(content)}))


def rehash(case: Path) -> None:
    edit(case, sha256={name: sha256(case / name) for name in (WEIGHTS, DATA)})


@pytest.fixture
def case(tmp_path: Path) -> Path:
    golden.record(tmp_path / "case", mlp(), (torch.randn(4, 5),), reason="smallest")
    return tmp_path / "case"


def test_a_case_holds_for_the_model_it_was_recorded_from_and_not_for_another(tmp_path: Path) -> None:
    model = mlp()
    golden.record(tmp_path, model, (torch.randn(4, 5),), reason="smallest")
    (verdict,) = golden.check(tmp_path, model)
    assert verdict.ok
    assert verdict.bound_ratio < 4
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] += 1e-3
    (verdict,) = golden.check(tmp_path, model)
    assert not verdict.ok
    assert "base/2.weight" in str(verdict)


def test_build_gives_an_architecture_that_gets_the_stored_weights(case: Path) -> None:
    (verdict,) = golden.check(case, build=f"{__name__}:mlp" if __name__ in __import__("sys").modules else "nowhere:mlp")
    assert verdict.ok


@pytest.mark.parametrize("build", ["nowhere.at.all:mlp", "no-colon", "math:pi", "os:getcwd", "json:missing"])
def test_a_build_that_gives_no_model_is_refused(case: Path, build: str) -> None:
    with pytest.raises(VerificationError, match="build="):
        golden.check(case, build=build)


def test_a_plain_module_needs_model_or_build(case: Path) -> None:
    with pytest.raises(VerificationError, match="give model="):
        golden.check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_case_rebuilds_from_its_own_files(tmp_path: Path, dtype: torch.dtype) -> None:
    golden.record(tmp_path / "bert", bert().to(dtype), tokens(), reason="an encoder")
    torch.manual_seed(1)
    (verdict,) = golden.check(tmp_path / "bert")
    assert verdict.ok, str(verdict)
    assert verdict.rungs[-1].added_ratio == 0, "the same machine gives the same bits"


def test_rebuilding_leaves_the_random_state_alone(tmp_path: Path) -> None:
    golden.record(tmp_path / "bert", bert(), tokens(), reason="an encoder")
    before = torch.random.get_rng_state()
    golden.check(tmp_path / "bert")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_adapters_are_rebuilt_with_their_specs_weights_and_activity(tmp_path: Path) -> None:
    model = adapted(bert(), targets=["query", "value"], rank_pattern={"value": 2}, train_modules=["pooler.dense"])
    with torch.no_grad():
        model.get_parameter("pooler.dense.weight").add_(0.1)
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["key"], seed=1), name="second")
    lrcompile.activate(model, {"default": 0.5})
    golden.record(tmp_path / "case", model, tokens(), reason="adapters")
    (verdict,) = golden.check(tmp_path / "case")
    assert verdict.ok, str(verdict)
    assert verdict.adapter_relative_error is not None
    assert verdict.adapter_relative_error < 1e-4


def test_an_nf4_base_with_an_adapter_is_rebuilt_to_the_bit(tmp_path: Path) -> None:
    model = adapted(lrcompile.quantize(bert(), "nf4", block_size=32))
    golden.record(tmp_path / "case", model, tokens(), reason="qlora")
    (verdict,) = golden.check(tmp_path / "case")
    assert verdict.ok, str(verdict)
    assert verdict.rungs[-1].added_ratio == 0


def test_a_pipeline_is_stored_and_run_again_at_each_check(tmp_path: Path) -> None:
    golden.record(tmp_path / "case", adapted(bert()), tokens(), pipeline="merge-lora,expand-lora", reason="merging")
    plain, through = golden.check(tmp_path / "case")
    assert plain.ok
    assert through.ok, str(through)
    assert through.name.endswith("through merge-lora,expand-lora")
    with pytest.raises(LrcompileError, match="unknown pass"):
        golden.record(tmp_path / "other", mlp(), (torch.randn(2, 5),), pipeline="no-such-pass", reason="wrong")
    assert not (tmp_path / "other").exists()


def test_several_input_sets_nested_inputs_and_constants_come_back(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def forward(self, pair: Any, *, scale: float, flag: bool = False) -> torch.Tensor:
            return pair["a"] * pair["b"][0] * scale + flag

    sets: list[Any] = [
        {"pair": {"a": torch.randn(3), "b": [torch.randn(3)]}, "scale": 0.3},
        {"pair": {"a": torch.randn(2), "b": [torch.randn(2)]}, "scale": 3.0, "flag": True},
    ]
    golden.record(tmp_path / "case", Takes(), sets, reason="inputs")
    (verdict,) = golden.check(tmp_path / "case", Takes())
    assert verdict.ok


def test_a_folder_of_cases_gives_one_verdict_each(tmp_path: Path) -> None:
    for name in ("b", "a"):
        golden.record(tmp_path / name, bert(), tokens(), reason=name)
    assert [Path(verdict.name).name for verdict in golden.check(tmp_path)] == ["a", "b"]


def test_a_drift_of_the_code_fails_even_though_both_sides_are_computed_anew(tmp_path: Path) -> None:
    model = mlp()
    golden.record(tmp_path, model, (torch.randn(4, 5),), reason="smallest")
    other = nn.Sequential(model[0], nn.Sigmoid(), model[2])
    (verdict,) = golden.check(tmp_path, other)
    assert not verdict.ok
    assert verdict.failures[0].startswith("recorded")


@pytest.mark.parametrize("name", [WEIGHTS, DATA])
def test_changed_tensors_are_a_failed_verdict_that_names_the_file(case: Path, name: str) -> None:
    tensors = load_file(case / name)
    save_file({key: value + 1 for key, value in tensors.items()}, case / name)
    (verdict,) = golden.check(case, mlp())
    assert not verdict.ok
    assert name in verdict.failures[0]
    with pytest.raises(VerificationError, match="restore it"):
        golden.update(case, reason="accept", model=mlp())


def test_update_prints_the_drift_keeps_its_reason_and_the_case_holds_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mlp()
    golden.record(tmp_path / "case", model, (torch.randn(4, 5),), reason="smallest")
    with torch.no_grad():
        model.get_parameter("0.bias").add_(0.5)
    golden.update(tmp_path / "case", reason="the bias moved on purpose", model=model)
    assert "DOES NOT HOLD" in capsys.readouterr().out
    assert golden.check(tmp_path / "case", model)[0].ok
    (entry,) = json.loads((tmp_path / "case" / MANIFEST).read_text())["updates"]
    assert entry["reason"] == "the bias moved on purpose"
    assert entry["held"] is False


def test_update_needs_a_reason_and_never_loosens_a_limit(case: Path) -> None:
    before = (case / MANIFEST).read_bytes()
    for reason in ("", "  "):
        with pytest.raises(VerificationError, match="needs a reason"):
            golden.update(case, reason=reason, model=mlp())
    for limits in (Limits(bound_ratio=17), Limits(declared_error=0.1), Limits(adapter_relative_error=0.06)):
        with pytest.raises(VerificationError, match="never loosens"):
            golden.update(case, reason="faster", model=mlp(), limits=limits)
    assert (case / MANIFEST).read_bytes() == before
    golden.update(case, reason="stricter", model=mlp(), limits=Limits(bound_ratio=8, kl=0.1))
    assert json.loads((case / MANIFEST).read_text())["limits"]["bound_ratio"] == 8


def test_record_needs_a_reason_and_never_replaces_a_case(case: Path) -> None:
    with pytest.raises(VerificationError, match=r"golden\.update"):
        golden.record(case, mlp(), (torch.randn(4, 5),), reason="again")
    with pytest.raises(VerificationError, match="needs a reason"):
        golden.record(case.parent / "new", mlp(), (torch.randn(4, 5),), reason="")


def test_a_failing_write_leaves_the_old_case_whole(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {entry.name: entry.read_bytes() for entry in case.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lrcompile.verifying.golden_files.save_file", full)
    with pytest.raises(VerificationError, match="No space left"):
        golden.update(case, reason="disk full", model=mlp())
    assert {entry.name: entry.read_bytes() for entry in case.iterdir()} == before
    assert [entry.name for entry in case.parent.iterdir()] == ["case"]


def test_a_merged_model_with_adapters_is_refused(tmp_path: Path) -> None:
    model = adapted(bert())
    lrcompile.merge(model)
    with pytest.raises(VerificationError, match="merged"):
        golden.record(tmp_path / "case", model, tokens(), reason="merged")


# What comes from outside is hostile.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "schema 1"),
        ({"schema": True}, "schema True"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"outputs": "x"}, "outputs is a str"),
        ({"outputs": [[1]]}, "lists of names"),
        ({"limits": {"bound_ratio": 1e999}}, "not valid JSON|finite"),
        ({"limits": {"speed": 1}}, "limits must be"),
        ({"sha256": {"../../etc/passwd": "0"}}, "sha256 must name"),
        ({"inputs": [{"tensor": "nowhere"}]}, "malformed"),
        ({"inputs": [{"pickle": "x"}]}, "malformed"),
        ({"inputs": [{"tensor": "inputs/0/0"}]}, "dict or a tuple"),
        ({"outputs": [["other"]]}, "missing from"),
    ],
)
def test_a_malformed_manifest_is_refused_with_the_reason(case: Path, changes: dict[str, Any], message: str) -> None:
    edit(case, **changes)
    with pytest.raises(VerificationError, match=message):
        golden.check(case, mlp())


def test_duplicate_keys_are_refused_in_the_manifest_and_in_tensor_headers(case: Path) -> None:
    text = (case / MANIFEST).read_text()
    (case / MANIFEST).write_text(text.replace('"schema": 2', '"schema": 2, "schema": 2'))
    with pytest.raises(VerificationError, match="'schema' stands twice"):
        golden.check(case, mlp())
    (case / MANIFEST).write_text(text)
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    (case / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    rehash(case)
    with pytest.raises(VerificationError, match="'a' stands twice"):
        golden.check(case, mlp())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 63) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'[:63],
        struct.pack("<Q", 66) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}' + b"\0" * 4,
    ],
)
def test_hostile_tensor_files_are_refused_before_anything_is_allocated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"x\.safetensors"):
        read_tensors(path)


def test_links_out_of_a_case_are_refused(case: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    os.rename(case / WEIGHTS, outside)
    os.symlink(outside, case / WEIGHTS)
    with pytest.raises(VerificationError, match="is a link"):
        golden.check(case, mlp())


@pytest.mark.parametrize(
    "change",
    [
        {"class": "Trainer"},
        {"class": "os.system"},
        {"model_type": "no-such-model"},
        {"attention": "kernels-community/evil"},
        {"config": {"auto_map": {"AutoModel": "evil--code.Model"}}},
        {"config": {"nested": {"quantization_config": {"quant_method": "evil"}}}},
        {"config": {"num_hidden_layers": 10**9}},
        {"config": {"hidden_size": "x"}},
        {"config": {"num_hidden_layers": 3}},
    ],
)
def test_a_configuration_that_leads_elsewhere_or_is_too_large_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "case"
    golden.record(folder, bert(), tokens(), reason="an encoder")
    stored = json.loads((folder / MANIFEST).read_text())["model"]
    merged = {**stored, **change, "config": {**stored["config"], **change.get("config", {})}}
    edit(folder, model=merged)
    with pytest.raises(VerificationError):
        golden.check(folder)


def test_a_configuration_far_larger_than_its_tensors_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    golden.record(tmp_path, bert(), tokens(), reason="an encoder")
    stored = json.loads((tmp_path / MANIFEST).read_text())["model"]
    edit(tmp_path, model={**stored, "config": {**stored["config"], "hidden_size": 3 * 10**4}})
    with pytest.raises(VerificationError, match="makes a model of"):
        golden.check(tmp_path)


def test_a_folder_without_cases_says_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(VerificationError, match="holds none"):
            golden.check(path)


def test_pack_and_unpack_are_inverse_and_refuse_what_is_no_plain_value() -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = {"x": torch.ones(2), "n": (1, [2.5, None, "t", True])}
    again = unpack(json.loads(json.dumps(pack(tree, "inputs/0", tensors))), tensors)
    assert torch.equal(again.pop("x"), torch.ones(2))
    assert again == {"n": (1, [2.5, None, "t", True])}
    with pytest.raises(VerificationError, match="cannot be stored"):
        pack({"x": object()}, "inputs/0", {})
    deep: Any = {"value": 1}
    for _ in range(50):
        deep = {"list": [deep]}
    with pytest.raises(VerificationError, match="malformed"):
        unpack(deep, {})


def test_checking_changes_nothing_of_the_model(case: Path) -> None:
    model = adapted(bert())
    before = copy.deepcopy(model.state_dict())
    golden.record(case.parent / "bert", model, tokens(), reason="an encoder")
    golden.check(case.parent / "bert", model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_each_form_is_held_to_the_limits_of_the_case(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, strict = mlp(), Limits(bound_ratio=1e-9)
    golden.record(tmp_path, model, (torch.randn(4, 5),), reason="nothing is so exact", forms=["onnx"], limits=strict)
    _, written = golden.check(tmp_path, model)
    assert not written.ok
    assert written.limits == strict


def test_a_form_that_cannot_be_made_fails_alone(tmp_path: Path) -> None:
    """Of a model that takes a branch by its data there is no graph."""
    pytest.importorskip("onnxruntime")
    model = adapted(nn.Sequential(nn.Linear(5, 5), Forked(5, 3)), targets=["0"])
    golden.record(tmp_path, model, (torch.randn(4, 5),), reason="has no graph", forms=["merged", "onnx"])
    recorded, merged, written = golden.check(tmp_path, model)
    assert recorded.ok
    assert recorded.name == str(tmp_path)
    assert merged.ok
    assert not written.ok
    assert written.name == f"{tmp_path} as onnx"
    assert "cannot be compared" in str(written)


class Forked(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else -super().forward(x)
