"""AOTInductor packages: the program decomposed to aten, its weights computed, compiled for this machine's CPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lrcompile.deployment.capture import leaf_names
from lrcompile.deployment.exchanging import exchanging
from lrcompile.errors import ExportError
from lrcompile.passes.base import Program
from lrcompile.verifying.manifest import sha256

# Weights at the end of the library, mapped when it is loaded: compiled into it, as is the default, they pass through
# the assembler, which takes their size in memory once more.
_CONFIG = {"aot_inductor.force_mmap_weights": True}


def write(program: Program, path: Path, manifest: dict[str, Any]) -> None:
    """Write `path` and its manifest. Unlike ONNX, a package is compiled from the weights: beside the model's own, those
    that are folded and all as they are written are in memory at once, three times their size in all.

    Raises ExportError when Inductor cannot compile the program (it needs a C++ compiler) or a file cannot be written.
    """
    program.compute()
    with exchanging(path) as exchange:
        temporary = exchange.model()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
                _free_views(program.exported.graph_module)
                lowered = program.exported.run_decompositions()
            _return_plain(lowered)
            torch._inductor.aoti_compile_and_package(
                lowered, package_path=os.fspath(temporary), inductor_configs=_CONFIG
            )
        except RuntimeError as error:
            raise ExportError(
                f"Inductor could not compile {path.name}: {error}\n.onnx is the other supported format"
            ) from error
        manifest["sha256"] = {path.name: sha256(temporary)}
        exchange.commit(manifest)


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


def _return_plain(lowered: torch.export.ExportedProgram) -> None:
    """A package hands its outputs over in classes that whoever loads it must have imported (`transformers`'
    ModelOutputs); a plain dict by name instead needs nothing but torch.
    """
    signature = lowered.module_call_graph[0].signature
    if signature is not None and not _is_plain(signature.out_spec):
        signature.out_spec = pytree.tree_structure(dict.fromkeys(leaf_names(signature.out_spec), 0))


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.is_leaf() or (spec.type in (dict, list, tuple) and all(map(_is_plain, spec.children())))
