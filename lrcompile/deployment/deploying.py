"""What becomes of adapters and weights when a model leaves: folded, kept beside, quantized, on the captured program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lrcompile.checkpointing.base_print import print_of
from lrcompile.deployment.swapping import GraphInput, Slots, Swappable
from lrcompile.errors import ExportError
from lrcompile.passes import deploy as pipelines
from lrcompile.passes.base import Pass, Program, Result
from lrcompile.passes.dequantize_nf4 import DTYPES
from lrcompile.passes.drop_unit_gains import DropUnitGains
from lrcompile.passes.drop_zero_adapters import DropZeroAdapters
from lrcompile.passes.expand_nf4 import ExpandNf4
from lrcompile.passes.expand_slots import ExpandSlots
from lrcompile.passes.merge_adapters import MergeAdapters
from lrcompile.passes.nodes import ADAPTERS, GAIN, GAINS, HADAMARD, adapted_sites, nf4_sites, site_of
from lrcompile.passes.tensors import Tensors
from lrcompile.state import state_of

FORMS = ("auto", "merge", "inline", "inputs")


@dataclass(frozen=True)
class Plan:
    """The checked arguments of an export that say what to do with adapters and weights."""

    adapters: str = "auto"
    into: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.adapters not in FORMS:
            raise ExportError(f"adapters={self.adapters!r}: choose one of {', '.join(map(repr, FORMS))}")
        if self.into is not None and self.into not in DTYPES:
            raise ExportError(f"into={self.into!r}: choose one of {', '.join(map(repr, DTYPES))}")
        if self.quantize not in (None, "nf4"):
            raise ExportError(f"quantize={self.quantize!r}: 'nf4' is the format there is")
        if self.into is not None and self.adapters == "inputs":
            raise ExportError(f"into={self.into!r} says what a merge makes of weights; adapters='inputs' folds nothing")


@dataclass(frozen=True)
class Deployed:
    """What was done to a program."""

    program: Program
    pipeline: str
    adapters: dict[str, Any]
    nf4: list[str]
    stored: torch.dtype | None = None
    """The dtype of weights that a merge dequantized."""
    inputs: tuple[GraphInput, ...] = ()
    """What adapters are given through when the graph runs."""
    swappable: tuple[Swappable, ...] = ()
    """Those there are."""


@dataclass
class _Sites:
    """Callback of the pipeline: what sites hold before a later pass spells it out in plain operations."""

    trained: list[str] = field(default_factory=list)
    """With an adapter that does something; an update of zero and a gain of one are in every weight already."""
    nf4: list[str] = field(default_factory=list)

    def __call__(self, each: Pass, program: Program) -> Callable[[Result], None]:
        def after(_: Result) -> None:
            if each.name in (DropZeroAdapters.name, DropUnitGains.name):
                self.trained = adapted_sites(program.exported)
            if each.name != ExpandNf4.name:
                self.nf4 = nf4_sites(program.exported)

        return after


def deploy(
    exported: ExportedProgram, model: nn.Module, plan: Plan, *, keep_nf4: bool, slots: Slots | None = None
) -> Deployed:
    """Run the deploy pipeline that `plan` asks for. `model` is only asked which of its parts are heads and routers.
    With adapters="inputs" the program was captured with `slots` in place of its adapters.

    Raises ExportError when a merge was asked for that cannot be done; "auto" keeps such adapters beside their weight.
    """
    if slots is not None:
        return _deploy_slots(exported, slots, plan)
    _refuse_broken(exported)
    stored, sites = nf4_sites(exported), adapted_sites(exported)
    form = _form(plan, stored)
    on_nf4 = [site for site in sites if site in stored] if form == "merge" else []
    if on_nf4 and plan.into is None:
        raise ExportError(
            f"adapters='merge' on weights stored as NF4 ({on_nf4[0]}{', …' if len(on_nf4) > 1 else ''}): rounding "
            "back to NF4 would erase a small update. Keep the pair beside the base with adapters='inline' (exact, the "
            "default), or give into='float32' or into='bfloat16' to dequantize and fold"
        )
    if plan.quantize and form == "inline":
        _refuse_readers(exported)
    pipeline = pipelines.deploy(form, into=plan.into, quantize=plan.quantize is not None, keep_nf4=keep_nf4)
    program = Program(exported, model)
    seen = _Sites()
    steps = {step.spec: step.result for step in pipeline.run(program, seen)}
    kept = (
        dict.fromkeys(seen.trained, "kept beside the weight")
        if form == "inline"
        else _kept(steps.get(MergeAdapters.name))
    )
    if kept and plan.adapters == "merge":
        reasons = "; ".join(f"{site}: {reason}" for site, reason in kept.items())
        raise ExportError(f"adapters='merge' cannot fold {reasons}. Use adapters='inline', which keeps every pair")
    if plan.quantize and not seen.nf4:
        raise ExportError("quantize='nf4': the model has no linear map that can be stored so")
    folded = [site for site in sites if site not in kept]
    adapters = {"form": form, "folded": folded, "inline": kept}
    return Deployed(program, str(pipeline), adapters, seen.nf4, DTYPES.get(plan.into or ""))


def _refuse_broken(exported: ExportedProgram) -> None:
    """An adapter whose training diverged would turn every weight it is folded into, and every output, into NaN."""
    tensors = Tensors(exported)
    for node in exported.graph.nodes:
        if node.target in ADAPTERS + GAINS:
            own = node.args[2:4] if node.target in ADAPTERS else node.args[1:2]
            factors = [tensors.value(each) for each in own]
            if not all(factor is None or bool(torch.isfinite(factor).all()) for factor in factors):
                raise ExportError(
                    f"the adapter at {site_of(node, tensors)} holds NaN or infinite values: its training diverged;"
                    " load an earlier checkpoint, or lrcompile.remove it"
                )


def _refuse_readers(exported: ExportedProgram) -> None:
    """An adapter that is a function of the weight cannot stay as it is beside another weight."""
    tensors = Tensors(exported)
    for node in exported.graph.nodes:
        read = node.args[5] if node.target is HADAMARD else node.args[1] if node.target is GAIN else None
        if any("lrcompile_adapters." not in name for name in _read(read, tensors)):
            raise ExportError(
                f"quantize='nf4' beside an inline adapter: the one at {site_of(node, tensors)} is a function of the"
                " weight that would be quantized. Give adapters='merge', which folds it before the weight is quantized"
            )


def _read(node: Any, tensors: Tensors) -> set[str]:
    """The names of the held tensors that a node is computed from."""
    if not isinstance(node, fx.Node):
        return set()
    if (name := tensors.target(node)) is not None:
        return {name}
    return {name for each in node.all_input_nodes for name in _read(each, tensors)}


def _form(plan: Plan, stored: list[str]) -> Literal["merge", "inline"]:
    if stored and plan.quantize:
        raise ExportError(
            f"quantize={plan.quantize!r}: NF4 weights are in the model already ({stored[0]}, …); leave it out"
        )
    inline = plan.adapters == "inline" or (plan.adapters == "auto" and bool(stored or plan.quantize))
    if plan.into is not None and (inline or not stored):
        raise ExportError(
            f"into={plan.into!r} says what a merge makes of NF4 weights; here adapters={plan.adapters!r} and there are "
            f"{'NF4' if stored else 'no NF4'} weights. Leave it out"
        )
    return "inline" if inline else "merge"


def _kept(merge: Result | None) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in merge.refusals} if merge is not None else {}


def _deploy_slots(exported: ExportedProgram, slots: Slots, plan: Plan) -> Deployed:
    """Raises ExportError for a site that cannot be given an adapter, and for a weight to be quantized that one replaces
    or is a function of.
    """
    if plan.quantize:
        _form(plan, nf4_sites(exported))  # refuses what is quantized already
        if readers := slots.reads_weights:
            raise ExportError(
                f"quantize='nf4' beside adapter {readers[0]!r}, whose gains are a function of the weights that would be"
                " quantized. Quantize the model first, lrcompile.quantize(model, 'nf4'), or give adapters='merge'"
            )
    pipeline = pipelines.deploy_slots(quantize=plan.quantize is not None)
    program = Program(exported, slots.model)
    steps = pipeline.run(program)
    refusals = [refusal for step in steps for refusal in step.result.refusals if step.spec == ExpandSlots.name]
    if refusals:
        reasons = "; ".join(f"{refusal.node}: {refusal.reason}" for refusal in refusals)
        raise ExportError(f"adapters='inputs' cannot make an input of {reasons}")
    inputs, unread = slots.inputs(exported)
    stored = nf4_sites(exported)
    taken = {f"{site}.weight" for site in stored}
    if lost := [name for each in slots.adapters for name in each.parameters if plan.quantize and name in taken]:
        raise ExportError(
            f"quantize='nf4' would store {lost[0]}, which an adapter trained in full. Quantize the model first, without"
            f" it: lrcompile.quantize(model, 'nf4', exclude=[{lost[0].removesuffix('.weight')!r}])"
        )
    adapters = {
        "form": "inputs",
        "folded": [],
        "inline": {},
        "inputs": [each.to_dict() for each in inputs],
        "unread": list(unread),
        "base": print_of(slots.model, state_of(slots.model), tuple(slots.holds)),
        "files": {each.name: each.to_dict() for each in slots.adapters},
    }
    return Deployed(program, str(pipeline), adapters, stored, inputs=inputs, swappable=slots.adapters)
