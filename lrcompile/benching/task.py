"""What a task is: fresh models that start alike, batches by seed, and one number that says how good a model is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

Batch = dict[str, Tensor]


class Task(ABC):
    """`prepare` fills the folder once; everything else reads it."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    head: ClassVar[tuple[str, ...]] = ()
    """Modules that every method trains in full."""

    def __init__(self, folder: Path):
        self.folder = folder / self.name

    @abstractmethod
    def prepare(self) -> None:
        """Compute what all runs share; does nothing where it is there already."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The base, the same bits each time."""

    @abstractmethod
    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Training batches, decided by the seed."""

    @abstractmethod
    def quality(self, model: nn.Module, part: str) -> float:
        """The metric on "validation" or "test"."""

    def done(self, *files: str) -> bool:
        return all((self.folder / file).is_file() for file in files)
