"""An NF4 model as a folder: its config as usual, and every tensor, codes included, in `nf4.safetensors` with
`nf4.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

from lrcompile.demo.sources import ModelError
from lrcompile.demo.tensors import fill

WEIGHTS = "nf4.safetensors"
CARD = "nf4.json"


def is_nf4_folder(folder: str | Path) -> bool:
    return (Path(folder) / CARD).is_file()


def save_nf4(folder: Path, model: nn.Module) -> None:
    """Write the state of a quantized `model` into the existing `folder`."""
    from safetensors.torch import save_file

    from lrcompile.quantizing import quantization_of

    done = quantization_of(model)
    if done is None:
        raise ModelError(f"this {type(model).__name__} is not quantized; call lrcompile.quantize first")
    if done.allocation is not None:
        raise ModelError("a folder holds NF4 alone, and this model was quantized within a budget; export it instead")
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    card = {
        "version": 1,
        "block_size": done.block_size,
        "double_quant": done.double_quant,
        "quantized": list(done.quantized),
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_nf4(folder: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` gives the plain model with any weights; its named maps become NF4 and every tensor is read from the
    folder.
    """
    import lrcompile

    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version, names = card["version"], [str(name) for name in card["quantized"]]
        options = {"block_size": card["block_size"], "double_quant": card["double_quant"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not the description of an NF4 model: {error!r}") from error
    if version != 1:
        raise ModelError(f"{path} has version {version!r}; this lrcompile reads version 1")
    model = build()
    lrcompile.quantize(model, "nf4", targets=names, **options)
    fill(model, Path(folder) / WEIGHTS)
    return model.eval()
