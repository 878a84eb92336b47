"""`export_adapter`: one more adapter for a graph that is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lrcompile.checkpointing.base_print import differences
from lrcompile.converting import chosen_adapter
from lrcompile.deployment.describing import fingerprint
from lrcompile.deployment.exchanging import exchanging
from lrcompile.deployment.swapping import Slots, swappable
from lrcompile.errors import ExportError, require
from lrcompile.links import followed
from lrcompile.state import state_of
from lrcompile.verifying.manifest import Artefact, artefact, manifest_of, sha256
from lrcompile.wording import listed
from lrcompile.wrapping import refuse_meta, refuse_wrapped


def export_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write the adapter `name` of `model` (None: the only, or the only active one) for the graph at `path`, which
    `export(..., adapters="inputs")` has written from the same base; returns the file, `<stem>.<name>.onnx_adapter`.

    Per site A `[in, rank]` and s·B `[rank, out]`, gains, and what else it trained, as that graph takes them: of any
    rank, at any of the sites that an adapter had when the graph was exported. The manifest gets an entry for it; a file
    of this name from before is replaced. Raises `ExportError` saying what differs where the model has another base than
    the graph, or the adapter something the graph has no input for; the files are then as before.
    """
    path = followed(path)
    require("onnxruntime", "onnx")
    from lrcompile.interop.onnx_adapters import Interface, file_name, write_adapter

    refuse_wrapped(model, "export an adapter of")
    refuse_meta(model, "export an adapter of", ExportError)
    described = _described(path)
    interface = Interface.of(path, described.data)
    name = chosen_adapter(state_of(model), name)
    with swappable(model, name) as slots:
        _refuse_other_base(model, slots, path, described.data)
        (adapter,) = slots.adapters
        tensors = interface.fitted(adapter.tensors, f"adapter {name!r}")
    target = path.with_name(file_name(path, name))
    files = {**described.data["adapters"]["files"], name: {**adapter.to_dict(), "file": target.name}}
    data = {**described.data, "adapters": {**described.data["adapters"], "files": files}}
    with exchanging(path) as exchange:
        file = exchange.adapter(target.name)
        write_adapter(file, interface.hashes[path.name], tensors)
        exchange.commit({**data, "sha256": {**interface.hashes, target.name: sha256(file)}})
    return target


def _described(path: Path) -> Artefact:
    """What the manifest beside `path` says, the files of the graph being the ones it says it of."""
    if path.suffix != ".onnx" or not path.is_file():
        raise ExportError(f"there is no .onnx file {os.fspath(path)!r}")
    found = artefact(path)
    if not found.data:
        name = manifest_of(path).name
        raise ExportError(f"there is no {name} beside {path}: export the model again")
    if found.stale:
        raise ExportError(
            f"{path}: {'; '.join(found.stale)}. The files were changed, or an export interrupted: export again"
        )
    return found


def _refuse_other_base(model: nn.Module, slots: Slots, path: Path, data: dict[str, Any]) -> None:
    if fingerprint(model) == data.get("base_sha256"):
        return
    recorded = data["adapters"].get("base")
    try:
        known = tuple(site for site in slots.holds if site.name in recorded["sites"])
        chosen = {**recorded, "sites": {site.name: recorded["sites"][site.name] for site in known}}
        faults, notes = differences(chosen, model, state_of(model), known)
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"the manifest of {path} does not describe its base: {error!r}") from error
    said = [*faults, *notes] or [f"the weights at {listed([site.name for site in known])} are the same, others differ"]
    raise ExportError(
        f"this {type(model).__name__} is not the base that {path.name} was exported from: {'; '.join(said)}. Load the"
        " adapter into that base, or export this model with adapters='inputs'"
    )
