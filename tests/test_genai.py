"""The folder that onnxruntime-genai loads. The loading itself is tested where that package is installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lrcompile.errors import ExportError
from lrcompile.interop.genai import config, write

HALVES = [f"{layer}.{half}" for layer in range(2) for half in ("key", "value")]
MANIFEST: dict[str, Any] = {
    "inputs": [
        {"name": name, "dtype": "int64", "shape": ["batch", "sequence"]}
        for name in ("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{half}" for half in HALVES))
    ],
    "session": {"graph_optimization_level": "all", "config": {"session.qdq_matmulnbits_accuracy_level": "0"}},
    "generation": {
        "model_type": "mistral", "layers": 2, "attention_heads": 4, "key_value_heads": 2, "head_size": 8,
        "hidden_size": 32, "vocab_size": 97, "context_length": 256, "bos_token_id": 1, "eos_token_id": [2, 5],
        "pad_token_id": None,
    },
}  # fmt: skip


def _changed(**generation: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    manifest["generation"] |= generation
    return manifest


def test_the_config_names_what_the_graph_has():
    model = config("m.onnx", MANIFEST)["model"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("mistral", 256, 97)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 5], 2)
    decoder = model["decoder"]
    assert decoder["filename"] == "m.onnx"
    assert decoder["session_options"] == {"provider_options": [], "session.qdq_matmulnbits_accuracy_level": "0"}
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[name] for name in sizes] == [8, 32, 4, 2, 2]
    named = {*decoder["inputs"].values(), *decoder["outputs"].values()}
    spelled = {name % layer if "%d" in name else name for name in named for layer in range(2)}
    assert spelled == {port["name"] for port in MANIFEST["inputs"]} | {
        "logits",
        *(f"present.{half}" for half in HALVES),
    }


def test_the_graphs_own_cache_grows_so_no_buffer_is_shared_and_search_is_greedy():
    search = config("m.onnx", MANIFEST)["search"]
    assert search == {"do_sample": False, "num_beams": 1, "max_length": 256, "past_present_share_buffer": False}


@pytest.mark.parametrize(("family", "named"), [("llama", "llama"), ("mixtral", "llama"), ("gpt2", "llama")])
def test_a_family_the_library_has_no_name_for_runs_as_a_plain_decoder(family, named):
    assert config("m.onnx", _changed(model_type=family))["model"]["type"] == named


def test_a_graph_without_positions_is_given_none():
    manifest = copy.deepcopy(MANIFEST)
    manifest["inputs"] = [port for port in manifest["inputs"] if port["name"] != "position_ids"]
    assert "position_ids" not in config("m.onnx", manifest)["model"]["decoder"]["inputs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"eos_token_id": None}, "end token"), ({"hidden_size": None, "vocab_size": None}, "hidden_size, vocab_size")],
)
def test_what_the_library_must_know_is_asked_for(tmp_path, change, message):
    with pytest.raises(ExportError, match=message):
        write(tmp_path / "m.onnx", _changed(**change))
    assert list(tmp_path.iterdir()) == []


def test_one_folder_is_one_models_and_a_file_without_a_cache_has_none(tmp_path):
    target = write(tmp_path / "m.onnx", MANIFEST)
    assert json.loads(target.read_text()) == config("m.onnx", MANIFEST)
    assert write(tmp_path / "m.onnx", MANIFEST) == target
    with pytest.raises(ExportError, match=r"is that of m\.onnx"):
        write(tmp_path / "other.onnx", MANIFEST)
    target.write_text("{}")
    with pytest.raises(ExportError, match="something unreadable"):
        write(tmp_path / "m.onnx", MANIFEST)
    plain = {name: value for name, value in MANIFEST.items() if name != "generation"}
    with pytest.raises(ExportError, match="use_cache=True"):
        write(tmp_path / "plain.onnx", plain)


def test_what_is_no_tokenizer_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ExportError, match="str is no tokenizer"):
        write(tmp_path / "m.onnx", MANIFEST, "gpt2")
    assert list(Path(tmp_path).iterdir()) == []
