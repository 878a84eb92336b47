"""What becomes of adapters and weights when a model leaves: folded, kept beside, quantized, on the captured program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lrcompile.checkpointing.base_print import print_of
from lrcompile.deployment.declaring import Declared, Examples
from lrcompile.deployment.erasing import refuse_erased
from lrcompile.deployment.swapping import GraphInput, Slots, Swappable
from lrcompile.errors import ExportError
from lrcompile.passes import deploy as pipelines
from lrcompile.passes.base import Pass, Program, Result
from lrcompile.passes.dequantize_nf4 import DTYPES
from lrcompile.passes.drop_unit_gains import DropUnitGains
from lrcompile.passes.drop_zero_adapters import DropZeroAdapters
from lrcompile.passes.expand_nf4 import ExpandNf4
from lrcompile.passes.expand_slots import ExpandSlots
from lrcompile.passes.integer_inputs import IntegerInputs
from lrcompile.passes.integers_from_nf4 import IntegersFromNf4
from lrcompile.passes.merge_adapters import MergeAdapters
from lrcompile.passes.nodes import ADAPTERS, GAIN, GAINS, HADAMARD, adapted_sites, integer_sites, nf4_sites, site_of
from lrcompile.passes.pipeline import chain
from lrcompile.passes.tensors import Tensors
from lrcompile.state import state_of
from lrcompile.verifying.requantized import requantized

FORMS = ("auto", "merge", "inline", "inputs")
NF4_FORMS: dict[str, IntegersFromNf4 | None] = {
    "exact": None,
    "portable": None,
    "int8": IntegersFromNf4(bits=8, block_size=64),
    "int8-rows": IntegersFromNf4(bits=8, block_size=0),
    "int4": IntegersFromNf4(bits=4, block_size=32),
}
"""How NF4 weights leave, and the approximation that is, if it is one."""


@dataclass(frozen=True)
class Plan:
    """The checked arguments of an export that say what to do with adapters and weights."""

    adapters: str = "auto"
    into: str | None = None
    quantize: str | None = None
    nf4_form: str = "exact"

    def __post_init__(self) -> None:
        if self.adapters not in FORMS:
            raise ExportError(f"adapters={self.adapters!r}: choose one of {', '.join(map(repr, FORMS))}")
        if self.into is not None and self.into not in DTYPES:
            raise ExportError(f"into={self.into!r}: choose one of {', '.join(map(repr, DTYPES))}")
        if self.quantize not in (None, "nf4"):
            raise ExportError(f"quantize={self.quantize!r}: 'nf4' is the format there is")
        if self.nf4_form not in NF4_FORMS:
            raise ExportError(f"nf4_form={self.nf4_form!r}: choose one of {', '.join(map(repr, NF4_FORMS))}")
        if self.adapters == "inputs" and NF4_FORMS[self.nf4_form] is not None:
            raise ExportError(
                f"nf4_form={self.nf4_form!r} is an approximation measured with the model's adapters, and"
                " adapters='inputs' leaves open which those are; choose 'exact' or 'portable'"
            )
        if self.into is not None and self.adapters == "inputs":
            raise ExportError(f"into={self.into!r} says what a merge makes of weights; adapters='inputs' folds nothing")


@dataclass(frozen=True)
class Deployed:
    """What was done to a program."""

    program: Program
    pipeline: str
    adapters: dict[str, Any]
    nf4: list[str]
    integers: list[str] = field(default_factory=list)
    """Linear maps whose weight was integers before."""
    stored: torch.dtype | None = None
    """The dtype of weights that a merge dequantized."""
    declared: Declared | None = None
    """What the form of the NF4 weights costs, where it is an approximation."""
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
    rewritten: bool = False
    """Are NF4 weights something else by now?"""

    def __call__(self, each: Pass, program: Program) -> Callable[[Result], None]:
        def after(_: Result) -> None:
            if each.name in (DropZeroAdapters.name, DropUnitGains.name):
                self.trained = adapted_sites(program.exported)
            self.rewritten |= each.name in (ExpandNf4.name, IntegersFromNf4.name)
            if not self.rewritten:
                self.nf4 = nf4_sites(program.exported)

        return after


def deploy(
    exported: ExportedProgram,
    model: nn.Module,
    plan: Plan,
    *,
    keep_nf4: bool,
    examples: Examples = ((), {}),
    slots: Slots | None = None,
) -> Deployed:
    """Run the deploy pipeline that `plan` asks for. `model` is only asked which of its parts are heads and routers, and
    run on `examples` where NF4 weights leave in a form that is an approximation. With adapters="inputs" the program was
    captured with `slots` in place of its adapters.

    Raises ExportError when a merge was asked for that cannot be done; "auto" keeps such adapters beside their weight.
    Also, in either, for updates that rounding the folded weight would erase.
    """
    if slots is not None:
        return _deploy_slots(exported, slots, plan)
    _refuse_broken(exported)
    stored, sites, of_integers = nf4_sites(exported), adapted_sites(exported), integer_sites(exported)
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
    integers = NF4_FORMS[plan.nf4_form]
    pipeline = pipelines.deploy(
        form, into=plan.into, quantize=plan.quantize is not None, keep_nf4=keep_nf4, integers=integers
    )
    program = Program(exported, model)
    seen = _Sites()

    def reference() -> nn.Module:
        return requantized(model, seen.nf4, form == "merge") if plan.quantize else model

    declared = Declared((IntegersFromNf4.name, IntegerInputs.name), reference, examples)
    steps = {step.spec: step.result for step in pipeline.run(program, chain(seen, declared))}
    refuse_erased(program)
    kept = (
        dict.fromkeys(seen.trained, "kept beside the weight")
        if form == "inline"
        else _kept(steps.get(MergeAdapters.name))
    )
    _refuse_undone(plan, kept, seen.nf4, of_integers)
    folded = [site for site in sites if site not in kept]
    adapters = {"form": form, "folded": folded, "inline": kept}
    return Deployed(
        program=program,
        pipeline=str(pipeline),
        adapters=adapters,
        nf4=seen.nf4,
        integers=of_integers,
        stored=DTYPES.get(plan.into or ""),
        declared=declared if integers else None,
    )


def _refuse_undone(plan: Plan, kept: dict[str, str], nf4: list[str], of_integers: list[str]) -> None:
    """Refuse where something was asked for and there was nothing to do it to, or it could not be done everywhere."""
    if kept and plan.adapters == "merge":
        reasons = "; ".join(f"{site}: {reason}" for site, reason in kept.items())
        raise ExportError(f"adapters='merge' cannot fold {reasons}. Use adapters='inline', which keeps every pair")
    if plan.quantize and not nf4:
        raise ExportError("quantize='nf4': the model has no linear map that can be stored so")
    if plan.nf4_form != "exact" and not (nf4 or of_integers):
        raise ExportError(
            f"nf4_form={plan.nf4_form!r} says how quantized weights are written, and there are none: quantize the"
            " model, or give quantize='nf4'"
        )


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
    return Deployed(
        program, str(pipeline), adapters, stored, integer_sites(exported), inputs=inputs, swappable=slots.adapters
    )
