"""The docstrings of the running Python's own standard library, read from source: nothing is imported or executed."""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from lrcompile.demo.errors import DataError

MIN_CHARACTERS = 20  # below this a docstring is a word or two ("Internal.") and says nothing of its module
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def stdlib_docstrings() -> Iterator[tuple[str, str]]:
    """Yield `(docstring, top-level module)` of every public standard module, class and function, white space
    collapsed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for module in sorted(sys.stdlib_module_names):
        if module.startswith("_"):
            continue
        for path in _sources(root, module):
            for text in _docstrings(path):
                found = True
                yield text, module
    if not found:
        raise DataError(f"no docstrings under {root}: this Python ships without its library's source; give --data FILE")


def _sources(root: Path, module: str) -> list[Path]:
    single = root / f"{module}.py"
    if single.is_file():
        return [single]
    files = sorted((root / module).rglob("*.py"))
    return [path for path in files if _TEST_FOLDERS.isdisjoint(path.relative_to(root).parts)]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 and some test fixtures hold files that are wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= MIN_CHARACTERS:
                yield text
