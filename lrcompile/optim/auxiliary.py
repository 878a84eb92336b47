"""A step to which the auxiliary loss did not contribute is an error, not another method."""

from __future__ import annotations

import torch

from lrcompile.auxiliary import aux_loss
from lrcompile.errors import AdapterError
from lrcompile.optim.rule import Rule, Step
from lrcompile.state import state_of


class Contributed(Rule):
    """Between two steps a backward pass went through the model's auxiliary loss, unless it is none."""

    def before_step(self, step: Step) -> None:
        state = state_of(self.model)
        used, state.aux_used = state.aux_used, False
        if used:
            return
        with torch.enable_grad():
            wanted = aux_loss(self.model).requires_grad
        if wanted:
            raise AdapterError(
                f"the auxiliary loss of {self.spec.method} did not contribute to this step: the loss is not the"
                " model's own .loss, so add lrcompile.aux_loss(model) to it"
            )
