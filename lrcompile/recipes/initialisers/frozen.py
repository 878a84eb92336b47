"""Where A stays as it starts, it cannot start at zero."""

from __future__ import annotations

import torch

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LoraAdapter


@torch.no_grad()
def draw_rows(adapter: LoraAdapter, start: Start) -> None:
    """At an embedding, whose pair starts with A = 0 elsewhere: A ~ N(0, 1), B = 0."""
    if start.site.form == "lookup":
        adapter.A.normal_(0, 1, generator=start.generator)
        adapter.B.zero_()
