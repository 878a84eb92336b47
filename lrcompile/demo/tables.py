"""A user's labelled texts: JSONL (one object a line) or CSV (a header line), with the columns `text` and `label`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrcompile.demo.errors import DataError

COLUMNS = ("text", "label")


def read_table(source: str) -> Iterator[tuple[str, str]]:
    """Yield `(text, label)` of each row, white space collapsed. Raises `DataError` naming the file and the line."""
    path = Path(source)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise DataError(f"data is {source!r}; expected 'stdlib-docstrings' or a file that ends in .jsonl or .csv")
    if not path.is_file():
        raise DataError(f"no such file: {source}")
    rows = 0
    try:
        for line, row in readers[path.suffix.lower()](path):
            rows += 1
            yield _pair(source, line, row)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise DataError(f"{source} is empty; expected rows with the columns {' and '.join(COLUMNS)}")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); expected one object a line") from error


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _pair(source: str, line: int, row: Any) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise DataError(
            f"{source}:{line}: expected an object with the columns text and label, got {type(row).__name__}"
        )
    for column in COLUMNS:
        if row.get(column) is None:
            there = ", ".join(repr(name) for name in row if name) or "none"
            raise DataError(f"{source}:{line}: no column {column!r}; the columns there are {there}")
    text, label = row["text"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{source}:{line}: the text is {text!r}; expected a string that is not blank")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"{source}:{line}: the label is {label!r}; expected a string or an integer")
    return " ".join(text.split()), str(label).strip()
