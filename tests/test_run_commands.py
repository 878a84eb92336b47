"""`lrcompile export --use-cache --genai`, then `lrcompile run` on what it wrote; and on any other export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrcompile
from lrcompile import cli

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

Run = Callable[..., tuple[int, str, str]]
TEXTS = ("the cat sat", "the dog and the cat")


def _tokenizer() -> Any:
    """Byte-level, as Llama 3's and GPT-2's are; onnxruntime-genai reads only such real kinds."""
    level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder, and its export made by the command line."""
    source, target = tmp_path_factory.mktemp("chat-model"), tmp_path_factory.mktemp("chat")
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.5)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    assert cli.main(["export", str(source), str(target / "model.onnx"), "--use-cache", "--genai"]) == 0
    return source, target / "model.onnx"


def _expected(source: Path, new: int) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
    given = tokenizer(list(TEXTS), padding=True, return_tensors="pt", return_token_type_ids=False)
    return model.generate(**given, do_sample=False, max_new_tokens=new)


def test_an_exported_decoder_continues_texts_with_the_tokenizer_beside_it(run: Run, chat) -> None:
    source, file = chat
    expected, tokenizer = _expected(source, 8), transformers.AutoTokenizer.from_pretrained(source)
    code, out, err = run("run", file, "--text", TEXTS[0], "--text", TEXTS[1], "--max-new-tokens", 8)
    assert code == 0, err
    prompt = expected.shape[1] - 8
    assert out == "".join(
        text + tokenizer.decode(row[prompt:], skip_special_tokens=True) + "\n"
        for text, row in zip(TEXTS, expected, strict=True)
    )


def test_prompts_come_from_a_file_too_and_the_tokens_go_to_one(run: Run, chat, tmp_path: Path) -> None:
    source, file = chat
    ids = _expected(source, 8)[:1, -12:-8]
    save_file({"input_ids": ids.contiguous()}, tmp_path / "prompts.safetensors")
    code, out, err = run("run", file, "--inputs", tmp_path / "prompts.safetensors", "--max-new-tokens", 3)
    assert code == 0, err
    tokens = [int(token) for token in out.split()]
    assert tokens[:4] == ids[0].tolist()
    assert len(tokens) == 7
    made = tmp_path / "tokens.safetensors"
    more = ("--max-new-tokens", 3, "--out", made)
    assert run("run", file, "--inputs", tmp_path / "prompts.safetensors", *more)[0] == 0
    assert load_file(made)["ids"].tolist() == [tokens]


def test_a_file_of_prompts_that_holds_something_else_is_refused(run: Run, chat, tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(3)}, tmp_path / "p.safetensors")
    code, _, err = run("run", chat[1], "--inputs", tmp_path / "p.safetensors")
    assert code == 2
    assert "input_ids and perhaps attention_mask; given were" in err


def test_verify_holds_prompt_token_and_cache_against_the_model(run: Run, chat) -> None:
    source, file = chat
    code, out, err = run("verify", source, file, "--text", "the mat")
    assert code == 0, err
    assert "present.0.value" in out


def test_any_other_export_shows_its_outputs(run: Run, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = lrcompile.export(model, tmp_path / "m.onnx", (torch.ones(2, 3),)).path
    save_file({"input": torch.ones(4, 3)}, tmp_path / "x.safetensors")
    code, out, err = run("run", path, "--inputs", tmp_path / "x.safetensors")
    assert code == 0, err
    assert "4 x 2" in out
    assert f"{float(model(torch.ones(3)).max().detach()):.4g}"[:5] in out
    assert run("run", path, "--inputs", tmp_path / "x.safetensors", "--max-new-tokens", 3)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "m.onnx"], "--inputs FILE.safetensors, or --text"),
        (["run", "m.onnx", "--text", "a", "--inputs", "b.safetensors"], "--inputs FILE.safetensors, or --text"),
        (["run", "absent.onnx", "--text", "a"], "no file absent.onnx"),
        (["run", "p.yaml", "--max-new-tokens", "3"], "--max-new-tokens: for an exported"),
        (["export", ".", "m.onnx", "--genai"], "--use-cache too"),
    ],
)
def test_bad_usage_is_one_line(run: Run, arguments: list[str], said: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_onnxruntime_genai_generates_the_same_from_the_folder(chat) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source, file = chat
    expected = _expected(source, 8)[1]
    model = genai.Model(str(file.parent))
    ids = genai.Tokenizer(model).encode(TEXTS[1])
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 8)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected.tolist()
