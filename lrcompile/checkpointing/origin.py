"""Is this model the base an adapter of ours was trained on? Matched and compared before anything else is believed."""

from __future__ import annotations

from torch import nn

from lrcompile import sites
from lrcompile.checkpointing import files as adapter_files
from lrcompile.checkpointing.base_print import differences, print_of
from lrcompile.checkpointing.files import Checkpoint
from lrcompile.errors import AdapterError
from lrcompile.matching import Matched, match
from lrcompile.nf4.modules import is_nf4
from lrcompile.recipes import recipe
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State
from lrcompile.walking import submodule
from lrcompile.wording import listed
from lrcompile.written import written_by


def origin_of(model: nn.Module, state: State, name: str) -> dict:
    """What is recorded of the base of adapter `name`; no bits of weights that it brings itself."""
    found = print_of(model, state, _told_by(model, state.sites[name]))
    written = set(written_by(model, name))
    for site in state.sites[name]:
        if site.parameter in written:
            found["sites"][site.name]["sha256"] = None
    return found


def matched_to_origin(
    model: nn.Module, state: State | None, spec: Spec, checkpoint: Checkpoint
) -> tuple[Matched, list[str]]:
    """What `spec` means here, and notes; `AdapterError` if this is another base than the recorded one."""
    assert checkpoint.base is not None
    recorded = checkpoint.base["sites"]
    codes = frozenset(name for name, site in recorded.items() if site["dtype"] == "nf4")
    matched = match(model, spec, allow_high_rank=True, known_codes=codes)
    _refuse_float_for_chosen_codes(model, spec, matched, codes, checkpoint)
    faults, notes = differences(checkpoint.base, model, state, _told_by(model, matched.hit))
    if faults:
        without = "" if checkpoint.own else f" (or remove {adapter_files.OURS} from the folder to go by shapes alone)"
        raise AdapterError(
            f"the adapter in {checkpoint.folder} is for another base than this {type(model).__name__}:"
            f" {'; '.join(faults)}. Load that base{without}"
        )
    return matched, notes


def _told_by(model: nn.Module, hit: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites whose weights tell the base: the adapted ones, all there are for a method that adds no tensors."""
    return hit or tuple(sites.find(model))


def _refuse_float_for_chosen_codes(
    model: nn.Module, spec: Spec, matched: Matched, codes: frozenset[str], checkpoint: Checkpoint
) -> None:
    """Codes that were chosen together with the factors are not those of W: quantizing it here would give others."""
    method = recipe(spec.method)
    if not (method.quantizes_base and method.nf4 is not None):
        return
    plain = [s.name for s in matched.hit if s.name in codes and not is_nf4(submodule(model, s.host))]
    if plain:
        raise AdapterError(
            f"the adapter in {checkpoint.folder} belongs to NF4 codes that {method.name} chose together with it, and"
            f" {listed(plain)} {'is' if len(plain) == 1 else 'are'} float here. Load it into the model that has those"
            " codes: lrcompile.quantize(model, 'nf4', ...) with the same block_size and double_quant, then"
            " model.load_state_dict of what the quantized base had (without adapters) before saving it"
        )
