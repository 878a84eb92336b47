"""The files that `onnxruntime-genai` wants beside an exported decoder: `genai_config.json`, and its tokenizer's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lrcompile.deployment.decoding import PAST, POSITIONS, PRESENT
from lrcompile.errors import ExportError
from lrcompile.writing import atomic_file

NAME = "genai_config.json"
# The names the library runs plain decoders under; what it has no name for differs in the graph only.
_TYPES = (
    "chatglm",
    "gemma",
    "gemma2",
    "granite",
    "internlm2",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "qwen2",
    "qwen3",
)
_DEFAULT_TYPE = "llama"


def write(path: Path, manifest: Mapping[str, Any], tokenizer: Any = None) -> Path:
    """Make the folder of `path` one that `onnxruntime_genai.Model(folder)` loads; returns the config's path.

    `tokenizer` is one of transformers, whose own files are written too. Raises ExportError for a file without a cache
    and for a folder that is another model's already.
    """
    generation = manifest.get("generation")
    if path.suffix != ".onnx" or not generation:
        raise ExportError(
            f"onnxruntime-genai runs decoders of ONNX with a cache, {path.name} is none: export(model, 'model.onnx',"
            " inputs, use_cache=True)"
        )
    target = path.with_name(NAME)
    if (other := _model_of(target)) not in (None, path.name):
        raise ExportError(f"{target} is that of {other}; one folder holds one model, export {path.name} to another")
    text = json.dumps(config(path.name, manifest), indent=2) + "\n"
    if tokenizer is not None:
        _write_tokenizer(path.parent, tokenizer)
    with atomic_file(target, error=ExportError) as temporary:
        temporary.write_text(text)
    return target


def config(filename: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `genai_config.json` says; greedy decoding, one beam, and the session settings the manifest pins."""
    generation = manifest["generation"]
    wanted = ("layers", "head_size", "hidden_size", "vocab_size", "attention_heads", "key_value_heads")
    missing = [name for name in wanted if type(generation.get(name)) is not int]
    if missing:
        raise ExportError(f"the model's config does not say its {', '.join(missing)}, which {NAME} must")
    ends = generation["eos_token_id"]
    first = ends[0] if isinstance(ends, list) else ends
    if first is None:
        raise ExportError(f"{NAME} needs an end token: set model.generation_config.eos_token_id and export again")
    own = [
        name for name in ("input_ids", "attention_mask", POSITIONS) if name in {p["name"] for p in manifest["inputs"]}
    ]
    halves = {half: f"%d.{half}" for half in ("key", "value")}
    length = generation["context_length"] or 2048
    return {
        "model": {
            "type": generation["model_type"] if generation["model_type"] in _TYPES else _DEFAULT_TYPE,
            "bos_token_id": first if generation["bos_token_id"] is None else generation["bos_token_id"],
            "eos_token_id": ends,
            "pad_token_id": first if generation["pad_token_id"] is None else generation["pad_token_id"],
            "context_length": length,
            "vocab_size": generation["vocab_size"],
            "decoder": {
                "filename": filename,
                "session_options": {"provider_options": [], **manifest["session"]["config"]},
                "head_size": generation["head_size"],
                "hidden_size": generation["hidden_size"],
                "num_attention_heads": generation["attention_heads"],
                "num_hidden_layers": generation["layers"],
                "num_key_value_heads": generation["key_value_heads"],
                "inputs": {
                    **{name: name for name in own},
                    **{f"past_{half}_names": f"{PAST}.{names}" for half, names in halves.items()},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{half}_names": f"{PRESENT}.{names}" for half, names in halves.items()},
                },
            },
        },
        # the graph grows its cache by concatenation, so past and present are buffers of their own
        "search": {"do_sample": False, "num_beams": 1, "max_length": length, "past_present_share_buffer": False},
    }


def _model_of(target: Path) -> str | None:
    """The model that a config already there is for."""
    if not target.exists():
        return None
    try:
        return str(json.loads(target.read_bytes())["model"]["decoder"]["filename"])
    except (ValueError, KeyError, TypeError):
        return "something unreadable"


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    with TemporaryDirectory() as temporary:
        try:
            tokenizer.save_pretrained(temporary)
        except (AttributeError, OSError, ValueError) as error:
            raise ExportError(f"{type(tokenizer).__name__} is no tokenizer that saves itself: {error}") from error
        for source in sorted(Path(temporary).iterdir()):
            with atomic_file(folder / source.name, error=ExportError) as target:
                target.write_bytes(source.read_bytes())
