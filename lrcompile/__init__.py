"""lrcompile: rewrite a model's linear maps into low-rank adapters, train, fold, quantize, export, and prove each step.

Importing this package imports nothing else; every public name is fetched when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Spec": "specs",
    "spec": "specs",
    "methods": "recipes",
    "apply": "adapting",
    "remove": "adapting",
    "disabled": "adapting",
    "activate": "adapting",
    "report": "reporting",
    "Report": "reporting",
    "optimizer": "optim",
    "LoraRite": "optim",
    "compile": "compiling",
    "compile_step": "stepping",
    "aux_loss": "auxiliary",
    "merge": "merging",
    "unmerge": "merging",
    "to_lora": "converting",
    "Conversion": "converting",
    "quantize": "quantizing",
    "save_quantized": "quantized_folders",
    "load_quantized": "quantized_folders",
    "save": "checkpoints",
    "load": "checkpoints",
    "export": "exporting",
    "Export": "exporting",
    "run": "running",
    "Session": "running",
    "export_adapter": "swapping",
    "verify": "verification",
    "Verdict": "verification",
    "Limits": "verification",
    "LrcompileError": "errors",
    "SpecError": "errors",
    "TargetError": "errors",
    "AdapterError": "errors",
    "ModelError": "errors",
    "MergeError": "errors",
    "ExportError": "errors",
    "VerificationError": "errors",
    "MissingDependencyError": "errors",
}
_MODULES = ("golden", "kernels", "passes")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"lrcompile.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lrcompile.{name}")
    else:
        raise AttributeError(f"module 'lrcompile' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from lrcompile import golden as golden
    from lrcompile import passes as passes
    from lrcompile.adapting import activate as activate
    from lrcompile.adapting import apply as apply
    from lrcompile.adapting import disabled as disabled
    from lrcompile.adapting import remove as remove
    from lrcompile.auxiliary import aux_loss as aux_loss
    from lrcompile.checkpoints import load as load
    from lrcompile.checkpoints import save as save
    from lrcompile.compiling import compile as compile
    from lrcompile.converting import Conversion as Conversion
    from lrcompile.converting import to_lora as to_lora
    from lrcompile.errors import AdapterError as AdapterError
    from lrcompile.errors import ExportError as ExportError
    from lrcompile.errors import LrcompileError as LrcompileError
    from lrcompile.errors import MergeError as MergeError
    from lrcompile.errors import MissingDependencyError as MissingDependencyError
    from lrcompile.errors import ModelError as ModelError
    from lrcompile.errors import SpecError as SpecError
    from lrcompile.errors import TargetError as TargetError
    from lrcompile.errors import VerificationError as VerificationError
    from lrcompile.exporting import Export as Export
    from lrcompile.exporting import export as export
    from lrcompile.merging import merge as merge
    from lrcompile.merging import unmerge as unmerge
    from lrcompile.optim import LoraRite as LoraRite
    from lrcompile.optim import optimizer as optimizer
    from lrcompile.quantized_folders import load_quantized as load_quantized
    from lrcompile.quantized_folders import save_quantized as save_quantized
    from lrcompile.quantizing import quantize as quantize
    from lrcompile.recipes import methods as methods
    from lrcompile.reporting import Report as Report
    from lrcompile.reporting import report as report
    from lrcompile.running import Session as Session
    from lrcompile.running import run as run
    from lrcompile.specs import Spec as Spec
    from lrcompile.specs import spec as spec
    from lrcompile.stepping import compile_step as compile_step
    from lrcompile.swapping import export_adapter as export_adapter
    from lrcompile.verification import Limits as Limits
    from lrcompile.verification import Verdict as Verdict
    from lrcompile.verification import verify as verify
