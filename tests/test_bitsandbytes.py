"""Models that bitsandbytes holds in 4 bits: taken over with the codes they have, by apply, load and quantize."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError, SpecError, TargetError
from lrcompile.nf4.modules import codes_of, is_nf4, layout_of, nf4_weight

bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")


def held(weight: torch.Tensor, double: bool) -> Any:
    out_features, in_features = weight.shape
    module = bitsandbytes.nn.Linear4bit(in_features, out_features, quant_type="nf4", compress_statistics=double)
    module.load_state_dict({"weight": weight, "bias": torch.zeros(out_features)})
    return module.to("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder: Path, kind: str = "nf4", double: bool = True, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (32, 128), (30, 6), (7, 9), (260, 64)])
def test_codes_and_maxima_are_taken_over_to_the_bit_whatever_the_shape(shape: tuple[int, int], double: bool):
    torch.manual_seed(0)
    module = held(torch.randn(shape), double)
    model = nn.Sequential(module)
    state, packed = module.weight.quant_state, module.weight.data.clone()
    maxima = (
        bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        if double
        else state.absmax
    )
    lrcompile.quantize(model)
    codes = codes_of(module)
    assert torch.equal(codes.codes, packed.flatten())
    assert (codes.absmax_scale is not None) is double
    blocks = nf4_weight(module).flatten().split(64)  # the largest element of a block is its maximum, ±1 in the book
    assert torch.equal(torch.stack([block.abs().amax() for block in blocks]), maxima)


@pytest.mark.parametrize("double", [False, True])
def test_a_model_as_it_comes_computes_the_same_with_the_same_weights(folder: Path, double: bool):
    model = opened(folder, double=double)
    theirs = {
        name: bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64 == 0
    }
    lrcompile.quantize(model)
    assert theirs
    for name, weight in theirs.items():
        assert torch.equal(nf4_weight(model.get_submodule(name)), weight), name
    assert not is_nf4(model.lm_head)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if is_nf4(module):
            plain.get_submodule(name).weight.data.copy_(nf4_weight(module))
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_an_adapter_trains_on_it_and_nothing_is_quantized_again(folder: Path, method: str):
    model = opened(folder)
    codes = {
        name: module.weight.data.flatten().clone()
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    lrcompile.apply(model, lrcompile.spec(method, rank=4))
    report = str(lrcompile.report(model))
    assert "14 weights were bitsandbytes' Linear4bit" in report.replace("\n", " ")
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits.detach()
    for _ in range(2):
        model(ids).logits.square().mean().backward()
        optimizer.step()
    assert not torch.equal(model(ids).logits, before)
    for name, theirs in codes.items():
        assert torch.equal(codes_of(model.get_submodule(name)).codes, theirs)


def test_the_trainer_takes_the_adapted_model_and_it_can_be_cast(folder: Path, tmp_path: Path):
    model = lrcompile.apply(opened(folder), lrcompile.spec("lora", rank=2))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    ids = torch.arange(8)
    data = [{"input_ids": ids, "labels": ids}] * 4
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    model.to(torch.bfloat16)
    assert model(ids[None]).logits.dtype == torch.bfloat16


def test_an_adapter_trained_here_is_loaded_onto_a_fresh_copy_to_the_bit(folder: Path, tmp_path: Path):
    model = lrcompile.apply(opened(folder), lrcompile.spec("lora", rank=2, seed=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    lrcompile.save(model, tmp_path / "adapter")
    fresh = lrcompile.load(opened(folder), tmp_path / "adapter")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_what_was_told_to_stay_float_stays_and_can_be_named(folder: Path):
    model: Any = lrcompile.quantize(opened(folder, llm_int8_skip_modules=["down_proj", "lm_head"]))
    assert not is_nf4(model.model.layers[0].mlp.down_proj)
    assert is_nf4(model.model.layers[0].mlp.up_proj)
    model = lrcompile.quantize(opened(folder, llm_int8_skip_modules=["down_proj", "lm_head"]), targets=["down_proj"])
    assert is_nf4(model.model.layers[0].mlp.down_proj)
    assert is_nf4(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("kind", ["fp4", "packed", "unquantized"])
def test_what_cannot_be_taken_over_is_refused_by_name_with_the_reason(folder: Path, kind: str):
    if kind == "fp4":
        model, match = opened(folder, "fp4"), "bnb_4bit_quant_type='nf4'"
    elif kind == "packed":
        model, match = opened(folder), "before its first forward"
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.weight.quant_state.packing_format_for_cpu = True
    else:
        model, match = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")), "not quantized yet"
    classes = [type(module) for module in model.modules()]
    for call in (
        lambda: lrcompile.quantize(model),
        lambda: lrcompile.apply(model, lrcompile.spec("lora", rank=2)),
    ):
        with pytest.raises(TargetError, match=match):
            call()
    assert [type(module) for module in model.modules()] == classes


def test_what_fails_afterwards_leaves_the_model_of_bitsandbytes_as_it_was(folder: Path, tmp_path: Path):
    model = opened(folder)
    model.train()  # in evaluation bitsandbytes packs the weights anew
    twin = copy.deepcopy(model)
    ids = torch.arange(12).view(2, 6)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(SpecError):
        lrcompile.apply(model, lrcompile.spec("lora", rank=4, targets=["q_proj", "no_such"]))
    with pytest.raises(AdapterError):
        lrcompile.load(model, tmp_path)
    with pytest.raises(TargetError):
        lrcompile.quantize(model, targets=["no_such"])
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert model.is_quantized
    assert model.config.quantization_config
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert torch.equal(model(ids).logits, twin(ids).logits)


def test_the_compute_dtype_is_the_one_the_model_was_loaded_with(folder: Path):
    model: Any = lrcompile.quantize(opened(folder))
    layout = layout_of(model.model.layers[0].mlp.up_proj)
    assert (layout.compute_dtype, layout.dtype, layout.block_size) == (torch.float32, torch.float32, 64)
