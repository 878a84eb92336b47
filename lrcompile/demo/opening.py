"""Open any model the command line can name, and save it again in its own form."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrcompile.demo.data import DOCSTRINGS
from lrcompile.demo.docstrings import stdlib_docstrings
from lrcompile.demo.folders import (
    INSIDE,
    Card,
    classifier_tokenizer,
    encoder_of,
    is_classifier,
    load_card,
    load_classifier,
    save_classifier,
)
from lrcompile.demo.model import TextClassifier
from lrcompile.demo.quantized import open_quantized
from lrcompile.demo.sources import load_pretrained, load_tokenizer, skeleton, untrained
from lrcompile.demo.tables import read_texts
from lrcompile.errors import ModelError
from lrcompile.quantized_folders import is_quantized_folder, save_quantized
from lrcompile.safe_tensors import writing
from lrcompile.storage import is_quantized
from lrcompile.verifying.input_files import read_inputs

_BATCH = 8  # texts that are padded to one length and run together


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, and what it takes to feed it and to save it. `card` is that of a classifier."""

    source: str
    model: Any
    card: Card | None

    @writing()
    def save(self, folder: Path) -> None:
        """Write the model as it is now: plain, or quantized."""
        if self.card is not None:
            card = Card(INSIDE, self.card.labels, self.card.max_length)
            save_classifier(folder, self.model, self.tokenizer(), card)
            return
        if is_quantized(self.model):
            save_quantized(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        if self.has_tokenizer():
            self.tokenizer().save_pretrained(folder)

    def inputs(self, file: str | None, texts: list[str]) -> Any:
        """The first input set of `file`, or `texts` through the model's tokenizer, as keyword arguments of its
        forward.
        """
        if file is not None:
            return read_inputs(file)[0]
        encoded = self.tokenizer()(
            texts, padding=True, truncation=True, max_length=self._max_length(), return_tensors="pt"
        )
        accepted = inspect.signature(self.model.forward).parameters
        inputs: dict[str, Any] = {name: tensor for name, tensor in encoded.items() if name in accepted}
        # A cache is a second, huge output that no classifier or exported scorer returns.
        return inputs | ({"use_cache": False} if "use_cache" in accepted else {})

    def batches(self, file: str | None, texts: list[str] | None, data: str | None, most: int) -> list[Any]:
        """What a model is measured on: every input set of `file`, or `texts` and those of the table `data`, at most
        `most`, spread evenly over it.
        """
        if file is not None:
            return read_inputs(file)
        found = list(texts or ())
        if data is not None:
            rows = [text for text, _ in stdlib_docstrings()] if data == DOCSTRINGS else list(read_texts(data))
            found += [rows[i * len(rows) // most] for i in range(most)] if most < len(rows) else rows
        return [self.inputs(None, found[start : start + _BATCH]) for start in range(0, len(found), _BATCH)]

    def tokenizer(self) -> Any:
        if self.card is not None:
            return classifier_tokenizer(self.source)
        return load_tokenizer(self.source)

    def has_tokenizer(self) -> bool:
        try:
            self.tokenizer()
        except ModelError:
            return False
        return True

    def _max_length(self) -> int:
        return self.card.max_length if self.card is not None else 128


def open_model(source: str) -> Opened:
    """A classifier's folder, a quantized one, or any `transformers` model. Raises `ModelError`."""
    if is_classifier(source):
        return Opened(source, load_classifier(source), load_card(source))
    if is_quantized_folder(source):
        return Opened(source, open_quantized(source, lambda: untrained(source)), None)
    return Opened(source, load_pretrained(source), None)


def outline(source: str) -> torch.nn.Module:
    """The model's structure on the meta device, from its config alone."""
    if not is_classifier(source):
        return skeleton(source)
    encoder = skeleton(encoder_of(source))
    with torch.device("meta"):
        return TextClassifier(encoder, len(load_card(source).labels))
