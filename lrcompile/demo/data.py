"""Labelled texts: the standard library's docstrings, or the user's own JSONL or CSV file.

A text goes to the test part iff `sha256(text) / 2**256 < test_share`. The split is a function of the text alone, so the
same text can never be on both sides, whatever the order, the limit or the file it came from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lrcompile.demo.docstrings import stdlib_docstrings
from lrcompile.demo.errors import DataError
from lrcompile.demo.tables import read_table

DOCSTRINGS = "stdlib-docstrings"


@dataclass(frozen=True)
class Texts:
    """Parallel lists: `labels[i]` indexes `Data.labels` and belongs to `texts[i]`."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Data:
    """One data set, split. `dropped` counts what was removed and why; `mentions` is the share of test texts naming
    their label.
    """

    source: str
    labels: tuple[str, ...]
    train: Texts
    test: Texts
    dropped: dict[str, int]
    mentions: float

    def summary(self) -> dict[str, object]:
        return {
            "source": self.source,
            "classes": len(self.labels),
            "train": len(self.train),
            "test": len(self.test),
            "majority_class_share": round(max(Counter(self.test.labels).values()) / len(self.test), 4),
            "test_texts_naming_their_label": round(self.mentions, 4),
            "dropped": self.dropped,
        }


def load_data(source: str, *, classes: int = 20, test_share: float = 0.2, limit: int | None = None) -> Data:
    """Read `source` (`stdlib-docstrings`, or a path to `.jsonl` or `.csv`), drop duplicates, split by hash.

    `classes` keeps the most frequent labels of the docstrings (a user's file keeps all of its labels); `limit`
    keeps that
    many texts, evenly spread in hash order. Raises `DataError` on anything that cannot be learned from.
    """
    if source == DOCSTRINGS:
        pairs, dropped = _unique(stdlib_docstrings())
        kept = {label for label, _ in Counter(label for _, label in pairs).most_common(classes)}
        pairs = [pair for pair in pairs if pair[1] in kept]
    else:
        pairs, dropped = _unique(read_table(source))
    return _split(source, pairs, dropped, test_share, limit)


def _unique(pairs: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Each text once. A text that occurs under two labels has no right answer and goes altogether."""
    labels_of: dict[str, set[str]] = {}
    total = 0
    for text, label in pairs:
        total += 1
        labels_of.setdefault(text, set()).add(label)
    unique = [(text, next(iter(labels))) for text, labels in labels_of.items() if len(labels) == 1]
    return unique, {"repeated": total - len(labels_of), "under_several_labels": len(labels_of) - len(unique)}


def _split(
    source: str, pairs: list[tuple[str, str]], dropped: dict[str, int], test_share: float, limit: int | None
) -> Data:
    labels = tuple(sorted({label for _, label in pairs}))
    if not pairs:
        raise DataError(f"{source} holds no usable text; give at least a few hundred, under two labels or more")
    if len(labels) < 2:
        raise DataError(f"{source} holds one label only, {labels[0]!r}; a classifier needs at least two")
    index = {label: i for i, label in enumerate(labels)}
    pairs = sorted(pairs, key=lambda pair: _hash(pair[0]))
    if limit is not None and limit < len(pairs):
        # Every k-th in hash order: the head of that order alone would be all test, since the split cuts the same axis.
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    cut = int(test_share * 2**256)
    test = [pair for pair in pairs if _hash(pair[0]) < cut]
    train = [pair for pair in pairs if _hash(pair[0]) >= cut]
    if not train or not test:
        empty = "test" if train else "training"
        raise DataError(
            f"{source} leaves the {empty} part empty ({len(pairs)} texts, test_share {test_share});"
            " give more texts or another share"
        )
    mentions = sum(label.lower() in text.lower() for text, label in test) / len(test)
    return Data(source, labels, _texts(train, index), _texts(test, index), dropped, mentions)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")


def _texts(pairs: list[tuple[str, str]], index: dict[str, int]) -> Texts:
    return Texts([text for text, _ in pairs], [index[label] for _, label in pairs])
