"""A model, its manifest and its adapters, exchanged as one: whoever reads them by the manifest finds the old ones or
the new ones, at whatever moment the process that writes them is killed.

One rename is atomic, several are not. So the manifest goes first, with the one it replaces inside, and the sha256 of
the model says which of the two holds: the model's rename is the moment of change. Adapters wait until then under hidden
names that their contents give, where readers of the new manifest find them too. Then they take their places, and the
manifest drops what it replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lrcompile.deployment.describing import encoded
from lrcompile.errors import ExportError, VerificationError
from lrcompile.verifying.manifest import REPLACES, both_described, manifest_of, sha256, waiting
from lrcompile.writing import atomic_file, put, temporary_file

_ADAPTER = ".onnx_adapter"


@contextmanager
def exchanging(path: Path) -> Iterator[Exchange]:
    """Files that take the places of the model at `path` and those beside it with `commit`, and vanish without."""
    with ExitStack() as temporaries:
        yield Exchange(path, temporaries)


class Exchange:
    def __init__(self, path: Path, temporaries: ExitStack):
        self.path = path
        self._temporaries = temporaries
        self._model: Path | None = None
        self._adapters: dict[str, Path] = {}
        self._decided = False

    def model(self) -> Path:
        """An empty file for the new model; without one, the model that is there stays."""
        self._model = self._temporaries.enter_context(temporary_file(self.path, error=ExportError))
        return self._model

    def adapter(self, name: str) -> Path:
        """An empty file for what will be `name` beside the model."""
        place = self.path.with_name(name)
        self._adapters[name] = self._temporaries.enter_context(temporary_file(place, error=ExportError))
        return self._adapters[name]

    def add(self, temporary: Path, place: Path) -> None:
        """Rename `temporary` to `place`, a name that its content gives, which only the new model or manifest knows."""
        if not place.exists():
            self._temporaries.callback(self._withdraw, place)
        put(temporary, place, error=ExportError)

    def _withdraw(self, place: Path) -> None:
        if not self._decided:
            place.unlink(missing_ok=True)

    def commit(self, manifest: dict[str, Any]) -> None:
        """Put all in place; `manifest["sha256"]` has the hash of each file by name. Adapters of the model that was
        there go with it: ONNX Runtime would let them act on one that they were not trained on.

        Raises ExportError; if the model is not exchanged yet, the files are then as before.
        """
        old, unheld = self._old()
        gone = self._left_over(manifest["sha256"], old, unheld)
        waits = {}
        for name, file in self._adapters.items():
            place = self.path.with_name(name)
            waits[place] = waiting(place, manifest["sha256"][name])
            self.add(file, waits[place])
        self._decide(manifest, old)
        for place, wait in waits.items():
            put(wait, place, error=ExportError)
        for place in gone:
            place.unlink(missing_ok=True)
        if self._model is not None and old:
            self._describe(manifest)
        self._forget_waiting()

    def _decide(self, manifest: dict[str, Any], old: dict[str, Any]) -> None:
        """One rename: of the model, both manifests being there, or of the manifest if the model stays."""
        place = manifest_of(self.path)
        if self._model is None:
            self._describe(manifest)
            self._decided = True
            return
        before = place.read_bytes() if place.is_file() else None
        try:
            self._describe({**manifest, REPLACES: old} if old else manifest)
            put(self._model, self.path, error=ExportError)
        finally:
            self._decided = not self._model.exists()
            if not self._decided and before is not None:
                with atomic_file(place, error=ExportError) as file:
                    file.write_bytes(before)
            elif not self._decided:
                place.unlink(missing_ok=True)

    def _old(self) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return both_described(self.path)
        except VerificationError:  # not one of ours, or damaged: nobody reads it, so nothing of it is to be kept
            return {}, {}

    def _describe(self, manifest: Mapping[str, Any]) -> None:
        with atomic_file(manifest_of(self.path), error=ExportError) as file:
            file.write_bytes(encoded(manifest))

    def _left_over(self, hashes: Mapping[str, str], *replaced: Mapping[str, Any]) -> list[Path]:
        """Files that the replaced manifests list as adapters, as they list them."""
        listed = [each.get("sha256") for each in replaced]
        return [
            self.path.with_name(name)
            for known in listed
            if isinstance(known, dict)
            for name, digest in known.items()
            if name.endswith(_ADAPTER) and name not in hashes and self._holds(name, digest)
        ]

    def _holds(self, name: str, digest: Any) -> bool:
        place = self.path.parent / name
        return Path(name).name == name and place.is_file() and sha256(place) == digest

    def _forget_waiting(self) -> None:
        """What exports that were killed have left waiting; this one's manifest holds."""
        ours = re.compile(rf"\.{re.escape(self.path.stem)}\.[A-Za-z0-9][A-Za-z0-9_-]*\.[0-9a-f]{{12}}{_ADAPTER}")
        for entry in self.path.parent.iterdir():
            if ours.fullmatch(entry.name):
                with suppress(OSError):  # a left-over costs space, not correctness
                    entry.unlink()
