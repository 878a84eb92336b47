"""A model with coded maps as a folder: every tensor in `quantized.safetensors`, and in `quantized.json` how each map is
stored and the hashes of the files. Exchanged as a whole, hostile until checked.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrcompile import __version__
from lrcompile.checkpointing.files import sealed
from lrcompile.errors import LrcompileError, ModelError, VerificationError
from lrcompile.hosting import original_class
from lrcompile.progress import status
from lrcompile.safe_tensors import STATE, TensorFile, open_tensors, writing
from lrcompile.state import has_state
from lrcompile.storage import PARTS, Map, attach_maps, checked_maps, described_maps, misfits, state_entries
from lrcompile.verifying.manifest import sha256
from lrcompile.verifying.strictjson import read_object
from lrcompile.wording import listed
from lrcompile.wrapping import refuse_meta, refuse_wrapped
from lrcompile.writing import atomic_folder, refuse_working_folder

WEIGHTS, CARD = "quantized.safetensors", "quantized.json"
_BESIDE = ("config.json", "generation_config.json", "classifier.json", "encoder/config.json")
"""Files that say how to build the plain model; changed, they would make another one of the same tensors."""
_SCHEMA = 1
_UNSTORED = 64 << 20  # numbers in buffers that no file holds: tables of positions, masks


def save_quantized(model: nn.Module, dir: str | os.PathLike[str]) -> Path:
    """Write every tensor of a model with weights stored as NF4, int8 or int4 (`quantize`), codes included, and how each
    map is stored; of a `transformers` model its config too, so that the command line takes the folder for a MODEL.

    Safetensors and JSON, exchanged as a whole: whoever looks finds the old folder or the new one. Everything else in
    it stays. Tensors keep their dtype; `load_quantized` gives back their bits. What a buffer that is not persistent
    holds, and originals kept by `keep_base`, are not written. Returns the folder.

    Raises `ModelError` for a model that has adapters (`save` writes those), nothing quantized, values that are not
    finite or on the meta device, or a folder that cannot be written or that this process works in; what was there
    before is then untouched.
    """
    refuse_wrapped(model, "save")
    refuse_working_folder(dir, ModelError)
    with status(f"writing {os.fspath(dir)}"), atomic_folder(dir, keep=lambda _: True, error=ModelError) as folder:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "save_pretrained"):
            config = copy.deepcopy(config)
            config.architectures = [original_class(model).__name__]
            config.save_pretrained(folder)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        write_quantized(folder, model)
    return Path(dir)


@writing()
def write_quantized(folder: Path, model: nn.Module) -> None:
    """The two files, into a folder that nobody looks at yet and in which what says how to build the model lies."""
    if any(has_state(module) for module in model.modules()):
        raise ModelError(
            "the model carries adapters: lrcompile.save writes them, beside the quantized base as it was before apply;"
            " merge(model, final=True) or remove them to write the model itself"
        )
    maps = described_maps(model)
    if not maps:
        raise ModelError(f"this {type(model).__name__} has no weight stored as codes; call lrcompile.quantize first")
    refuse_meta(model, "save", ModelError)
    state = model.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{listed(odd)} in the model's state are no tensors, which have no safe form in a file")
    _refuse_not_finite(model, state, "the model")
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    files = [WEIGHTS, *(name for name in _BESIDE if (folder / name).is_file())]
    card = {
        "schema": _SCHEMA,
        "version": __version__,
        "files": {name: sha256(folder / name) for name in files},
        "maps": maps,
    }
    (folder / CARD).write_text(json.dumps(sealed(card), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def is_quantized_folder(folder: str | os.PathLike[str]) -> bool:
    return Path(folder, CARD).is_file()


def load_quantized(model: nn.Module, dir: str | os.PathLike[str]) -> nn.Module:
    """Give a plain model, with any weights, the maps and tensors of a folder of `save_quantized`; in place, returned.

    Each map gets the bits and the form it had: W ≈ c[q]·m for NF4, s·(q − 2^(bits−1)) for integers. Floating tensors
    take the dtype of the file, everything else must be as the model has it. Adapters may then be loaded or trained on
    what is float or NF4. What `quantize` said of the model (`quantization_of`) is not stored.

    Raises `ModelError`, listing them, for keys that are unknown or missing, wrong shapes and dtypes, values that are
    not finite, files that are damaged or not those that were written together; `TargetError` for maps that this model
    does not have or that cannot be stored so. The model is then as it was.
    """
    refuse_wrapped(model, "load into")
    refuse_meta(model, "load its codes", ModelError)
    if any(has_state(module) for module in model.modules()):
        raise ModelError("the model carries adapters; load the quantized weights first, then its adapters")
    folder = Path(dir)
    with status(f"reading {os.fspath(dir)}"):
        card = _card(folder)
        for name, digest in card["files"].items():
            _require_unchanged(folder, name, digest)
        with open_tensors(folder / WEIGHTS, error=ModelError, dtypes=STATE) as file:
            maps = _fitting(model, card, file)
            tensors = file.tensors(finite=False)
        _refuse_not_finite(model, tensors, str(folder / WEIGHTS))
        plain = {name: held for name, held in model.state_dict(keep_vars=True).items() if name in tensors}
        _refuse_untied(plain, tensors, folder / WEIGHTS)
        moved = {name: tensors[name].to(held.device) for name, held in plain.items()}
        attach_maps(maps, tensors)
        for name, held in plain.items():
            held.data = moved[name]
    return model


def check_quantized(outline: nn.Module, dir: str | os.PathLike[str]) -> None:
    """Would `load_quantized` fit a model like `outline`, which may be on the meta device? From what the files announce,
    before a number is allocated; their hashes are not looked at. Raises as that does.
    """
    folder = Path(dir)
    card = _card(folder)
    with open_tensors(folder / WEIGHTS, error=ModelError, dtypes=STATE) as file:
        _fitting(outline, card, file)
        stored = sum(math.prod(entry.shape) for entry in file.entries.values())
    held = outline.state_dict(keep_vars=True).values()
    known = {id(each) for each in held}
    beside = sum(buffer.numel() for buffer in outline.buffers() if id(buffer) not in known)
    if beside > 4 * stored + _UNSTORED:
        raise ModelError(f"{folder}: its config makes a model with {beside} numbers beside the {stored} it stores")


def _card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        card = read_object(path, schema=_SCHEMA)
    except VerificationError as error:
        raise ModelError(str(error)) from error
    if card != sealed(card):
        raise ModelError(f"{path} is damaged or was edited: it is not what its sha256 says; take it from a copy")
    if odd := sorted(set(card) ^ {"schema", "version", "files", "maps", "sha256"}):
        raise ModelError(f"{path}: missing or unknown keys: {', '.join(odd)}")
    files = card["files"]
    if not isinstance(files, dict) or WEIGHTS not in files or not set(files) <= {WEIGHTS, *_BESIDE}:
        raise ModelError(f"{path}: files must name {WEIGHTS}, and of others only {', '.join(_BESIDE)}")
    return card


def _require_unchanged(folder: Path, name: str, expected: Any) -> None:
    if not (folder / name).is_file():
        raise ModelError(f"{folder} has no {name}, which was written with it; take the folder from a copy")
    try:
        found = sha256(folder / name)
    except OSError as error:
        raise ModelError(f"{folder / name} cannot be read: {error}") from error
    if found != expected:
        raise ModelError(
            f"{folder / name} is damaged or was changed: it is not what was written together with {CARD} (their sha256"
            " differ); take the folder from a copy, or quantize again"
        )


def _fitting(model: nn.Module, card: Mapping[str, Any], file: TensorFile) -> dict[str, Map]:
    try:
        maps = checked_maps(model, card["maps"])
    except LrcompileError as error:
        raise type(error)(f"{file.path.parent}: {error}") from error
    if faults := misfits(file.entries, state_entries(model, maps)):
        raise ModelError(f"{file.path} does not fit this {type(model).__name__}: {'; '.join(faults)}")
    return maps


def _refuse_untied(plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Of names that stand for one parameter here, two contents would leave the last."""
    first: dict[int, str] = {}
    for name, held in plain.items():
        other = first.setdefault(id(held), name)
        if other != name and not torch.equal(tensors[name], tensors[other]):
            raise ModelError(f"{path}: {other} and {name} are one parameter in this model and differ in the file")


def _refuse_not_finite(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Parameters and scales; a mask among the buffers may hold −∞."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    looked_at = [name for name in tensors if name in parameters or name.rpartition(".")[2] in PARTS]
    broken = [name for name in looked_at if not bool(torch.isfinite(tensors[name]).all())]
    if broken:
        raise ModelError(f"{where} holds NaN or infinite values: {listed(broken)}")
