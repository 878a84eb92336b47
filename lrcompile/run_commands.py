"""`lrcompile run`: a pipeline file, or an exported model: its outputs, or the texts it continues."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrcompile
from lrcompile.errors import LrcompileError
from lrcompile.running import Session
from lrcompile.tables import render
from lrcompile.writing import atomic_file

_OF_EXPORTS = {"inputs": "--inputs", "text": "--text", "tokenizer": "--tokenizer", "max_new_tokens": "--max-new-tokens"}


def run(given: Namespace) -> int:
    if Path(given.file).suffix in (".onnx", ".pt2"):
        return _exported(given)
    if used := [option for name, option in _OF_EXPORTS.items() if getattr(given, name) is not None]:
        raise LrcompileError(f"{', '.join(used)}: for an exported .onnx or .pt2; a pipeline file has its own data")
    from lrcompile.demo.commands import run as run_pipeline

    return run_pipeline(given)


def _exported(given: Namespace) -> int:
    if (given.inputs is None) == (given.text is None):
        raise LrcompileError("an exported model is given --inputs FILE.safetensors, or --text TEXT with a tokenizer")
    session = lrcompile.run(given.file)
    inputs = _texts(given, session) if given.text is not None else _read(given.inputs)
    if session.generation is None or any(name.startswith("past_key_values") for name in inputs):
        if given.max_new_tokens is not None:
            raise LrcompileError(f"--max-new-tokens: {given.file} was not exported with --use-cache")
        return _show(session(inputs), given.out)
    if "input_ids" not in inputs or set(inputs) - {"input_ids", "attention_mask"}:
        raise LrcompileError(f"a prompt is input_ids and perhaps attention_mask; given were {', '.join(inputs)}")
    new = 64 if given.max_new_tokens is None else given.max_new_tokens
    ids = session.generate(inputs["input_ids"], inputs.get("attention_mask"), max_new_tokens=new)
    if given.out is not None:
        return _show({"ids": ids}, given.out)
    if given.text is None:
        print("\n".join(" ".join(map(str, row)) for row in ids.tolist()))
        return 0
    for text, row in zip(given.text, ids, strict=True):
        print(text + _tokenizer(given).decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return 0


def _read(file: str) -> dict[str, Tensor]:
    from lrcompile.safe_tensors import read_tensors

    return dict(read_tensors(Path(file), LrcompileError))


def _tokenizer(given: Namespace) -> Any:
    from lrcompile.demo.sources import load_tokenizer

    return load_tokenizer(given.tokenizer or str(Path(given.file).resolve().parent))


def _texts(given: Namespace, session: Session) -> dict[str, Tensor]:
    tokenizer = _tokenizer(given)
    if session.generation is not None:
        tokenizer.padding_side = "left"
    encoded = tokenizer(given.text, padding=True, return_tensors="pt")
    if session.generation is not None:
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return {name: tensor for name, tensor in encoded.items() if name in (session.inputs or encoded)}


def _show(outputs: dict[str, Tensor], out: str | None) -> int:
    if out is not None:
        from safetensors.torch import save_file

        with atomic_file(out, error=LrcompileError) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, temporary)
        print(f"wrote {out}")
        return 0
    rows = [
        [name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."), *_spread(tensor)]
        for name, tensor in outputs.items()
    ]
    print(render(["output", "shape", "dtype", "least", "largest"], rows))
    return 0


def _spread(tensor: Tensor) -> tuple[str, str]:
    if not tensor.numel() or tensor.is_complex() or tensor.dtype == torch.bool:
        return "-", "-"
    return f"{tensor.min().item():.5g}", f"{tensor.max().item():.5g}"
