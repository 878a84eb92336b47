"""Open any model the command line can name, and save it again in its own form."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
from lrcompile.demo.nf4_folders import is_nf4_folder, load_nf4, save_nf4
from lrcompile.demo.sources import ModelError, load_pretrained, load_tokenizer, skeleton, untrained
from lrcompile.demo.tensors import writing
from lrcompile.quantizing import is_nf4
from lrcompile.verifying.input_files import read_inputs


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, and what it takes to feed it and to save it. `card` is that of a classifier."""

    source: str
    model: Any
    card: Card | None

    @writing()
    def save(self, folder: Path) -> None:
        """Write the model as it is now: plain, or as NF4 codes."""
        if self.card is not None:
            card = Card(INSIDE, self.card.labels, self.card.max_length)
            save_classifier(folder, self.model, self.tokenizer(), card)
            return
        if any(is_nf4(module) for module in self.model.modules()):
            save_nf4(folder, self.model)
            self.model.config.save_pretrained(folder)
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
    """A classifier's folder, an NF4 folder, or any `transformers` model. Raises `ModelError`."""
    if is_classifier(source):
        return Opened(source, load_classifier(source), load_card(source))
    if is_nf4_folder(source):
        return Opened(source, load_nf4(source, lambda: untrained(source)), None)
    return Opened(source, load_pretrained(source), None)


def outline(source: str) -> torch.nn.Module:
    """The model's structure on the meta device, from its config alone."""
    if not is_classifier(source):
        return skeleton(source)
    encoder = skeleton(encoder_of(source))
    with torch.device("meta"):
        return TextClassifier(encoder, len(load_card(source).labels))
