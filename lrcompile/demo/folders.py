"""A classifier as a folder: `classifier.json`, and its weights either plain, or quantized, or (the encoder) referred
to by name.

classifier.json   encoder, labels, max_length
encoder/          config and tokenizer; its weights too if they are plain
head.safetensors  the head of a plain classifier         quantized.*  the whole state of a quantized one
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.demo.quantized import open_quantized
from lrcompile.demo.sources import load_encoder, load_tokenizer, untrained_encoder
from lrcompile.errors import ModelError
from lrcompile.quantized_folders import is_quantized_folder, write_quantized
from lrcompile.safe_tensors import read_tensors, writing
from lrcompile.storage import is_quantized

if TYPE_CHECKING:
    from lrcompile.demo.model import TextClassifier

CARD = "classifier.json"
HEAD = "head.safetensors"
INSIDE = "encoder"


@dataclass(frozen=True)
class Card:
    """`encoder` is `"encoder"` (inside the folder) or a model's name as the user gave it."""

    encoder: str
    labels: list[str]
    max_length: int
    version: int = 1


@writing()
def save_classifier(folder: Path, model: TextClassifier, tokenizer: Any, card: Card) -> None:
    """Write `model` into `folder`, which is made; a quantized one as its codes, any other plain, as `card.encoder`
    says.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    encoder: Any = model.encoder
    quantized = is_quantized(model)
    if quantized:
        card = Card(INSIDE, card.labels, card.max_length)
        encoder.config.save_pretrained(folder / INSIDE)
    else:
        save_file({name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}, folder / HEAD)
        if card.encoder == INSIDE:
            encoder.save_pretrained(folder / INSIDE)
    if card.encoder == INSIDE:
        tokenizer.save_pretrained(folder / INSIDE)
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    if quantized:
        write_quantized(folder, model)


def is_classifier(folder: str | Path) -> bool:
    return (Path(folder) / CARD).is_file()


def load_card(folder: str | Path) -> Card:
    """The card of `folder`. Raises `ModelError` if it is not one of ours."""
    path = Path(folder) / CARD
    try:
        card = Card(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is not a classifier's description: {error}") from error
    if card.version != 1 or not isinstance(card.labels, list) or len(card.labels) < 2:
        raise ModelError(f"{path} is of version {card.version!r}; expected version 1 and two labels or more")
    return card


def load_classifier(folder: str | Path) -> TextClassifier:
    """Rebuild what `save_classifier` wrote, in eval mode. A named encoder is taken from this machine, never from
    the network.
    """
    from lrcompile.demo.model import TextClassifier

    card = load_card(folder)
    if is_quantized_folder(folder):
        return open_quantized(folder, lambda: TextClassifier(untrained_encoder(encoder_of(folder)), len(card.labels)))
    model = TextClassifier(load_encoder(encoder_of(folder), online=False), len(card.labels))
    head = Path(folder, HEAD)
    try:
        model.head.load_state_dict(read_tensors(head, ModelError))
    except RuntimeError as error:
        raise ModelError(f"{head} does not fit this model: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def classifier_tokenizer(folder: str | Path) -> Any:
    return load_tokenizer(encoder_of(folder), online=False)


def encoder_of(folder: str | Path) -> str:
    card = load_card(folder)
    return str(Path(folder) / INSIDE) if card.encoder == INSIDE else card.encoder
