"""verify: correct candidates hold with room to spare, wrong ones fail by far, and the verdict says where and why."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompile
from lrcompile.errors import VerificationError
from lrcompile.verification import verify
from lrcompile.verifying.runners import ModuleRunner
from lrcompile.verifying.verdict import Limits


class Int8Linear(nn.Module):
    """The activation path that fixed tolerances let through: per-row int8 inputs, exact weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return self.linear((x / step).round() * step)


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(x)
        return {"logits": y, "choice": y.argmax(-1)}


def off_by(module: nn.Module, name: str, amount: float) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[0] += amount
    return other


@pytest.mark.parametrize("size", [63, 1024])
def test_a_correct_float32_linear_stays_under_4_and_an_int8_path_fails_a_hundredfold(size: int) -> None:
    linear = nn.Linear(size, 37)
    inputs = (torch.randn(5, size),)
    right, wrong = verify(linear, linear, inputs), verify(linear, Int8Linear(linear), inputs)
    assert right.ok
    assert right.bound_ratio < 4
    assert not wrong.ok
    assert wrong.bound_ratio > 100 * Limits().bound_ratio


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(1, 65),
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(1e-6, 1e6),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_r_of_a_correct_linear_is_small_at_every_size_scale_and_dtype(
    i: int, o: int, n: int, scale: float, kind: str
) -> None:
    dtype = getattr(torch, kind)
    scale = 1.0 if dtype == torch.float16 else scale  # would leave float16's range
    linear = nn.Linear(i, o).to(dtype)
    verdict = verify(linear, linear, ((scale * torch.randn(n, i)).to(dtype),))
    assert verdict.ok
    assert verdict.dtype == kind
    assert verdict.bound_ratio < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_llama_is_well_inside_the_bound_and_a_wrong_weight_far_outside(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, vocab_size=101
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    inputs = {"input_ids": torch.randint(0, 101, (2, 13))}
    right = verify(model, model, inputs, outputs=["logits"])
    assert right.ok
    assert right.bound_ratio < 1.5
    assert right.outputs[0].kl is not None
    assert right.outputs[0].top1 is not None
    wrong = verify(model, off_by(model, "model.layers.1.mlp.down_proj.weight", 100.0), inputs)
    assert not wrong.ok
    assert wrong.first_divergence == "model.layers.1.mlp.down_proj"


def test_the_verdict_is_given_for_evaluation_mode_and_flags_are_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).train()
    assert verify(model, model, (torch.randn(3, 4),)).ok
    assert all(module.training for module in model.modules())


def test_a_model_that_keeps_count_is_judged_by_one_call_and_left_as_it_was() -> None:
    class Counts(nn.Module):
        calls: Tensor
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)
            for name in ("calls", "seen"):
                self.register_buffer(name, torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.seen + len(x)
            return self.fc(x) + self.calls + self.seen

    model = Counts()
    other, x = copy.deepcopy(model), (torch.randn(3, 6),)
    assert verify(model, other, x).ok
    with torch.no_grad():
        other.fc.weight.mul_(1.5)
    verdict = verify(model, other, x)  # counting on, float64 replays would differ by whole numbers: any weight would do
    assert not verdict.ok
    assert verdict.bound_ratio > 1e4
    assert [float(each) for each in (model.calls, model.seen, other.calls, other.seen)] == [0, 0, 0, 0]


def test_random_numbers_widen_no_bound_and_are_named_where_a_verdict_fails() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(nn.functional.dropout(x, 0.3, training=True))

    model = Noisy()
    other, x, state = copy.deepcopy(model), (torch.randn(3, 6),), torch.get_rng_state()
    with torch.no_grad():
        other.fc.weight.mul_(1.5)
    verdict = verify(model, other, x)
    assert not verdict.ok
    assert "draws random numbers" in str(verdict)
    assert torch.equal(torch.get_rng_state(), state)
    assert "draws" not in str(verify(model.fc, other.fc, x))


def test_inputs_are_cloned_and_two_names_for_one_tensor_stay_two_tensors() -> None:
    class Writes(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.add_(1) * b

    x = torch.randn(3)
    before = x.clone()
    verdict = verify(Writes(), Writes(), {"a": x, "b": x})
    assert verdict.ok
    assert torch.equal(x, before)
    assert ModuleRunner(Writes()).run({"a": x, "b": x})["output"].equal((x + 1) * x)


def test_several_input_sets_give_the_worst_of_each_number() -> None:
    linear = nn.Linear(4, 3)
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight[:, 0] += 1
    quiet = torch.randn(2, 4) * torch.tensor([0.0, 1, 1, 1])
    assert verify(linear, other, [(quiet,)]).ok
    assert not verify(linear, other, [(quiet,), (torch.ones(1, 4),)]).ok


def test_integers_are_compared_exactly() -> None:
    class Wrong(Logits):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = super().forward(x)
            return {**out, "choice": out["choice"] ^ 1}

    model = Logits()
    wrong = Wrong()
    wrong.load_state_dict(model.state_dict())
    inputs = (torch.randn(5, 6),)
    assert verify(model, model, inputs).outputs[1].mismatches == 0
    verdict = verify(model, wrong, inputs)
    assert not verdict.ok
    assert "choice: 5 of 5 integers differ" in verdict.failures[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities_must_stand_in_the_same_places(value: float) -> None:
    class Masked(nn.Module):
        def __init__(self, place: int, value: float):
            super().__init__()
            self.place, self.value = place, value

        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[self.place] = self.value
            return y

    inputs = (torch.randn(4),)
    assert verify(Masked(1, value), Masked(1, value), inputs).ok
    for other in (Masked(2, value), Masked(1, 0.0), Masked(1, -value if value == value else 1.0)):
        verdict = verify(Masked(1, value), other, inputs)
        assert not verdict.ok
        assert "NaN or infinity" in verdict.failures[0]


def test_a_wrong_shape_or_kind_is_a_failed_verdict_not_an_exception() -> None:
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).t()

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).int()

    for kind in (Transposed, Rounded):
        verdict = verify(nn.Linear(4, 3), kind(4, 3), (torch.randn(2, 4),))
        assert not verdict.ok
        assert "was expected" in verdict.failures[0]


def test_every_rung_reports_what_it_adds_and_the_first_wrong_one_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    wrong = off_by(model, "1.weight", 0.1)
    verdict = verify(model, {"same": model, "wrong": wrong, "still wrong": wrong}, (torch.randn(3, 8),))
    rungs = {rung.name: rung for rung in verdict.rungs}
    assert list(rungs) == ["float64", "eager", "same", "wrong", "still wrong"]
    assert rungs["same"].added_ratio == rungs["still wrong"].added_ratio == 0
    assert rungs["wrong"].added_ratio > 1000
    assert [failure.split(":")[0] for failure in verdict.failures] == ["wrong", "still wrong"]
    assert verdict.bound_ratio == rungs["wrong"].bound_ratio


def lora(rank: int = 3, size: float = 0.1, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 7)).to(dtype)
    lrcompile.apply(model, lrcompile.spec("lora", rank=rank, targets=["0", "2"], seed=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=size)
    return model


def test_an_erased_adapter_fails_on_its_own_effect_even_where_the_outputs_look_fine() -> None:
    model, inputs = lora(size=1e-7), (torch.randn(9, 40),)
    erased = copy.deepcopy(model)
    lrcompile.remove(erased)
    verdict = verify(model, erased, inputs)
    assert verdict.bound_ratio < Limits().bound_ratio, "the outputs look fine"
    assert not verdict.ok
    assert verdict.adapter_relative_error == pytest.approx(1, abs=0.3)
    assert "adapter's effect" in verdict.failures[0]


def test_a_correct_merge_keeps_the_effect_and_a_coarse_one_does_not() -> None:
    model, inputs = lora(size=0.01), (torch.randn(9, 40),)
    merged = copy.deepcopy(model)
    lrcompile.merge(merged)
    right = verify(model, merged, inputs)
    assert right.ok
    assert right.adapter_relative_error is not None
    assert right.effect_cosine is not None
    assert right.adapter_relative_error < 1e-3
    assert right.effect_cosine > 0.9999
    coarse = copy.deepcopy(merged)
    for parameter in coarse.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert not verify(model, coarse, inputs).ok


def test_a_merged_reference_is_measured_against_its_own_base() -> None:
    model, inputs = lora(), (torch.randn(9, 40),)
    unmerged = copy.deepcopy(model)
    lrcompile.merge(model)
    verdict = verify(model, unmerged, inputs)
    assert verdict.ok
    assert verdict.adapter_relative_error is not None
    assert verdict.adapter_relative_error < 1e-4


def test_base_gives_the_effect_where_the_reference_no_longer_knows_its_adapter() -> None:
    model, inputs = lora(), (torch.randn(9, 40),)
    base = lrcompile.remove(copy.deepcopy(model))
    lrcompile.merge(model, final=True)
    assert verify(model, model, inputs).adapter_relative_error is None
    assert verify(model, model, inputs, base=base).adapter_relative_error < 1e-4  # type: ignore[operator]
    lost = verify(model, base, inputs, base=base)
    assert lost.adapter_relative_error == pytest.approx(1, rel=1e-3)
    assert lost.effect_cosine == pytest.approx(0, abs=0.3)


def test_an_adapter_without_effect_has_no_relative_error() -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["0"]))
    assert verify(model, model, (torch.randn(2, 8),)).adapter_relative_error is None


@pytest.mark.parametrize(("size", "share"), [(1e-3, (0.05, 0.25)), (1.5e-4, (0.6, 9.0))])
def test_a_bfloat16_adapter_is_held_to_what_bfloat16_keeps_of_it_and_a_lost_one_always_fails(
    size: float, share: tuple[float, float]
) -> None:
    model, inputs = lora(size=size, dtype=torch.bfloat16), (torch.randn(9, 40).bfloat16(),)
    same = verify(model, copy.deepcopy(model), inputs)
    assert same.adapter_relative_error is not None
    assert share[0] < same.adapter_relative_error < share[1]
    assert same.ok == (share[1] < 0.5), "rounding that hides half of the effect proves nothing"
    erased = lrcompile.remove(copy.deepcopy(model))
    verdict = verify(model, erased, inputs)
    assert verdict.bound_ratio < 16
    assert not verdict.ok


def test_an_nf4_model_is_judged_by_the_mathematics_of_its_codes() -> None:
    model = lrcompile.quantize(nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9)), "nf4")
    inputs = (torch.randn(4, 70),)
    verdict = verify(model, model, inputs)
    assert verdict.ok
    assert verdict.bound_ratio < 4
    swapped = copy.deepcopy(model)
    codes = swapped.get_buffer("0.weight_codes")
    codes.copy_((codes >> 4) | (codes << 4))
    assert not verify(model, swapped, inputs).ok


def test_a_declared_quantization_error_is_allowed_and_no_more() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    near = off_by(model, "0.weight", 0.01)
    inputs = (torch.randn(6, 64),)
    relative = verify(model, near, inputs).outputs[0].relative_error
    assert relative is not None
    assert verify(model, near, inputs, limits=Limits(declared_error=1.1 * relative)).ok
    assert not verify(model, near, inputs, limits=Limits(declared_error=0.9 * relative)).ok


def test_limits_on_kl_and_top1_decide() -> None:
    model, inputs = Logits(), (torch.randn(50, 6),)
    near, loose = off_by(model, "head.weight", 0.5), {"bound_ratio": 1e9}
    assert verify(model, near, inputs, outputs=["logits"], limits=Limits(**loose)).ok
    assert not verify(model, near, inputs, outputs=["logits"], limits=Limits(**loose, kl=1e-9)).ok
    off = off_by(model, "head.bias", 5.0)
    assert not verify(model, off, inputs, outputs=["logits"], limits=Limits(**loose, top1=0.99)).ok


def test_an_exported_program_and_a_graph_are_candidates() -> None:
    model, inputs = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (torch.randn(3, 6),)
    program = torch.export.export(model, inputs)
    for candidate in (program, program.module(), torch.fx.symbolic_trace(model)):
        assert verify(model, candidate, inputs).ok


def test_a_reference_may_be_an_exported_graph_that_asserts_its_casts() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32).exp().to(x.dtype) * 2

    graph = torch.export.export(Casts(), (torch.randn(3).bfloat16(),)).module()
    assert verify(graph, Casts(), (torch.randn(3).bfloat16(),)).ok


@pytest.mark.slow
def test_a_compiled_package_is_a_candidate(tmp_path: Any) -> None:
    model, inputs = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (torch.randn(3, 6),)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(model, inputs), package_path=path)
    verdict = verify(model, path, inputs)
    assert verdict.ok
    assert verdict.session["model.pt2"]["runtime"] == "aotinductor"
    other = copy.deepcopy(model)
    other.get_parameter("2.weight").data.mul_(2)
    wrong = verify(other, path, inputs)
    assert not wrong.ok
    assert wrong.first_divergence == "2"
    assert "with the reference's 2.weight in its place, model.pt2 holds" in str(wrong.note)


def test_outputs_the_candidate_lacks_are_an_error_unless_left_out_and_a_cache_is_listed() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"y": y, "z": y + 1}

    class Cached(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x), "past_key_values": [(x, x)]}

    class One(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x)}

    two, cached, one, inputs = Two(3, 2), Cached(3, 2), One(3, 2), (torch.randn(2, 3),)
    two.load_state_dict(one.state_dict())
    cached.load_state_dict(one.state_dict())
    with pytest.raises(VerificationError, match=r"outputs=\["):
        verify(two, one, inputs)
    assert verify(two, one, inputs, outputs=["y"]).ok
    verdict = verify(cached, one, inputs)
    assert verdict.ok
    assert verdict.uncompared == ("past_key_values.0.0", "past_key_values.0.1")
    assert "not compared: past_key_values.0.0" in str(verdict)


def test_the_verdict_prints_a_table_and_becomes_json() -> None:
    model = Logits()
    verdict = verify(model, off_by(model, "head.weight", float("inf")), (torch.randn(2, 6),), outputs=["logits"])
    text = str(verdict)
    assert "DOES NOT HOLD" in text
    assert "head" in text
    again = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert again["ok"] is False
    assert {"bound_ratio", "adapter_relative_error", "effect_cosine", "first_divergence", "rungs", "limits"} <= set(
        again
    )
    assert bool(verdict) is False


@pytest.mark.parametrize(
    ("candidate", "inputs", "message"),
    [
        ("nowhere.onnx", (torch.ones(1, 3),), "there is no file"),
        (42, (torch.ones(1, 3),), "not int"),
        (nn.Linear(3, 2), torch.ones(1, 3), r"given as \(x,\)"),
        (nn.Linear(3, 2), [], "empty list"),
        ({}, (torch.ones(1, 3),), "mapping of candidates is empty"),
    ],
)
def test_what_cannot_be_compared_is_a_typed_error_with_the_remedy(candidate: Any, inputs: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify(nn.Linear(3, 2), candidate, inputs)


@pytest.mark.parametrize(
    "bad", [{"bound_ratio": -1}, {"bound_ratio": float("nan")}, {"kl": "x"}, {"adapter_relative_error": None}]
)
def test_limits_refuse_what_is_no_limit(bad: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match=next(iter(bad))):
        Limits(**bad)


def test_a_file_of_unknown_kind_or_no_package_is_refused(tmp_path: Any) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    package = tmp_path / "model.pt2"
    package.write_bytes(b"PK\x03\x04 truncated")
    for path, message in ((other, "ends in .onnx or .pt2"), (package, "truncated")):
        with pytest.raises(VerificationError, match=message):
            verify(nn.Linear(3, 2), path, (torch.ones(1, 3),))


def test_inputs_the_model_cannot_take_and_limits_of_another_type_are_verification_errors():
    model = nn.Embedding(5, 3)
    with pytest.raises(VerificationError, match="Embedding cannot be run on these inputs: IndexError"):
        lrcompile.verify(model, model, (torch.tensor([7]),))
    with pytest.raises(VerificationError, match="limits must be"):
        lrcompile.verify(model, model, (torch.tensor([1]),), limits=16)  # type: ignore[arg-type]


def test_a_reference_of_nan_alone_compares_nothing_and_does_not_hold():
    broken = nn.Linear(5, 7)
    nn.init.constant_(broken.weight, float("nan"))
    verdict = lrcompile.verify(broken, broken, (torch.randn(2, 5),))
    assert not verdict.ok
    assert "nothing to compare" in str(verdict)
