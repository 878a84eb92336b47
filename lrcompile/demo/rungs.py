"""The rungs of the line: what each one is, how to load it from the results' folder, and which files it needs there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.quantized_folders import WEIGHTS, is_quantized_folder

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""input_ids and attention_mask, int64 [N, T], to logits float32 [N, classes]."""


@dataclass(frozen=True)
class Rung:
    key: str
    title: str
    load: Callable[[Path], Predict]
    files: tuple[str, ...]
    """What it takes to run this rung, as patterns in the results' folder."""
    base: str | None = None
    """The classifier folder that refers to the encoder the user named, if this rung needs that too."""


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


FROZEN = Rung("frozen", "frozen encoder", _plain("baseline"), ("baseline/head.safetensors",), base="baseline")
ADAPTED = Rung("adapted", "adapter, eager", _adapted, ("base/*.safetensors", "adapter/*.safetensors"), base="base")
MERGED = Rung("merged", "merged, eager", _plain("merged"), ("merged/encoder/*.safetensors", "merged/head.safetensors"))


def _graph(key: str, title: str, target: str) -> Rung:
    file = f"model-{target}.onnx"
    return Rung(key, title, _onnx(file), (file, f"model-{target}.*.data"))


FP32_ONNX = _graph("fp32-onnx", "merged, ONNX", "fp32")
NF4 = Rung("nf4", "merged NF4, eager", _plain("nf4"), (f"nf4/{WEIGHTS}",))
NF4_ONNX = _graph("nf4-onnx", "merged NF4, ONNX", "nf4")
BUDGET = Rung("budget", "within budget, eager", _plain("budget"), (f"budget/{WEIGHTS}",))
BUDGET_ONNX = _graph("budget-onnx", "within budget, ONNX", "budget")
INLINE_ONNX = _graph("inline-onnx", "NF4 + adapter, ONNX", "nf4-inline")
RUNGS = {
    rung.key: rung for rung in (FROZEN, ADAPTED, MERGED, FP32_ONNX, NF4, NF4_ONNX, BUDGET, BUDGET_ONNX, INLINE_ONNX)
}


def size_on_disk(folder: Path, rung: Rung, encoder_bytes: int) -> int:
    """Bytes of the weights and graphs this rung needs; `encoder_bytes` where it loads the encoder the user named."""
    found = [path for name in rung.files for path in folder.glob(name)]
    refers = rung.base is not None and not is_quantized_folder(folder / rung.base)
    return sum(path.stat().st_size for path in found) + (encoder_bytes if refers else 0)
