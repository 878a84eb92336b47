"""`save` and `load`: adapters as folders, in PEFT's layout where it has one, exchanged as a whole, read as hostile."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from torch import Tensor, nn

from lrcompile.checkpointing import files as adapter_files
from lrcompile.checkpointing import own_layout, peft_layout
from lrcompile.checkpointing.files import FILES, Content, as_adapter_error, finite, opened
from lrcompile.checkpointing.filling import attach_filled
from lrcompile.checkpointing.origin import origin_of
from lrcompile.checkpointing.plans import check, refuse_other_base_values, values_at
from lrcompile.errors import AdapterError, SpecError
from lrcompile.interop.bitsandbytes import note, taken_over
from lrcompile.state import State, has_state, require_name, state_of
from lrcompile.walking import first_of_each_class
from lrcompile.wrapping import refuse_wrapped, within
from lrcompile.writing import atomic_folder, refuse_working_folder
from lrcompile.written import refuse_written


def save(model: nn.Module, dir: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write every tensor of one adapter, or of all, and what else it changed: parameters trained in full, weights that
    its method has written (`plora` after an unload, `galore` after a step).

    As PEFT does where PEFT's LORA computes the same from the same tensors (A and B, and m of DoRA):
    `adapter_config.json` and `adapter_model.safetensors`. Otherwise the same files in a layout of our own, under a
    `peft_type` that PEFT refuses: every tensor that trains or is frozen, by site and name, those that sites share once.
    `lrcompile.to_lora` makes plain LoRA, which PEFT reads, of the methods that allow it.

    One adapter, or the one called `name`, goes to the top of `dir`; of several, "default" goes to the top and each
    other into a sub-folder of its name. Beside PEFT's files lies `lrcompile.json` with the exact spec and a print of
    the base. While merged, the tensors are written as they are without. The folder is exchanged as a whole: whoever
    looks finds the old adapter or the new one. Everything else in it (a README, other adapters) stays. Tensors keep
    their dtype. Returns the folder.

    Training resumes bit for bit from this folder and the optimizer's own `state_dict`. What is not in it is the base:
    for `qpissa` and `loftq` that is the NF4 codes they chose together with the factors, so keep the quantized base too
    (`state_dict` of a copy after `lrcompile.remove`); `load` recognises them by their hash.

    Raises `AdapterError` for a name that is not there, tensors that are not finite, on the meta device or sharded, a
    folder that cannot be written or that this process works in; what was there before is then untouched.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"save takes a torch.nn.Module, got {type(model).__name__}")
    model = within(model)
    state = state_of(model)  # of a model wrapped otherwise this says which submodule to give
    folders = _folders(state, name)
    refuse_working_folder(dir, AdapterError)
    contents = {folder: _content(model, state, each) for folder, each in folders.items()}
    bases = {folder: origin_of(model, state, each) for folder, each in folders.items()}
    replaced = FILES if "" in folders else frozenset()
    with atomic_folder(dir, keep=lambda entry: entry not in replaced, error=AdapterError) as temporary:
        for folder, content in contents.items():
            inner, old = temporary / folder, Path(dir) / folder
            if folder and old.is_dir():
                shutil.copytree(old, inner, symlinks=True, ignore=lambda _, names: FILES.intersection(names))
            inner.mkdir(exist_ok=True)
            adapter_files.write(inner, content, state.specs[folders[folder]], bases[folder])
    return Path(dir)


def load(
    model: nn.Module,
    dir: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = False,
    replace: bool = False,
) -> nn.Module:
    """y = f(xWᵀ + b, x) with the form f, tensors and scale of an adapter folder, ours or PEFT's; in place, returns
    `model`. For LoRA y = xWᵀ + b + s·(xAᵀ)Bᵀ.

    The adapter becomes the only active one, and trains only if `trainable`. Tensors keep the checkpoint's bits and
    dtype (those trained in full take the dtype of the parameter they stand for). With `replace` it takes the place of
    the adapter of that name. Nothing is unpickled, and no method needs its data again. Weights that the method had
    written take the place of the base's, whose bits are kept: `disabled` and `remove` give them back (not with
    `q-galore`, which holds the weight itself, in INT8). With `residual="fold"` the weights are formed anew from the
    base's. `qpissa` and `loftq` load into the NF4 base with the codes they chose and into no other: quantize the float
    base as their spec says, then give it the saved codes with `load_state_dict`. `nn.MultiheadAttention` computes the
    documented mathematics; PEFT 0.21 applies the update of its `out_proj` twice, and the report says so. Weights that
    bitsandbytes holds in NF4 are taken over first, with the codes they have.

    Raises one `AdapterError` that lists unknown keys, missing keys, wrong shapes and dtypes, values that are not
    finite; or that says what differs between this base and the adapter's, or which setting has no counterpart. On any
    error the model is as it was.
    """
    refuse_wrapped(model, "load into")
    _refuse_peft_model(model)
    state = state_of(model) if has_state(model) else None
    if state is not None and name in state.specs and not replace:
        raise AdapterError(f"an adapter named {name!r} is there already; give replace=True, or another name=")
    if state is not None and name in state.specs:
        refuse_written(model, [name], f"replace adapter {name!r}")
    with taken_over(model) as names:
        _loaded(model, state, Path(dir), name, trainable)
    state_of(model).notes += note(names)
    return model


def _loaded(model: nn.Module, state: State | None, folder: Path, name: str, trainable: bool) -> None:
    with opened(folder) as checkpoint:
        try:
            plan = (own_layout if checkpoint.own else peft_layout).planned(model, state, checkpoint)
            check(model, plan, checkpoint)
        except SpecError as error:
            raise as_adapter_error(error, folder) from error
        tensors = checkpoint.tensors.tensors()
    values = {place.unit.site.name: values_at(model, plan.spec, place, tensors) for place in plan.places}
    own_layout.check_written(plan, tensors, folder)
    refuse_other_base_values(model, state, plan, tensors, folder)
    attach_filled(model, plan, name, values, tensors, trainable)


def _folders(state: State, name: str | None) -> dict[str, str]:
    if name is not None:
        require_name(state, name)
        return {"": name}
    if len(state.specs) == 1:
        return {"": next(iter(state.specs))}
    return {"" if each == "default" else each: each for each in state.specs}


def _content(model: nn.Module, state: State, name: str) -> Content:
    layout = peft_layout if peft_layout.fits(model, state, name) else own_layout
    content = layout.content(model, state, name)
    _refuse_absent(content.tensors)
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in content.tensors.items()}
    finite(tensors)
    return dataclasses.replace(content, tensors=tensors)


def _refuse_absent(tensors: dict[str, Tensor]) -> None:
    if meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise AdapterError(f"{len(meta)} tensors are on the meta device and have no values: {', '.join(meta[:8])}")
    if sharded := [key for key, tensor in tensors.items() if hasattr(tensor, "full_tensor")]:
        raise AdapterError(
            f"{len(sharded)} tensors are sharded (DTensor), and this process has a part of each only:"
            f" {', '.join(sharded[:8])}; gather them into an unsharded model first"
            " (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )


def _refuse_peft_model(model: nn.Module) -> None:
    for cls, name in first_of_each_class(model).items():
        if any(each.__module__.startswith("peft.") for each in cls.__mro__):
            raise AdapterError(
                f"{name or 'the model'} is PEFT's {cls.__name__}; load into the plain model"
                " (peft_model.unload() gives it back)"
            )
