"""A user's texts: JSONL (one object a line) or CSV (a header line) with the columns `text` and, where texts have one,
`label`; or, without labels, a text a line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrcompile.demo.errors import DataError

COLUMNS = ("text", "label")


def read_table(source: str) -> Iterator[tuple[str, str]]:
    """Yield `(text, label)` of each row, white space collapsed. Raises `DataError` naming the file and the line."""
    for line, row in _rows(source, {".jsonl": _jsonl, ".csv": _csv}):
        text, label = (_cell(source, line, row, column, COLUMNS) for column in COLUMNS)
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise DataError(f"{source}:{line}: the label is {label!r}; expected a string or an integer")
        yield _text(source, line, text), str(label).strip()


def read_texts(source: str) -> Iterator[str]:
    """Yield the texts of a table or of the lines of a .txt file, white space collapsed, as `read_table` does."""
    for line, row in _rows(source, {".jsonl": _jsonl, ".csv": _csv, ".txt": _lines}):
        yield _text(source, line, _cell(source, line, row, COLUMNS[0], COLUMNS[:1]))


def _rows(source: str, readers: Mapping[str, Callable[[Path], Iterator[tuple[int, Any]]]]) -> Iterator[tuple[int, Any]]:
    path = Path(source)
    if path.suffix.lower() not in readers:
        endings = " or ".join(readers)
        raise DataError(f"data is {source!r}; expected 'stdlib-docstrings' or a file that ends in {endings}")
    if not path.is_file():
        raise DataError(f"no such file: {source}")
    rows = 0
    try:
        for line, row in readers[path.suffix.lower()](path):
            rows += 1
            yield line, row
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise DataError(f"{source} is empty; expected texts, in a table the columns {' and '.join(COLUMNS)}")


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


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, {"text": line}


def _cell(source: str, line: int, row: Any, column: str, columns: Sequence[str]) -> Any:
    if not isinstance(row, dict):
        raise DataError(
            f"{source}:{line}: expected an object with the columns {' and '.join(columns)}, got {type(row).__name__}"
        )
    if row.get(column) is None:
        there = ", ".join(repr(name) for name in row if name) or "none"
        raise DataError(f"{source}:{line}: no column {column!r}; the columns there are {there}")
    return row[column]


def _text(source: str, line: int, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{source}:{line}: the text is {text!r}; expected a string that is not blank")
    return " ".join(text.split())
