"""The tasks there are, made of what every machine has: the text of Python's standard library."""

from __future__ import annotations

from lrcompile.benching.docstrings import Docstrings
from lrcompile.benching.documentation import Documentation
from lrcompile.benching.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Docstrings, Documentation)}
