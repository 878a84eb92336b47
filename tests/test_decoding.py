"""A decoder with its cache in and out: one graph that generates what the model generates, token for token."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import ExportError, VerificationError
from lrcompile.deployment.decoding import PAST, decoding, positions, prompt_of, steps
from lrcompile.verifying.outputs import named_outputs, named_tensors

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

VOCAB, NEW = 97, 64
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_TOKENS, **_SIZES, num_key_value_heads=4),
    "gpt2": lambda: transformers.GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    # the window is shorter than a prompt, so the masking of what lies outside it is on the way
    "mistral": lambda: transformers.MistralConfig(**_TOKENS, **_SIZES, num_key_value_heads=2, sliding_window=5),
    # its table of masks bounds past and sequence together
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        max_position_embeddings=96,
        window_size=5,
        attention_types=[[["global", "local"], 1]],
    ),
    # rotates queries and keys as complex numbers, and attends in chunks shorter than the answer
    "llama4": lambda: transformers.Llama4TextConfig(
        **_TOKENS,
        **_SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=16,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_TOKENS, **_SIZES, num_key_value_heads=2, num_local_experts=4),
}


def decoder(family: str, *, adapted: bool = True) -> Any:
    """Weights so wide that the likeliest token is ahead by far more than rounding, and hardly ever the same twice."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "gate.weight" not in name:
            nn.init.normal_(weight, std=0.3)
    if adapted:
        lrcompile.apply(model, lrcompile.spec("lora", rank=3))
        for name, weight in model.named_parameters():
            if "lrcompile_adapters" in name and name.endswith(".B"):
                nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def prompts(seed: int, rows: int = 3, length: int = 9) -> dict[str, Any]:
    """Of different lengths, padded on the left."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(model: Any, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**prompt, do_sample=False, **{"max_new_tokens": NEW, **options})


def endless(model: Any) -> Any:
    """`generate` then has no token to stop at."""
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def onnx_of(tmp_path_factory) -> Any:
    """A family's model, adapter included, and its export; each family once."""
    made: dict[str, Any] = {}

    def of(family: str) -> Any:
        if family not in made:
            model, path = endless(decoder(family)), tmp_path_factory.mktemp(family) / "m.onnx"
            ids = {"input_ids": prompts(0)["input_ids"]}
            made[family] = model, lrcompile.export(model, path, ids, use_cache=True)
        return made[family]

    return of


SLOW = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=SLOW) for name in CONFIGS if name != "llama")])
def test_onnx_runtime_generates_the_models_own_tokens(onnx_of, family):
    model, exported = onnx_of(family)
    session = lrcompile.run(exported.path)
    for seed in (1, 2):
        prompt = prompts(seed)
        expected = greedy(model, prompt)
        assert expected.shape == (3, 9 + NEW)
        assert len(expected[:, 9:].unique()) > 10  # not one token over and over, which any broken cache would match
        assert torch.equal(session.generate(**prompt, max_new_tokens=NEW), expected)
    alone = {"input_ids": prompts(3)["input_ids"][:1, :1]}
    assert torch.equal(session.generate(**alone, max_new_tokens=NEW), greedy(model, alone))


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "nf4"},
        pytest.param({"adapters": "inline"}, marks=SLOW),
        pytest.param({"quantize": "nf4", "nf4_form": "int8"}, marks=SLOW),
        pytest.param({"quantize": "nf4", "nf4_form": "int8", "adapters": "merge"}, marks=SLOW),
        pytest.param({"quantize": "nf4", "adapters": "merge"}, marks=SLOW),
        pytest.param({"opset": 23}, marks=SLOW),
        pytest.param({"opset": 18}, marks=SLOW),
    ],
    ids=str,
)
def test_every_form_verifies_prompt_and_next_token_with_its_cache(tmp_path, options):
    model = decoder("llama")
    before = copy.deepcopy(model.config.to_dict()), type(model), dict(model.__dict__)
    exported = lrcompile.export(model, tmp_path / "m.onnx", prompts(0), use_cache=True, **options)
    verdict = exported.verify()
    assert verdict.ok, verdict
    error = verdict.adapter_relative_error
    assert error is None or error < (0.5 if "nf4_form" in options else 1e-5)
    assert (model.config.to_dict(), type(model), model.__dict__.keys()) == (before[0], before[1], before[2].keys())
    session = lrcompile.run(exported.path)
    if "quantize" not in options:
        assert torch.equal(session.generate(**prompts(1)), greedy(model, prompts(1)))


@pytest.fixture
def llama(onnx_of) -> Any:
    return onnx_of("llama")


def test_the_file_has_the_names_that_runners_of_decoders_read(llama):
    _, exported = llama
    ports = {port["name"]: port["shape"] for port in exported.manifest["inputs"] + exported.manifest["outputs"]}
    halves = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert ports == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past + sequence"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{half}": ["batch", 4, "past", 8] for half in halves},
        "logits": ["batch", "sequence", VOCAB],
        **{f"present.{half}": ["batch", 4, "past + sequence", 8] for half in halves},
    }
    session = lrcompile.run(exported.path)
    assert session.generation is not None
    assert session.generation["layers"] == 2
    assert session.generation["pad_token_id"] == 0


def test_a_past_takes_several_tokens_at_once_too(llama):
    model, exported = llama
    session, prompt = lrcompile.run(exported.path), prompt_of(model, prompts(1))
    whole, _ = steps(model, prompt)
    at_once = session(whole)
    head = {name: value[:, :4] for name, value in prompt.items()}
    first = session({**head, PAST: whole[PAST]})
    past = {f"{PAST}.{half}": first[f"present.{half}"] for half in ("0.key", "0.value", "1.key", "1.value")}
    rest = {name: value[:, 4:] for name, value in prompt.items()} | {"attention_mask": prompt["attention_mask"]}
    second = session({**rest, **past})
    for name, value in second.items():
        expected = at_once[name][:, 4:] if name == "logits" else at_once[name]
        assert float((value - expected).abs().max()) <= 64 * 2**-24 * float(expected.abs().max()), name


def test_a_wrong_cache_does_not_verify(tmp_path, llama):
    """The proof looks at the cache: here each key is one position too far on."""
    import onnx

    model, exported = llama
    graph = onnx.load(exported.path)
    node = next(node for node in graph.graph.node if "present.0.key" in node.output)
    node.output[0] = "grown"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1.001], np.float32), "drift"))
    graph.graph.node.append(onnx.helper.make_node("Mul", ["grown", "drift"], ["present.0.key"]))
    for other in graph.graph.node[:-1]:
        for index, name in enumerate(other.input):
            if name == "present.0.key":
                other.input[index] = "grown"
    path = tmp_path / "wrong.onnx"
    onnx.save(graph, path)
    path.with_suffix(".manifest.json").write_text(
        exported.path.with_suffix(".manifest.json").read_text().replace("sha256", "no_hashes")
    )
    verdict = lrcompile.verify(model, path, prompts(1))
    assert not verdict.ok
    assert "present.0.key" in str(verdict)
    assert "output logits: r" not in str(verdict)  # the next token is given the right keys


def test_verify_by_hand_takes_a_plain_prompt(llama):
    model, exported = llama
    verdict = lrcompile.verify(model, exported.path, prompts(5))
    assert verdict.ok, verdict
    assert {row.name for row in verdict.outputs} == {"logits"} | {
        f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")
    }
    with pytest.raises(VerificationError, match=r"reference must take one.*no past_key_values"):
        lrcompile.verify(nn.Linear(3, 3), exported.path, (torch.ones(1, 3),))


def test_a_copy_made_while_decoding_decodes_and_the_model_returns_to_its_class():
    model, prompt = decoder("llama"), prompts(1)
    first, _ = steps(model, prompt_of(model, prompt))
    plain = type(model)
    with decoding(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            outputs = [named_outputs(each(**first)) for each in (model, twin)]
    assert type(model) is plain
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert set(named_tensors(first)) >= {"past_key_values.1.value", "position_ids"}


def test_positions_count_what_the_mask_keeps():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("build", "inputs", "options", "message"),
    [
        (lambda: nn.Linear(3, 3), (torch.ones(2, 3),), {}, "causal language models"),
        ("llama", {}, {}, r"only input_ids \[batch, sequence\] must be there; given were none"),
        ("llama", {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3)}, {}, "labels"),
        ("llama", {"input_ids": torch.ones(3, dtype=torch.long)}, {}, "input_ids"),
        ("llama", prompts(0), {"dynamic_shapes": "static"}, "leave dynamic_shapes out"),
        (
            "llama",
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 5)},
            {},
            r"attention_mask is \[2, 5\]",
        ),
    ],
)
def test_what_has_no_cache_or_no_prompt_is_refused_and_nothing_is_written(tmp_path, build, inputs, options, message):
    model = decoder(build, adapted=False) if isinstance(build, str) else build()
    with pytest.raises(ExportError, match=message):
        lrcompile.export(model, tmp_path / "m.onnx", inputs, use_cache=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_models_whose_cache_is_something_else_are_refused_by_name(tmp_path):
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ExportError, match="encoder-decoder"):
        lrcompile.export(t5, tmp_path / "m.onnx", prompts(0), use_cache=True)
    headless = transformers.LlamaModel(CONFIGS["llama"]())
    with pytest.raises(ExportError, match="returns no logits"):
        lrcompile.export(headless, tmp_path / "m.onnx", prompts(0), use_cache=True)
    recurrent = transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            **_TOKENS, **_SIZES, num_key_value_heads=2, num_experts=0,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        )
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"not keys and values\s+that grow"):
        lrcompile.export(recurrent, tmp_path / "m.onnx", prompts(0), use_cache=True)


@SLOW
def test_a_package_generates_the_models_own_tokens_too(tmp_path):
    model = endless(decoder("llama"))
    exported = lrcompile.export(model, tmp_path / "m.pt2", prompts(0), use_cache=True)
    assert exported.verify().ok
    session = lrcompile.run(exported.path)
    assert torch.equal(session.generate(**prompts(1)), greedy(model, prompts(1)))
