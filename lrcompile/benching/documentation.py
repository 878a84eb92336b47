"""Modelling Python's reference manual after learning the standard library's code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrcompile.benching.corpus import code, documentation, windows
from lrcompile.benching.task import Batch, Task
from lrcompile.errors import require
from lrcompile.writing import atomic_file


class Documentation(Task):
    """A small Llama over bytes, trained on the standard library's code, then adapted to Python's reference manual."""

    name, metric, higher_is_better = "documentation", "bits per byte", False
    TOKENS, BATCH, WIDTH, LAYERS, PRETRAINING = 128, 8, 128, 4, 1200

    def prepare(self) -> None:
        require("transformers", "hf")
        if self.done("base.safetensors", "windows.safetensors"):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = windows(documentation(), self.TOKENS)
        bucket = [int(hashlib.sha256(bytes(row.tolist())).hexdigest(), 16) % 10 for row in texts]
        split = {"validation": [0], "test": [1], "train": range(2, 10)}
        tensors = {part: texts[[b in chosen for b in bucket]] for part, chosen in split.items()}
        with atomic_file(self.folder / "windows.safetensors") as file:
            save_file(tensors, file)
        model = self._untrained()
        rows = windows(code(), self.TOKENS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self.PRETRAINING)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.PRETRAINING):
            ids = rows[torch.randint(len(rows), (2 * self.BATCH,), generator=generator)].long()
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
        with atomic_file(self.folder / "base.safetensors") as file:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)

    def _untrained(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.WIDTH,
            intermediate_size=344,
            num_hidden_layers=self.LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=self.TOKENS,
            tie_word_embeddings=False,
            use_cache=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config)

    def model(self) -> nn.Module:
        model = self._untrained()
        model.load_state_dict(load_file(self.folder / "base.safetensors"))
        return model

    def _rows(self, part: str) -> Tensor:
        if not hasattr(self, "_loaded"):
            self._loaded = load_file(self.folder / "windows.safetensors")
        return self._loaded[part]

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        generator, rows = torch.Generator().manual_seed(seed), self._rows("train")
        for _ in range(steps):
            ids = rows[torch.randint(len(rows), (self.BATCH,), generator=generator)].long()
            yield {"input_ids": ids, "labels": ids}

    def quality(self, model: nn.Module, part: str) -> float:
        rows, total = self._rows(part)[:256], 0.0
        with torch.no_grad():
            for ids in rows.long().split(32):
                total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
        return total / len(rows) / math.log(2)
