"""The training pipeline, from the graph Dynamo captured to what an inner compiler is given: read it top to bottom."""

from __future__ import annotations

from lrcompile.passes.group_by_input import GroupByInput
from lrcompile.passes.hoist_constants import HoistConstants
from lrcompile.passes.lower_experts import LowerExperts
from lrcompile.passes.lower_gains import LowerGains
from lrcompile.passes.order_contractions import OrderContractions
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.replay_dropout import ReplayDropout
from lrcompile.passes.stack_adapters import StackAdapters


def train() -> Pipeline:
    """The passes that the backend runs on every graph and on every body in it."""
    return Pipeline(
        (
            HoistConstants(),
            StackAdapters(),
            ReplayDropout(),
            LowerExperts(),
            LowerGains(),
            GroupByInput(),
            OrderContractions(),
        )
    )
