"""A method's auxiliary loss is in the model's `.loss` once, whoever trains it; a step without it is an error."""

from __future__ import annotations

import copy
import dataclasses
import io
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import AdapterError
from lrcompile.state import adapter_set, state_of

FIELDS: dict[str, Any] = {"rank": 4, "target_rank": 2, "total_steps": 6, "tinit": 1, "tfinal": 2, "seed": 0}
Tuple = namedtuple("Tuple", ["loss", "y"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: Tensor | None
    y: Tensor


class Model(nn.Module):
    def __init__(self, kind: Any = dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.kind = nn.Linear(7, 11), nn.Linear(11, 5), kind
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Tensor | None = None) -> Any:
        y = self.down(torch.tanh(self.up(x)))
        loss = None if labels is None else (y.sum(-1) - labels).square().mean()
        return self.kind(loss=loss, y=y)


def spec(**fields: Any) -> lrcompile.Spec:
    return lrcompile.spec("adalora", **FIELDS | fields)


def adapted(model: Any = None, name: str = "default", **fields: Any) -> Any:
    return lrcompile.apply(Model() if model is None else model, spec(**fields), name=name).train()


def adapters(model: nn.Module, name: str = "default") -> list[Any]:
    return [adapter_set(model, site)[name] for site in state_of(model).sites[name]]


def defect(rows: Tensor) -> float:
    rows = rows.detach()
    return float((rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype)).square().sum().sqrt())


def batch(number: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(6, 7, generator=g, dtype=torch.float64),
        "labels": torch.randn(6, generator=g, dtype=torch.float64),
    }


def filled(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


# ---- what it is


def test_it_is_the_mean_of_the_norms_of_what_A_and_B_lack_of_being_orthonormal():
    model = filled(adapted(orth_weight=0.3))
    norms = [defect(rows) for adapter in adapters(model) for rows in (adapter.A, adapter.B.mT)]
    assert lrcompile.aux_loss(model).item() == pytest.approx(0.3 * sum(norms) / 4, rel=1e-12)


def test_every_map_of_a_stack_has_factors_of_its_own():
    from lrcompile.recipes.forms.adalora import TripletAdapter
    from lrcompile.recipes.losses.orthogonality import orthogonality

    stack = TripletAdapter(7, 5, 3, 1.0, copies=2, dtype=torch.float64)
    filled(stack)
    norms = [defect(rows) for i in range(2) for rows in (stack.A[i], stack.B[i].mT)]
    assert float(orthogonality([stack], spec(orth_weight=1))) == pytest.approx(sum(norms) / 4, rel=1e-12)


def test_its_gradient_is_that_of_finite_differences_and_finite_for_orthonormal_factors():
    model = filled(adapted())
    (first, _) = adapters(model)
    lrcompile.aux_loss(model).backward()
    before, step = first.A.grad[1, 2].item(), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            first.A[1, 2] += sign * step
        values.append(float(lrcompile.aux_loss(model)))
        with torch.no_grad():
            first.A[1, 2] -= sign * step
    assert before == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    with torch.no_grad():
        first.A.copy_(torch.eye(4, 7))
    first.A.grad = None
    lrcompile.aux_loss(model).backward()
    assert torch.isfinite(first.A.grad).all()


def test_it_is_zero_in_evaluation_for_inactive_for_frozen_adapters_and_for_methods_without_one():
    model = adapted()
    assert lrcompile.aux_loss(model) > 0
    assert lrcompile.aux_loss(model.eval()) == 0
    model.train()
    lrcompile.activate(model, [])
    assert lrcompile.aux_loss(model) == 0
    lrcompile.activate(model, "default", train=[])
    assert lrcompile.aux_loss(model) == 0
    assert lrcompile.aux_loss(lrcompile.apply(Model(), lrcompile.spec("lora", rank=2))) == 0


def test_several_adapters_add_up():
    model = adapted(orth_weight=0.3)
    one = float(lrcompile.aux_loss(model))
    adapted(model, "second", orth_weight=0.5, seed=1)
    two = float(lrcompile.aux_loss(model))
    lrcompile.activate(model, ["default", "second"], train=["default", "second"])
    assert float(lrcompile.aux_loss(model)) == pytest.approx(one + two, rel=1e-6)


def test_it_is_computed_in_full_precision_under_autocast():
    model = filled(adapted()).float()
    plain = lrcompile.aux_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lrcompile.aux_loss(model), plain)


def test_a_wrapped_model_has_it_and_a_model_without_adapter_is_refused():
    model = adapted()
    assert torch.equal(lrcompile.aux_loss(nn.ModuleDict({"inner": model})), lrcompile.aux_loss(model))
    with pytest.raises(AdapterError, match=r"lrcompile\.apply"):
        lrcompile.aux_loss(nn.Linear(2, 2))


# ---- how it gets into the loss


def losses(model: Any) -> tuple[float, float]:
    """What the output says the loss is, and what it would be alone."""
    kind = model.kind
    out = model(**batch())
    given = float(out["loss"] if isinstance(out, dict) else out.loss)
    bare = Model(kind)
    with torch.no_grad():
        alone = bare(**batch())
    return given, float(alone["loss"] if isinstance(alone, dict) else alone.loss)


@pytest.mark.parametrize("kind", [dict, Tuple, Frozen])
def test_it_is_added_to_the_loss_of_whatever_a_model_returns(kind):
    model = adapted(Model(kind))
    given, alone = losses(model)  # E is 0, so the adapter adds nothing else
    assert given == pytest.approx(alone + float(lrcompile.aux_loss(model)), rel=1e-6)
    given, alone = losses(model.eval())
    assert given == alone
    assert isinstance(model.train()(batch()["x"]), kind)  # no labels, no loss


def test_it_is_in_a_transformers_output_by_key_attribute_and_place():
    model = llama().train()
    ids = torch.arange(6).reshape(1, 6)
    out = model(input_ids=ids, labels=ids)
    bare = float(nn.functional.cross_entropy(out.logits[0, :-1].double(), ids[0, 1:]))
    expected = bare + float(lrcompile.aux_loss(model))
    assert float(out.loss) == float(out["loss"]) == float(out[0]) == pytest.approx(expected, rel=1e-6)


def test_an_output_whose_loss_cannot_be_replaced_is_refused():
    with pytest.raises(AdapterError, match="SimpleNamespace"):
        adapted(Model(SimpleNamespace))(**batch())


def test_the_hook_leaves_with_the_last_adapter_that_has_one():
    model = adapted()
    adapted(model, "second", seed=1)
    lrcompile.apply(model, lrcompile.spec("lora", rank=2), name="plain")
    assert len(model._forward_hooks) == 1
    lrcompile.remove(model, "default")
    assert len(model._forward_hooks) == 1
    lrcompile.remove(model, "second")
    assert not model._forward_hooks
    assert not model._forward_hooks_with_kwargs
    assert losses(model)[0] == losses(model)[1]


def test_copies_and_pickles_keep_it_and_can_be_rid_of_it(tmp_path):
    model = adapted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert losses(other) == losses(model)
        lrcompile.remove(other)
        assert not other._forward_hooks
    assert len(model._forward_hooks) == 1


def test_a_fresh_process_keeps_it_beside_hooks_of_its_own(tmp_path):
    torch.save(lrcompile.apply(nn.Sequential(nn.Linear(7, 5)), spec()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "model.register_forward_hook(lambda *_: None)\n"
        "assert len(model._forward_hooks) == 2, model._forward_hooks\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


def test_a_loaded_adapter_that_trains_has_it(tmp_path):
    model = adapted()
    lrcompile.save(model, tmp_path / "adapter")
    other = lrcompile.load(Model(), tmp_path / "adapter", trainable=True).train()
    assert losses(other) == losses(model)
    lrcompile.load(other, tmp_path / "adapter", trainable=True, replace=True)
    assert losses(other) == losses(model)


# ---- a step without it


def test_a_step_whose_loss_is_another_is_refused_until_it_is_added():
    model = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(**batch())["y"].sum().backward()  # the output has a loss, which is not the one that trains
    with pytest.raises(AdapterError, match=r"add lrcompile\.aux_loss\(model\)"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    (model(batch()["x"])["y"].sum() + lrcompile.aux_loss(model)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(batch()["x"])["y"].sum().backward()  # each step anew
    with pytest.raises(AdapterError, match="aux_loss"):
        optimizer.step()


def test_the_proof_that_apply_runs_is_no_training_step():
    model = lrcompile.apply(Model(), spec(), example_inputs=batch()).train()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    model(batch()["x"])["y"].sum().backward()
    with pytest.raises(AdapterError, match="aux_loss"):
        optimizer.step()


def test_a_weight_of_zero_asks_for_nothing():
    model = adapted(orth_weight=0)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(2):
        model(batch()["x"])["y"].sum().backward()
        optimizer.step()
    assert losses(adapted(orth_weight=0)) == losses(adapted(orth_weight=0).eval())


# ---- the same in every loop


def llama(**fields: Any) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    return lrcompile.apply(transformers.LlamaForCausalLM(config), spec(**fields))


STEPS, PIECES, ROWS = 6, 2, 2


def rows() -> list[dict[str, Tensor]]:
    """Sequences of which different numbers of tokens count."""
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(STEPS * PIECES * ROWS):
        ids = torch.randint(0, 37, (9,), generator=g)
        labels = ids.clone()
        labels[: i % 7] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


def whole_batches() -> list[dict[str, Tensor]]:
    """All rows of a step at once."""
    data, size = rows(), PIECES * ROWS
    steps = [data[i : i + size] for i in range(0, len(data), size)]
    return [{key: torch.stack([row[key] for row in step]) for key in step[0]} for step in steps]


def looped(model: Any, call: Any = None) -> tuple[dict[str, Tensor], list[int]]:
    optimizer = lrcompile.optimizer(model.train(), torch.optim.AdamW, lr=1e-2)
    counts = []
    for whole in whole_batches():
        optimizer.zero_grad()
        (model if call is None else call)(**whole).loss.backward()
        optimizer.step()
        counts.append(sum(int(adapter.E.count_nonzero()) for adapter in adapters(model)))
    return copy.deepcopy(model.state_dict()), counts


def close(one: dict[str, Tensor], two: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=0, atol=atol), (key, float((value - two[key]).abs().max()))


def by_trainer(
    model: Any, folder: Any, *, accepts: bool = True, saves: int = 0, resume: Any = None
) -> dict[str, Tensor]:
    transformers: Any = pytest.importorskip("transformers")
    data = rows()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=PIECES,
        num_train_epochs=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="steps" if saves else "no",
        save_steps=saves or 500,
        disable_tqdm=True,
    )
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = InOrder(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler))
    assert trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = accepts
    trainer.train(resume_from_checkpoint=resume)
    return copy.deepcopy(model.state_dict())


# Adam's step on a gradient near its eps of 1e-8 turns float32 rounding into 1e-4 of a step of 1e-2
ROUNDED = 1e-5


def test_a_trainer_that_accumulates_takes_the_steps_of_a_loop_over_whole_batches(tmp_path):
    expected, counts = looped(llama(orth_weight=0.5))
    model = llama(orth_weight=0.5)
    close(by_trainer(model, tmp_path), expected, ROUNDED)
    assert sum(int(adapter.E.count_nonzero()) for adapter in adapters(model)) == counts[-1] == 2 * 14


@pytest.mark.parametrize("stop", [2, 4])
def test_a_trainer_that_resumes_in_mid_schedule_continues_to_the_bit(stop, tmp_path):
    expected = by_trainer(llama(), tmp_path, saves=2)
    found = by_trainer(llama(), tmp_path / "again", resume=str(tmp_path / f"checkpoint-{stop}"))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_over_one_accumulated_step_the_loss_is_in_once(tmp_path):
    """With nothing else to learn, the first step's gradient is that of the loss itself, as often as it counts."""
    model = llama(orth_weight=0.5).train()
    data = rows()[: PIECES * ROWS]
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    for piece in (data[:ROWS], data[ROWS:]):
        inputs = {key: torch.stack([row[key] for row in piece]) for key in piece[0]}
        model(**inputs, num_items_in_batch=total).loss.backward()
    found = [adapter.A.grad.clone() for adapter in adapters(model)]  # E is 0: the model's own loss gives A nothing
    model.zero_grad()
    lrcompile.aux_loss(model).backward()
    for gradient, adapter in zip(found, adapters(model), strict=True):
        assert torch.allclose(gradient, adapter.A.grad, rtol=1e-5, atol=1e-8)


def test_a_trainer_that_divides_by_itself_gives_each_micro_batch_its_part(tmp_path):
    """Micro-batches weigh alike then, so it is compared with a loop that does the same."""
    model = llama(orth_weight=0.5).train()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for whole in whole_batches():
        optimizer.zero_grad()
        for i in range(PIECES):
            part = {key: value[i * ROWS : (i + 1) * ROWS] for key, value in whole.items()}
            (model(**part).loss / PIECES).backward()
        optimizer.step()
    close(by_trainer(llama(orth_weight=0.5), tmp_path, accepts=False), model.state_dict(), ROUNDED)


def test_models_that_do_not_shift_their_labels_are_counted_as_the_trainer_counts_them():
    model = adapted(Model()).train()
    inputs = batch()
    inputs["labels"][:2] = -100
    alone = float(Model()(**inputs)["loss"])
    out = model(**inputs, num_items_in_batch=torch.tensor(16))
    assert float(out["loss"]) == pytest.approx(alone + 4 / 16 * float(lrcompile.aux_loss(model)), rel=1e-6)


def test_gradient_checkpointing_changes_nothing():
    expected, _ = looped(llama())
    model = llama()
    model.gradient_checkpointing_enable()
    found, _ = looped(model)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_compiled_model_trains_the_same_without_recompiling():
    expected, counts = looped(llama())
    torch._dynamo.reset()
    model = llama()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, again = looped(model, compiled)
    torch._dynamo.reset()
    assert counts == again
    close(found, expected, ROUNDED)
