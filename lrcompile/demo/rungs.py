"""The rungs of the line: what each one is, how to load it from the results' folder, and which files it needs there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""input_ids and attention_mask, int64 [N, T], to logits float32 [N, classes]."""


@dataclass(frozen=True)
class Rung:
    key: str
    title: str
    load: Callable[[Path], Predict]
    files: tuple[str, ...]
    """What it takes to run this rung, relative to the results' folder; "BASE" stands for the encoder the user named."""


def _torch(model: Any) -> Predict:
    import torch

    def predict(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return predict


def _plain(name: str) -> Callable[[Path], Predict]:
    def load(folder: Path) -> Predict:
        from lrcompile.demo.folders import load_classifier

        return _torch(load_classifier(folder / name))

    return load


def _adapted(folder: Path) -> Predict:
    import lrcompile
    from lrcompile.demo.folders import load_classifier

    model = load_classifier(folder / "base")
    lrcompile.load(model, folder / "adapter")
    return _torch(model.eval())


def _onnx(name: str) -> Callable[[Path], Predict]:
    def load(folder: Path) -> Predict:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        outputs = ["logits"]

        def predict(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            return session.run(outputs, {"input_ids": ids, "attention_mask": mask})[0]

        return predict

    return load


FROZEN = Rung("frozen", "frozen encoder", _plain("baseline"), ("BASE", "baseline/head.safetensors"))
ADAPTED = Rung("adapted", "adapter, eager", _adapted, ("BASE", "base", "adapter"))
MERGED = Rung("merged", "merged, eager", _plain("merged"), ("merged/encoder/*.safetensors", "merged/head.safetensors"))
FP32_ONNX = Rung("fp32-onnx", "merged, ONNX", _onnx("model.onnx"), ("model.onnx", "model.onnx.data"))
NF4 = Rung("nf4", "merged NF4, eager", _plain("nf4"), ("nf4/nf4.safetensors",))
NF4_ONNX = Rung("nf4-onnx", "merged NF4, ONNX", _onnx("model.nf4.onnx"), ("model.nf4.onnx", "model.nf4.onnx.data"))
INLINE_ONNX = Rung(
    "inline-onnx", "NF4 + adapter, ONNX", _onnx("model.inline.onnx"), ("model.inline.onnx", "model.inline.onnx.data")
)
RUNGS = {rung.key: rung for rung in (FROZEN, ADAPTED, MERGED, FP32_ONNX, NF4, NF4_ONNX, INLINE_ONNX)}


def size_on_disk(folder: Path, rung: Rung, base: Path) -> int:
    """Bytes of the weights and graphs this rung needs."""
    total = 0
    for name in rung.files:
        if name == "BASE":
            found = [] if (folder / "base" / "nf4.json").is_file() and rung is ADAPTED else list(base.glob("*.safetensors"))
        elif (folder / name).is_dir():
            found = list((folder / name).glob("*.safetensors"))
        else:
            found = list(folder.glob(name))
        total += sum(path.stat().st_size for path in found)
    return total
