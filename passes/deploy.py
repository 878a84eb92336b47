"""The deploy pipeline, from a captured program to what a runtime is given: read it top to bottom."""

from __future__ import annotations

from typing import Literal

from lrcompile.passes.base import Pass
from lrcompile.passes.dequantize_nf4 import DequantizeNf4
from lrcompile.passes.drop_unit_gains import DropUnitGains
from lrcompile.passes.drop_zero_adapters import DropZeroAdapters
from lrcompile.passes.expand_gains import ExpandGains
from lrcompile.passes.expand_hadamard import ExpandHadamard
from lrcompile.passes.expand_integers import ExpandIntegers
from lrcompile.passes.expand_lora import ExpandLora
from lrcompile.passes.expand_nf4 import ExpandNf4
from lrcompile.passes.expand_slots import ExpandSlots
from lrcompile.passes.fold_factors import FoldFactors
from lrcompile.passes.fold_gains import FoldGains
from lrcompile.passes.fold_scale import FoldScale
from lrcompile.passes.fuse_input_gains import FuseInputGains
from lrcompile.passes.integer_inputs import IntegerInputs
from lrcompile.passes.integers_from_nf4 import IntegersFromNf4
from lrcompile.passes.merge_adapters import MergeAdapters
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.prune_ranks import PruneRanks
from lrcompile.passes.quantize_nf4 import QuantizeNf4


def deploy(
    adapters: Literal["merge", "inline"],
    *,
    into: str | None = None,
    quantize: bool = False,
    keep_nf4: bool = True,
    integers: IntegersFromNf4 | None = None,
) -> Pipeline:
    """The passes an export runs. `into`: what a merge makes of NF4 weights. `keep_nf4`: the runtime has an operator for
    NF4 codes and for integers, so they stay one node. `integers`: the approximation NF4 weights are written as.
    """
    none: tuple[Pass, ...] = ()
    return Pipeline(
        (
            # 1. adapters
            DropZeroAdapters(),
            FoldGains(),
            DropUnitGains(),
            FoldFactors(),
            PruneRanks(),
            *((DequantizeNf4(into),) if into is not None else none),
            *((MergeAdapters(),) if adapters == "merge" else none),
            FuseInputGains(),
            ExpandHadamard(),
            FoldScale(),
            # 2. storage of the weights
            *((QuantizeNf4(),) if quantize else none),
            *((integers,) if integers is not None else none),
            *((IntegerInputs(),) if integers is not None and integers.integer_inputs else none),
            # 3. out of the dialect
            ExpandGains(),
            ExpandLora(),
            *(none if keep_nf4 else (ExpandNf4(), ExpandIntegers())),
        )
    )


def deploy_slots(*, quantize: bool = False) -> Pipeline:
    """The passes of an export whose adapters come when it runs: nothing that stands in for them is folded."""
    none: tuple[Pass, ...] = ()
    return Pipeline((ExpandSlots(), FuseInputGains(), *((QuantizeNf4(),) if quantize else none)))
