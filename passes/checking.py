"""The check that hangs on a pipeline: every pass keeps the promise of its equivalence class, or the run stops with a
repro.

exact: outputs equal to the bit. reassociation, cast: r = max |y − y64| / D at most 16 (see `lrcompile.verify`).
approximate: the error of every changed tensor within what the pass states. A pass that says it changed nothing is held
to `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompile.errors import VerificationError
from lrcompile.outputs import call, named_outputs
from lrcompile.passes.base import Pass, Program, Result
from lrcompile.verdict import Verdict
from lrcompile.verification import verify


@dataclass
class Check:
    """Callback for `Pipeline.run`: runs `inputs` before and after each pass. `verdicts` collects the numbers by
    pass.
    """

    inputs: Any
    repro: Path | None = None
    """Folder for the program a broken pass was given; None: no file is written."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def __call__(self, each: Pass, program: Program) -> Callable[[Result], None]:
        before = program.module()

        def after(result: Result) -> None:
            now = program.module()
            if each.preserves == "exact" or not result.modified:
                self._bits(each, before, now)
                return
            if each.preserves == "approximate":
                self._errors(each, before, result)
            verdict = self.verdicts[str(each)] = verify(before, now, self.inputs, locate=False)
            if not verdict.ok and each.preserves != "approximate":
                verdict = verify(before, now, self.inputs, locate=True)
                raise VerificationError(self._message(each, before, str(verdict), str(verdict.first_divergence)))

        return after

    def _errors(self, each: Pass, before: nn.Module, result: Result) -> None:
        """The error is stated for tensors; what of it reaches an output depends on the model and is recorded only."""
        worst = max(result.errors, key=lambda name: result.errors[name], default="no tensor named")
        error = result.errors.get(worst, float("inf"))
        if not error <= each.tolerance:
            what = f"its error there is {error:.3g}, stated {each.tolerance:g}"
            raise VerificationError(self._message(each, before, what, worst))

    def _bits(self, each: Pass, before: nn.Module, now: nn.Module) -> None:
        with torch.no_grad():
            was, is_now = (named_outputs(call(module, self.inputs)) for module in (before, now))
        for name, value in was.items():
            if not torch.equal(value, is_now[name]):
                worst = float((value.double() - is_now[name].double()).abs().max())
                raise VerificationError(
                    self._message(each, before, f"output {name} changed by up to {worst:.3g}", name)
                )

    def _message(self, each: Pass, before: nn.Module, what: str, where: str) -> str:
        claim = f"pass {each} claims to be {each.preserves} and is not, first at {where}: {what}"
        if self.repro is None:
            return claim
        self.repro.mkdir(parents=True, exist_ok=True)
        path = self.repro / f"{each.name}.pt2"
        args, kwargs = (self.inputs, {}) if isinstance(self.inputs, tuple) else ((), dict(self.inputs))
        torch.export.save(torch.export.export(before, args, kwargs, strict=False), path)
        return f"{claim}\nThe program it was given, with these inputs, is {path}: import lrcompile, torch.export.load"
