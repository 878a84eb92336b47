"""`export`: a model as one deployable file, its manifest beside it, and the proof that it computes the same."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lrcompile.deployment import decoding
from lrcompile.deployment.capture import Captured, Inputs, capture, deployable
from lrcompile.deployment.deploying import Deployed, Plan, deploy
from lrcompile.deployment.describing import fingerprint, limits, ports, versions
from lrcompile.deployment.swapping import slotted
from lrcompile.errors import ExportError, require
from lrcompile.links import followed
from lrcompile.progress import status
from lrcompile.verifying.manifest import SCHEMA
from lrcompile.verifying.replay import working_dtype
from lrcompile.wrapping import refuse_meta, refuse_wrapped

if TYPE_CHECKING:
    from lrcompile.verifying.verdict import Limits, Verdict

SUFFIXES = (".onnx", ".pt2")
_SESSION = {"graph_optimization_level": "all", "config": {"session.qdq_matmulnbits_accuracy_level": "0"}}


@dataclass(frozen=True)
class Export:
    """An exported model: where it is, what its manifest says, and the model it came from, to be held against it."""

    path: Path
    manifest: dict[str, Any]
    _model: nn.Module = field(repr=False, compare=False)
    _inputs: Any = field(repr=False, compare=False)

    def verify(self, inputs: Any = None, *, limits: Limits | None = None) -> Verdict:
        """max |y − y64| ≤ r·D: the file against float64 of the model, on `inputs` or else on the example inputs.

        `limits` default to those of the manifest, which has room for a declared approximation.
        For a copy that `quantize=` stored as NF4 the reference is the model with the same quantized weights, and the
        verdict's note says what these leave of an adapter's effect.
        """
        import lrcompile
        from lrcompile.verifying.requantized import requantized, taken_by_codes

        inputs = self._inputs if inputs is None else inputs
        model, note = self._model, None
        if self.manifest["quantize"]:
            model = requantized(model, self.manifest["nf4"], self.manifest["adapters"]["form"] == "merge")
            note = taken_by_codes(self._model, model, inputs)
        with deployable(model):
            verdict = lrcompile.verify(model, self.path, inputs, limits=limits)
        return verdict if note is None else replace(verdict, note="; ".join(filter(None, [verdict.note, note])))

    def for_genai(self, tokenizer: Any = None) -> Path:
        """Write `genai_config.json`, and the files of a `transformers` tokenizer, beside a decoder exported with
        `use_cache=True`: the folder is then one that `onnxruntime_genai.Model` loads. Returns the config's path.
        """
        from lrcompile.interop.genai import write

        return write(self.path, self.manifest, tokenizer)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    dynamic_shapes: Any = None,
    adapters: str = "auto",
    into: str | None = None,
    quantize: str | None = None,
    nf4_form: str = "exact",
    opset: int | None = None,
    use_cache: bool = False,
) -> Export:
    """Write y = model(example_inputs) as `path`: `.onnx` for ONNX Runtime, `.pt2` as an AOTInductor package.

    `example_inputs`: a dict (`model(**inputs)`) or a tuple (`model(*inputs)`); tensors are inputs of the file, anything
    else is a constant of it. `dynamic_shapes`: None lets dimension 0 of every tensor and dimension 1 of integer tensors
    vary, "static" freezes all, else `torch.export`'s form. `adapters`: "merge" folds W' = W + s·B·A, weight by weight
    while writing; "inline" keeps each pair beside its base; "auto" merges on a float base and keeps on a quantized
    one; "inputs" writes the base, and each adapter of the model as `<stem>.<adapter>.onnx_adapter` for ONNX Runtime's
    adapter API: per site A `[in, rank]` and s·B `[rank, out]` as inputs of the graph that have rank 0 as long as no
    adapter is active, gains that are then 1, and the base's values of what an adapter trained in full
    (`lrcompile.run` runs it, `lrcompile.export_adapter` adds to it). A fold that rounding to 16 bits would take more
    than half of an update in is refused, as `merge` refuses it. `into` ("float32", "bfloat16", "float16"):
    what a merge makes of NF4 weights. `quantize="nf4"` stores the linear maps of the exported copy as NF4. `opset`: 18
    to 25.

    `nf4_form`, how an `.onnx` file holds NF4 weights. "exact": their codes, for MatMulBnb4 (4.5 bits, slow on a CPU).
    "portable": the same in standard operators. "int8", "int4": approximations that MatMulNBits multiplies fast, the
    levels on an 8-bit grid (8.5 bits) or rounded once more to 4 bits (5 bits), inputs rounded to 8 bits (also those of
    maps that are integers already). "int8-rows": 8 bits with one scale a row, of weights and inputs, in standard
    operators: fastest on many rows, and coarser where inputs have outliers. What that changes is measured on the
    example inputs, and the manifest declares it as a limit that `verify` allows.

    `use_cache=True`, for causal language models of `transformers`: one graph for the prompt and for each token after
    it. Beside `input_ids`, `attention_mask [batch, past + sequence]` and `position_ids` (where the model takes them)
    it takes `past_key_values.{i}.key` and `.value [batch, heads, past, head size]`, and returns `logits` and
    `present.{i}.key` and `.value`; the past is empty for the prompt. `lrcompile.run` generates with it.

    The model is left exactly as it was. The file, its data file (weights beyond 64 KiB), adapters and
    `<stem>.manifest.json` (`<stem>.pt2.manifest.json`) appear only when complete and accepted by ONNX Runtime; after a
    failure or Ctrl-C the old ones are intact, and of a process that is killed `run` and `verify` find all of the old
    ones or all of the new. Adapters of an older model at `path` go with it.
    Raises ExportError (what cannot be captured, folded, lowered or written), MissingDependencyError.
    """
    path = _target(path)
    plan = Plan(adapters, into, quantize, nf4_form)
    if path.suffix == ".onnx":
        opset = _opset(opset)
    else:
        _refuse_onnx_only(path, plan, opset)
    refuse_wrapped(model, "export")
    refuse_meta(model, "export", ExportError)
    write = _write_onnx if path.suffix == ".onnx" else _write_package
    with slotted(model) if plan.adapters == "inputs" else nullcontext() as slots:  # a program's tensors are the model's
        with status(f"capturing {type(model).__name__}"):
            captured, generation = _captured(model, example_inputs, dynamic_shapes, use_cache)
            with decoding.decoding(model) if use_cache else nullcontext():  # as the captured examples call it
                keep = path.suffix == ".onnx"
                deployed = deploy(captured.program, model, plan, keep_nf4=keep, examples=captured.examples, slots=slots)
        manifest = _manifest(path, model, plan, captured, deployed) | ({"generation": generation} if generation else {})
        write(path, captured, deployed, manifest, opset)
    return Export(path, manifest, model, example_inputs)


def _target(given: str | os.PathLike[str]) -> Path:
    """Where the file goes, and all that belongs to it beside it."""
    path = followed(given)
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{os.fspath(given)!r} ends in {path.suffix!r}: the formats are {' and '.join(SUFFIXES)}")
    if path.is_symlink():
        raise ExportError(f"{os.fspath(given)!r} is a link to {os.path.realpath(path)!r}, no {path.suffix}; remove it")
    if not path.parent.is_dir():
        raise ExportError(f"the folder {os.fspath(path.parent)!r} does not exist; create it first")
    return path


def _opset(given: int | None) -> int:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "onnx")
    from lrcompile.interop.onnx_lowering import check_opset

    return check_opset(given)


def _refuse_onnx_only(path: Path, plan: Plan, opset: int | None) -> None:
    """Refuse arguments that mean nothing for a package."""
    if plan.nf4_form != "exact":
        raise ExportError(f"nf4_form={plan.nf4_form!r} is for .onnx; in {path.name} NF4 weights are decoded exactly")
    if plan.adapters == "inputs":
        raise ExportError(f"adapters='inputs' is for .onnx; {path.name} would have no inputs with defaults")
    if opset is not None:
        raise ExportError(f"opset={opset!r} is for .onnx; {path.name} is an AOTInductor package")


def _captured(model: nn.Module, inputs: Inputs, shapes: Any, use_cache: bool) -> tuple[Captured, dict[str, Any] | None]:
    """With a cache also what the manifest says about generating."""
    if not use_cache:
        return capture(model, inputs, shapes), None
    if shapes is not None:
        raise ExportError("use_cache=True: batch, sequence and past vary in a decoder; leave dynamic_shapes out")
    prompt = decoding.prompt_of(model, inputs)
    with deployable(model):
        given, varying = decoding.example(model, prompt)
        first = decoding.first_step(model, prompt)
    with decoding.decoding(model):
        captured = capture(model, given, varying, free=("batch", "sequence", "past"))
        return replace(captured, examples=((), first)), decoding.described(model, given)


def _manifest(path: Path, model: nn.Module, plan: Plan, captured: Captured, deployed: Deployed) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "format": path.suffix[1:],
        "versions": versions(),
        **ports(captured),
        "dimensions": {name: captured.limits.get(name) for name in dict.fromkeys(captured.dimensions.values())},
        "pipeline": deployed.pipeline,
        "adapters": deployed.adapters,
        "quantize": plan.quantize,
        "nf4": deployed.nf4,
        "integers": deployed.integers,
        **({"nf4_form": plan.nf4_form} if (deployed.nf4 or deployed.integers) and path.suffix == ".onnx" else {}),
        "base_sha256": fingerprint(model),
        **limits(bool(deployed.nf4), working_dtype(model, captured.examples), deployed.stored, deployed.declared),
    }


def _write_onnx(
    path: Path, captured: Captured, deployed: Deployed, manifest: dict[str, Any], opset: int | None
) -> None:
    from lrcompile.interop.onnx_adapters import Interface, file_name, write_adapter
    from lrcompile.interop.onnx_lowering import lower
    from lrcompile.interop.onnx_writing import write

    files = {}
    for name, entry in manifest["adapters"].get("files", {}).items():
        entry["file"] = file_name(path, name)
    for each in deployed.swappable:
        fitted = Interface.of(path, {**manifest, "sha256": {}}).fitted(each.tensors, f"adapter {each.name!r}")
        files[file_name(path, each.name)] = partial(write_adapter, tensors=fitted)
    with status(f"lowering to {path.name}"):
        portable = manifest.get("nf4_form") == "portable"
        lowered = lower(captured, deployed.program.pending, opset, deployed.inputs, portable_nf4=portable)
    manifest |= {"opset": lowered.opset_imports[""], "ir_version": lowered.ir_version, "session": _SESSION}
    write(lowered, path, _SESSION, manifest, files)


def _write_package(
    path: Path, captured: Captured, deployed: Deployed, manifest: dict[str, Any], opset: int | None
) -> None:
    from lrcompile.interop.aoti import write

    with status(f"compiling {path.name}"):
        write(deployed.program, path, manifest)
