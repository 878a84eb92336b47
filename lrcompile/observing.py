"""What a model puts out on a user's data, to be held against what it puts out once it is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import fitted, run, taken
from lrcompile.progress import shown
from lrcompile.undisturbed import set_mode, undisturbed
from lrcompile.verifying.outputs import named_outputs
from lrcompile.watching import kept_tokens

_CACHE = "past_key_values"


class Observed:
    """A model and batches of its data. `SpecError` and `AdapterError` for batches that it does not take."""

    def __init__(self, model: nn.Module, data: Iterable[Any]):
        self.model = model
        self.batches = [fitted(model, each, index) for index, each in enumerate(taken(data, None, "calibration data"))]

    def outputs(self, label: str = "running the data") -> Iterator[Tensor]:
        """Of each batch all floating outputs in evaluation mode, as vectors on the host, in their own dtype.

        Padding does not count (of a batch with an `attention_mask` only the tokens it keeps), nor does a key-value
        cache, which says of the layers what the other outputs say of the model.
        """
        with undisturbed(self.model, 0):
            set_mode(self.model, False)
            for index, batch in enumerate(shown(self.batches, label, len(self.batches))):
                kept = kept_tokens(batch)
                with torch.no_grad():  # of what runs here, not of whoever takes the outputs
                    found = named_outputs(run(self.model, batch, index))
                for name, value in found.items():
                    if value.is_floating_point() and not name.startswith(_CACHE):
                        counts = kept is not None and value.shape[: kept.dim()] == kept.shape
                        yield (value[kept] if counts else value).detach().cpu().flatten()
