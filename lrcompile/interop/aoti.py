"""AOTInductor packages: the program decomposed to aten, its weights computed, compiled for this machine's CPU."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch._inductor.package import package_aoti
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR
from torch.utils import _pytree as pytree

from lrcompile.deployment.capture import leaf_names
from lrcompile.deployment.exchanging import exchanging
from lrcompile.errors import ExportError
from lrcompile.interop import paging
from lrcompile.passes.base import Program
from lrcompile.verifying.manifest import sha256


def write(program: Program, path: Path, manifest: dict[str, Any]) -> None:
    """Write `path` and its manifest.

    In memory are the model's own weights all the time, and beside them one folded weight while it is computed. All that
    is as large as the weights lies in files of a hidden folder beside `path`, which is gone afterwards: the folded
    weights, the constants as Inductor collects them, and the library they are appended to, which is then copied into
    the package piece by piece. Pages of these files are resident while they are copied, twice the weights at most,
    and given up when memory is short; on the disk it takes three times the weights until the package is written.

    Raises ExportError when Inductor cannot compile the program (it needs a C++ compiler) or a file cannot be written.
    """
    with exchanging(path) as exchange:
        temporary = exchange.model()
        _write_package(program, path.name, temporary)
        manifest["sha256"] = {path.name: sha256(temporary)}
        exchange.commit(manifest)


def _write_package(program: Program, name: str, target: Path) -> None:
    with _workplace(target) as folder:
        try:
            files = _compile(program, folder)
        except RuntimeError as error:
            raise ExportError(
                f"Inductor could not compile {name}: {error}\n.onnx is the other supported format"
            ) from error
        _pack(files, target)


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A hidden folder on the disk of `target`, by a name without blanks: Inductor does not quote what it hands to the
    compiler.
    """
    with (
        TemporaryDirectory(prefix=f"{target.stem}.", dir=target.parent) as folder,
        TemporaryDirectory() as elsewhere,
    ):
        link = Path(elsewhere, "lrcompile")
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _compile(program: Program, folder: Path) -> list[str]:
    """The files of the compiled program, all in `folder`."""
    state = program.exported.state_dict
    # All places before the first weight is computed: made in between, they keep its memory from serving the next.
    places = {name: paging.empty_like(state[name], folder, weight.dtype) for name, weight in program.pending.items()}
    program.compute(places)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
        _free_views(program.exported.graph_module)
        lowered = program.exported.run_decompositions()
    _return_plain(lowered)
    _own_storages(lowered, folder)
    args, kwargs = lowered.example_inputs
    options = {
        "aot_inductor.package": True,
        "aot_inductor.output_path": os.fspath(folder),
        # Weights at the end of the library, mapped when it is loaded: compiled into it, as is the default, they pass
        # through the assembler, which takes their size in memory once more.
        "aot_inductor.force_mmap_weights": True,
    }
    with paging.paged_constants(folder):
        files = torch._inductor.aot_compile(lowered.module(check_guards=False), args, kwargs, options=options)
    assert isinstance(files, list)  # that is what "package" asks for
    return [file for file in files if isinstance(file, str)]


def _pack(files: list[str], target: Path) -> None:
    """One archive of all files; torch packs all but the libraries, which it would read into memory whole."""
    libraries = [file for file in files if file.endswith(".so")]
    package_aoti(os.fspath(target), [file for file in files if file not in libraries])
    with zipfile.ZipFile(target, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        for library in libraries:
            archive.write(library, f"{root}/{AOTINDUCTOR_DIR}model/{Path(library).name}")


def _own_storages(lowered: ExportedProgram, folder: Path) -> None:
    """Make every tensor that the program never changes a parameter of it with a storage of its own. Inductor copies
    each buffer first, since it might be changed, and writes the whole storage of each tensor, whatever part it is.
    """
    signature, state, copies = lowered.graph_signature, lowered.state_dict, {}
    changed = set(signature.buffers_to_mutate.values())
    for spec in signature.input_specs:
        if spec.target not in state or spec.target in changed:
            continue
        tensor = state[spec.target].detach()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)  # what is tied stays tied
            if place not in copies:
                copies[place] = paging.empty_like(tensor, folder).copy_(tensor)
            tensor = copies[place]
        spec.kind, spec.persistent = InputKind.PARAMETER, None
        state[spec.target] = nn.Parameter(tensor, requires_grad=False)


def _free_views(module: torch.fx.GraphModule) -> None:
    """view → reshape, the same wherever a view is possible. Decomposing changes how attention's output lies in memory,
    and views of it that were captured as possible (GPT-2's) need not be any more.
    """
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                if node.target is torch.ops.aten.view.default:
                    node.target = torch.ops.aten.reshape.default
            part.recompile()


def _return_plain(lowered: ExportedProgram) -> None:
    """A package hands its outputs over in classes that whoever loads it must have imported (`transformers`'
    ModelOutputs); a plain dict by name instead needs nothing but torch.
    """
    signature = lowered.module_call_graph[0].signature
    if signature is not None and not _is_plain(signature.out_spec):
        signature.out_spec = pytree.tree_structure(dict.fromkeys(leaf_names(signature.out_spec), 0))


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.is_leaf() or (spec.type in (dict, list, tuple) and all(map(_is_plain, spec.children())))
