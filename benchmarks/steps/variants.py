"""Everything a method's step is compared with: the frozen model, ours, PEFT's.

All in evaluation mode, since the base's own dropout would be in the adapters' columns otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

import lrcompile
from lrcompile.recipes.forms.galore import ProjectedGradient

RANK, ALPHA = 16, 32
METHODS = ("lora", "dora", "lora-fa", "vera", "qlora", "galore", "galore/16")
GALORE = {"galore": 4, "galore/16": 16}
"""What share of the width the rank is."""
GAP = 200
"""Steps between two projections of GaLore."""


@dataclass(frozen=True)
class Variant:
    name: str
    model: nn.Module
    beside: str
    """The variant whose step is the denominator."""
    compiled: Callable[[nn.Module, Any], Any] | None = None
    """(model, inner) to a compiled model; `inner` None is Inductor."""
    seldom: Callable[[], None] | None = None
    """Makes the next step one that does what is due every `gap` steps; `usual` makes it an ordinary one again."""
    usual: Callable[[], None] = lambda: None
    gap: int = 1


def spec(method: str, width: int) -> lrcompile.Spec:
    if method in GALORE:
        return lrcompile.spec("galore", rank=width // GALORE[method], update_proj_gap=GAP)
    if method == "vera":
        return lrcompile.spec("vera", rank=256, seed=0)
    return lrcompile.spec(method, rank=RANK, alpha=ALPHA)


def variants(model: nn.Module, method: str, width: int) -> tuple[list[Variant], dict[str, str]]:
    """The variants there are, and why others are not."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    beside = "full" if method in GALORE else "frozen"
    if method in GALORE:
        for module in frozen.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(True)
    ours = lrcompile.apply(copy.deepcopy(model), spec(method, width))
    names = [row.name for row in lrcompile.report(ours).sites if row.adapted]
    _fill(ours)
    found = [
        Variant(beside, frozen, beside),
        _renewing(Variant("ours", ours, beside)) if method in GALORE else Variant("ours", ours, beside),
        Variant(f"{beside} compiled", frozen, f"{beside} compiled", _stock),
        Variant("ours compiled", ours, f"{beside} compiled", _ours),
    ]
    missing: dict[str, str] = {}
    for label, own_dtype in (("PEFT", True), ("PEFT same dtype", False)):
        try:
            theirs = _peft(model, method, names, own_dtype)
        except (NotImplementedError, ImportError) as reason:
            missing[label] = str(reason)
            continue
        found.append(Variant(label, theirs, beside))
        if not own_dtype or next(model.parameters()).dtype == torch.float32:
            found.append(Variant(f"{label} compiled", theirs, f"{beside} compiled", _stock))
        if next(model.parameters()).dtype == torch.float32:
            missing["PEFT same dtype"] = "the base is float32, as PEFT's adapters are"
            break
    return [*found, *_on_a_gpu(model, method, names, missing)], missing


def _renewing(variant: Variant) -> Variant:
    """Every `GAP` steps P is found anew."""
    sites = [module for module in variant.model.modules() if isinstance(module, ProjectedGradient)]

    def due(step: int, anew: bool) -> None:
        for site in sites:
            site.schedule(step, anew=anew)

    return replace(variant, seldom=lambda: due(0, True), usual=lambda: due(-1, False), gap=GAP)


def _ours(model: nn.Module, inner: Any) -> Any:
    return lrcompile.compile(model, dynamic=False, options={} if inner is None else {"inner": inner})


def _stock(model: nn.Module, inner: Any) -> Any:
    return torch.compile(model, dynamic=False, backend="inductor" if inner is None else inner)


def _fill(model: nn.Module) -> None:
    """Factors that start at zero would leave half of the gradients zero."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith((".m", "magnitude_vector.weight", ".Z")):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def _peft(model: nn.Module, method: str, names: list[str], own_dtype: bool) -> nn.Module:
    if method in GALORE:
        raise NotImplementedError("PEFT has no GaLore; the denominator is full fine-tuning of the same layers")
    base: nn.Module = copy.deepcopy(model)
    if method == "qlora":
        _bitsandbytes(base, names)
    if method == "vera":
        config: Any = VeraConfig(r=256, target_modules=names)
    else:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=method == "dora")
    theirs = get_peft_model(base, config, autocast_adapter_dtype=own_dtype).eval()
    _fill(theirs)
    if method == "lora-fa":
        for name, p in theirs.named_parameters():
            if "lora_A" in name:
                p.requires_grad_(False)
    return theirs


def _bitsandbytes(model: nn.Module, names: list[str]) -> None:
    import bitsandbytes as bnb

    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        codes = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, quant_type="nf4"
        )
        codes.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=codes)
        if linear.bias is not None:
            codes.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, codes.to(linear.weight.device))


def _on_a_gpu(model: nn.Module, method: str, names: list[str], missing: dict[str, str]) -> Iterator[Variant]:
    """What only runs on a GPU. Unsloth replaces the loader and the model, so it cannot act on a module at hand."""
    missing["Unsloth"] = "it adapts only what its own loader made of a checkpoint, not a module"
    for label, method_of_it, make in (("Liger + PEFT", "lora", _liger), ("torchao NF4 + PEFT", "qlora", _torchao)):
        if method != method_of_it:
            continue
        if not torch.cuda.is_available():
            missing[label] = "there is no GPU"
            continue
        try:
            yield Variant(label, make(model, names), "frozen")
        except ImportError as error:
            missing[label] = f"not installed: {error}"


def _liger(model: nn.Module, names: list[str]) -> nn.Module:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    patched: Any = copy.deepcopy(model)
    _apply_liger_kernel_to_instance(model=patched.model)
    return _peft(patched, "lora", names, own_dtype=False)


def _torchao(model: nn.Module, names: list[str]) -> nn.Module:
    from torchao.dtypes.nf4tensor import linear_nf4, to_nf4

    class Nf4(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return linear_nf4(input, self.weight)

    base = copy.deepcopy(model)
    for name in names:
        linear: Any = base.get_submodule(name)
        linear.__class__ = Nf4
        linear.weight = nn.Parameter(to_nf4(linear.weight.data), requires_grad=False)
    return _peft(base, "lora", names, own_dtype=False)
