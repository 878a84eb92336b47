"""The check that hangs on a pipeline: every pass keeps the promise of its equivalence class, or the run stops with a
repro.

exact: outputs equal (−0 = 0, NaN = NaN). reassociation, cast: r = max |y − y64| / D at most 16 (see
`lrcompile.verify`), times how much coarser the dtype is that a cast rounds weights to. approximate: the error of every
changed tensor within what the pass states. A pass that says it changed nothing is held to `exact`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.errors import VerificationError
from lrcompile.passes.base import Pass, Program, Result
from lrcompile.verification import verify
from lrcompile.verifying.intermediates import run_graph
from lrcompile.verifying.outputs import Inputs, call, copied, named_outputs
from lrcompile.verifying.replay import unit_roundoff, working_dtype
from lrcompile.verifying.runners import evaluating
from lrcompile.verifying.verdict import Limits, Verdict


@dataclass
class Check:
    """Callback for `Pipeline.run`: runs `inputs` before and after each pass. `verdicts` collects the numbers by
    pass.
    """

    inputs: Inputs
    repro: Path | None = None
    """Folder for the program a broken pass was given; None: no file is written."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def __call__(self, each: Pass, program: Program) -> Callable[[Result], None]:
        before = program.module()

        def after(result: Result) -> None:
            now = program.module()
            change = self._first_change(each, before, now)
            if each.preserves == "exact" or not result.modified:
                if change is not None:
                    raise VerificationError(self._message(each, before, *change))
                return
            if each.preserves == "approximate":
                self._errors(each, before, result)
            limits = Limits(bound_ratio=Limits.bound_ratio * self._coarser(each, before, program))
            verdict = self.verdicts[str(each)] = verify(before, now, self.inputs, limits=limits, locate=False)
            if not verdict.ok and each.preserves != "approximate":
                verdict = verify(before, now, self.inputs, limits=limits, locate=True)
                where = verdict.first_divergence or (change[1] if change else "an output")
                raise VerificationError(self._message(each, before, str(verdict), where))

        return after

    def _coarser(self, each: Pass, before: nn.Module, program: Program) -> float:
        """How much larger one rounding of a weight still to be written is than one of the model's arithmetic."""
        if each.preserves != "cast":
            return 1.0
        own = unit_roundoff(working_dtype(before, self.inputs))
        return max([own, *(unit_roundoff(weight.dtype) for weight in program.pending.values())]) / own

    def _errors(self, each: Pass, before: nn.Module, result: Result) -> None:
        """The error is stated for tensors; what of it reaches an output depends on the model and is recorded only."""
        worst = max(result.errors, key=lambda name: result.errors[name], default="no tensor named")
        error = result.errors.get(worst, float("inf"))
        if not error <= each.tolerance:
            what = f"its error there is {error:.3g}, stated {each.tolerance:g}"
            raise VerificationError(self._message(each, before, what, worst))

    def _first_change(self, each: Pass, before: nn.Module, now: nn.Module) -> tuple[str, str] | None:
        """What changed and at which node first, or None if every output is the same."""
        try:
            was, is_now = (named_outputs(self._run(module)) for module in (before, now))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise VerificationError(self._message(each, before, f"it does not run: {error}", "no node")) from error
        if was.keys() != is_now.keys():
            return f"the outputs were {', '.join(was)} and are {', '.join(is_now)}", "the outputs"
        for name, value in was.items():
            if not _equal(value, is_now[name]):
                return f"output {name} {_change(value, is_now[name])}", self._first_node(before, now) or name
        return None

    def _run(self, module: nn.Module) -> Any:
        with torch.no_grad(), evaluating(module):
            return call(module, copied(self.inputs))

    def _first_node(self, before: nn.Module, now: nn.Module) -> str | None:
        """The first node that both programs have and that is another value now."""
        if not isinstance(before, fx.GraphModule) or not isinstance(now, fx.GraphModule):
            return None
        names = {node.name: f"%{node.name}" for node in before.graph.nodes if node.op == "call_function"}
        with torch.no_grad():
            was, is_now = (run_graph(module, copied(self.inputs), names) for module in (before, now))
        return next((name for name, value in was.items() if name in is_now and not _equal(value, is_now[name])), None)

    def _message(self, each: Pass, before: nn.Module, what: str, where: str) -> str:
        claim = f"pass {each} claims to be {each.preserves} and is not, first at {where}: {what}"
        if self.repro is None:
            return claim
        self.repro.mkdir(parents=True, exist_ok=True)
        path = self.repro / f"{each.name}.pt2"
        args, kwargs = (self.inputs, {}) if isinstance(self.inputs, tuple) else ((), dict(self.inputs))
        with evaluating(before):
            torch.export.save(torch.export.export(before, args, kwargs, strict=False), path)
        read = f"import lrcompile.passes.nodes (for its operators), then torch.export.load({os.fspath(path)!r})"
        return f"{claim}\nThe program it was given, with these inputs: {read}"


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _change(one: Tensor, other: Tensor) -> str:
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"was {one.dtype} {tuple(one.shape)} and is {other.dtype} {tuple(other.shape)}"
    return f"changed by up to {float((one.double() - other.double()).abs().max()):.3g}"
