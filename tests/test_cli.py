"""The command line: exit codes, one-line errors, help that answers at once, and each command on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrcompile
from lrcompile import cli
from lrcompile.demo.commands import from_options
from lrcompile.demo.opening import open_model
from lrcompile.demo.tiny import write_tiny_bert
from lrcompile.pipeline import Pipeline
from lrcompile.storage import described_maps

COMMANDS = (
    "demo", "run", "plan", "train", "merge", "quantize", "export", "verify", "golden", "passes", "methods", "bench",
)  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does something: neither factor is zero."""
    model = open_model(str(tiny)).model
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["query", "value"], seed=0))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    return lrcompile.save(model, tmp_path_factory.mktemp("adapter") / "adapter")


def refused(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert "error: " in lines[0]
    return lines[0]


# usage


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_and_methods_answer_without_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from lrcompile.cli import main
try:
    main({arguments!r})
finally:
    loaded = [name for name in ("torch", "transformers", "onnx", "numpy") if name in sys.modules]
    assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if arguments[-1] == "--help" and arguments[0] not in ("--help", "golden", "bench"):
        assert f"example:\n  lrcompile {arguments[0]}" in done.stdout
    if arguments == ["--help"]:
        assert all(f"    {name}" in done.stdout for name in COMMANDS)
    if arguments == ["methods"]:
        assert all(name in done.stdout for name in lrcompile.methods())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["demo", "--rank", "many"], "--rank"),
        (["demo", "--method", "lorra"], "invalid choice: 'lorra'"),
        (["demo", "--rank", "0"], "rank must be an integer of at least 1"),
        (["demo", "--lr", "-1"], "train.lr is -1.0"),
        (["demo", "--data", "none.csv"], "no such file: none.csv"),
        (["demo", "--model", "./no/such/model"], "no model at './no/such/model'"),
        (["run", "none.yaml"], "cannot read the pipeline 'none.yaml'"),
        (["plan", "package:nothing"], "no installed package 'nothing'"),
        (["merge", "./none", "./none", "--out", "x"], "no model at './none'"),
        (["verify", "./none", "b.onnx"], "no model at './none'"),
        (["golden", "check", "./none"], "none"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert said in refused(run(*arguments))
    finally:
        os.chdir(here)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "onnx"), ("matplotlib", "demo")])
def test_a_missing_extra_is_named_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(run("demo", "--out", tmp_path / "out"))
    assert f"pip install 'lrcompile[{extra}]'" in said
    assert not (tmp_path / "out").exists()


def test_passes_lists_each_pass_with_what_it_preserves(run: Run) -> None:
    from lrcompile import passes

    code, out, _ = run("passes")
    assert code == 0
    for name in passes.names():
        assert name in out
        assert passes.get(name).preserves in out


# options


def options(*arguments: str) -> Pipeline:
    return from_options(cli._parser().parse_args(["demo", *arguments]))


def test_demo_without_options_is_the_default_pipeline() -> None:
    assert options() == Pipeline()


def test_every_option_reaches_its_field() -> None:
    made = options(
        *("--model", "m", "--data", "d.csv", "--limit", "50", "--max-length", "17", "--method", "qlora", "--rank", "5"),
        *(
            "--alpha",
            "7",
            "--targets",
            "query, value",
            "--epochs",
            "0.5",
            "--lr",
            "0.01",
            "--head-lr",
            "0.02",
            "--batch-size",
            "6",
        ),
        *("--seed", "9", "--out", "o"),
    )
    assert (made.model, made.data.source, made.data.limit, made.data.max_length) == ("m", "d.csv", 50, 17)
    assert (made.spec.method, made.spec.rank, made.spec.alpha, made.spec.seed) == ("qlora", 5, 7.0, 9)
    assert made.spec.targets == ("query", "value")
    assert (made.train.epochs, made.train.lr, made.train.batch_size, made.train.seed) == (0.5, 0.01, 6, 9)
    assert made.train.head_lr == 0.02
    assert made.out == "o"
    assert options("--targets", "re:.*query").spec.targets == ".*query"
    assert options("--targets", "all-linear").spec.targets == "all-linear"


# commands


def test_plan_needs_no_weights(run: Run, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((tiny / "config.json").read_bytes())
    code, out, _ = run("plan", tmp_path, "--rank", 2, "--targets", "query,value", "--json")
    assert code == 0
    found = json.loads(out)
    assert [site["name"].rpartition(".")[2] for site in found["sites"] if site["rank"]] == ["query", "value"] * 2
    code, again, _ = run("plan", config, "--rank", 2, "--targets", "query,value", "--json")
    assert json.loads(again) == found
    assert "querry" in refused(run("plan", config, "--targets", "querry"))


def test_plan_takes_a_spec_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    lrcompile.spec("qlora", rank=2).dump(tmp_path / "spec.yaml")
    code, out, _ = run("plan", tiny, "--spec", tmp_path / "spec.yaml", "--tokens", 64)
    assert code == 0
    assert "qlora: 13 sites hit" in out
    assert "a step of 64 tokens" in out


def test_merge_writes_the_model_that_the_adapter_makes(run: Run, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("merge", tiny, adapter, "--out", tmp_path / "merged")
    assert code == 0
    assert "worst adapter-relative error" in out
    plain, adapted = open_model(str(tmp_path / "merged")), open_model(str(tiny)).model
    lrcompile.load(adapted, adapter)
    inputs = plain.inputs(None, ["a text", "and one more"])
    before = open_model(str(tiny)).model(**inputs).last_hidden_state
    after, expected = (model(**inputs).last_hidden_state for model in (plain.model, adapted.eval()))
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(load_file(tiny / "model.safetensors"))
    assert "not empty" in refused(run("merge", tiny, adapter, "--out", tmp_path / "merged"))


def test_an_nf4_base_is_merged_by_what_layers_put_out_and_exported_in_the_form_asked_for(
    run: Run, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    base, merged = tmp_path / "nf4", tmp_path / "merged"
    assert run("quantize", tiny, "--out", base)[0] == 0
    code, _, err = run("merge", base, adapter, "--out", merged, "--into", "nf4")
    assert code == 2
    assert "optimise" in err
    assert not merged.exists()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{word} {i}"}) for i in range(9) for word in ("some", "others")))
    more = ("--data", texts, "--samples", 12, "--text", "to calibrate with")
    code, out, err = run("merge", base, adapter, "--out", merged, "--into", "nf4", "--optimise", *more)
    assert code == 0, err
    assert "nearest codes" in out
    assert "kept of the effect on the model's outputs" in out
    assert (merged / "quantized.safetensors").is_file()
    file = tmp_path / "m.onnx"
    code, _, err = run("export", merged, file, "--nf4-form", "int8", "--text", "one text", "--text", "another")
    assert code == 0, err
    assert json.loads(file.with_suffix(".manifest.json").read_text())["nf4_form"] == "int8"
    code, out, _ = run("verify", merged, file, "--text", "another text", "--json")
    assert code == 0
    assert json.loads(out)["limits"]["declared_error"] > 0


def test_verify_says_holds_or_not_by_its_exit_code(run: Run, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", tiny, adapter, "--out", tmp_path / "merged")[0] == 0
    save_file({"input_ids": torch.tensor([[2, 7, 8, 3]])}, tmp_path / "in.safetensors")
    inputs = ("--inputs", tmp_path / "in.safetensors")
    code, out, _ = run("verify", tiny, tmp_path / "merged", "--adapter", adapter, *inputs, "--json")
    assert code == 0
    verdict = json.loads(out)
    assert verdict["ok"] is True
    assert verdict["adapter_relative_error"] < 0.05
    code, out, _ = run("verify", tiny, tiny, "--adapter", adapter, *inputs)
    assert code == 1
    assert "DOES NOT HOLD" in out


def test_quantize_writes_a_folder_that_opens_again(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", tiny, "--out", tmp_path / "nf4", "--exclude", "pooler.dense")
    assert code == 0
    assert "12 linear maps as NF4" in out
    again, here = open_model(str(tmp_path / "nf4")), open_model(str(tiny))
    lrcompile.quantize(here.model, "nf4", exclude=["pooler.dense"])
    inputs = again.inputs(None, ["one", "two and three"])
    assert torch.equal(again.model(**inputs).last_hidden_state, here.model(**inputs).last_hidden_state)
    weights = tmp_path / "nf4" / "quantized.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "quantized.safetensors" in refused(run("verify", tmp_path / "nf4", tiny))
    config = tmp_path / "other" / "config.json"
    assert run("quantize", tiny, "--out", config.parent)[0] == 0
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    assert "config.json is damaged or was changed" in refused(run("verify", config.parent, tiny))


def test_quantize_within_a_budget_writes_a_folder_that_every_command_takes(
    run: Run, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    texts, small = tmp_path / "texts.txt", tmp_path / "small"
    texts.write_text("\n".join(f"text {i} has some words\n" for i in range(20)))
    options = ("--budget", "share=25%", "--data", texts, "--samples", 9, "--exclude", "re:.*(query|value|pooler.*)")
    code, out, err = run("quantize", tiny, "--out", small, *options, "--json", tmp_path / "why.json")
    assert code == 0, err
    found = json.loads((tmp_path / "why.json").read_text())["allocation"]
    forms = {choice["name"]: choice["form"] for choice in found["choices"]}
    assert len(set(forms.values())) > 1
    assert found["bytes"] <= 0.25 * found["float_bytes"]
    assert all(name in out for name in forms)
    assert "as nf4_form=" in out
    assert out.rstrip().endswith(f"wrote {small}")
    assert (small / "tokenizer_config.json").is_file()
    inputs = ("--text", "abc def", "--text", "g")
    opened, file = open_model(str(small)), tmp_path / "m.onnx"
    assert described_maps(opened.model).keys() == {name for name, form in forms.items() if form != "float"}
    code, _, err = run("export", small, file, *inputs)
    assert code == 0, err
    assert run("verify", small, file, *inputs)[0] == 0
    assert run("verify", tiny, small, *inputs)[0] == 1
    assert run("golden", "record", tmp_path / "case", small, "--reason", "a test", *inputs)[0] == 0
    assert run("golden", "check", tmp_path / "case")[0] == 0
    code, out, err = run("merge", small, adapter, "--out", tmp_path / "merged")
    assert code == 0, err
    assert described_maps(open_model(str(tmp_path / "merged")).model).keys() == described_maps(opened.model).keys()


WRONG_BUDGETS = {
    "no data": (("--budget", "share=0.2"), "give --data FILE, --text TEXT or --inputs FILE"),
    "data alone": (("--text", "abc"), "what a --budget is measured on"),
    "a form alone": (("--integer-inputs",), "what a --budget is measured on"),
    "no limit": (("--budget", "share"), "bytes=25MiB or error=0.02"),
    "no kind": (("--budget", "0.2"), "bytes=25MiB or error=0.02"),
    "another kind": (("--budget", "ram=3"), "'ram=3'"),
    "a share in bytes": (("--budget", "share=3MiB"), "'share=3MiB'"),
    "bytes in percent": (("--budget", "bytes=20%"), "'bytes=20%'"),
    "not above 0": (("--budget", "error=0"), "'error=0'"),
    "no number": (("--budget", "error=nan"), "'error=nan'"),
    "too small": (("--budget", "bytes=1kB", "--text", "abc"), "allows 1000 bytes"),
    "no such file": (("--budget", "share=1", "--data", "none.txt"), "no such file: none.txt"),
    "another file": (("--budget", "share=1", "--data", "a.pdf"), ".jsonl or .csv or .txt"),
    "both": (("--budget", "share=1", "--data", "a.txt", "--inputs", "b.npz"), "give one or the other"),
    "no sample": (("--budget", "share=1", "--data", "a.txt", "--samples", "0"), "--samples is 0"),
}


@pytest.mark.parametrize(("options", "said"), WRONG_BUDGETS.values(), ids=WRONG_BUDGETS)
def test_a_wrong_budget_is_one_line_and_writes_nothing(
    run: Run, tiny: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    assert said in refused(run("quantize", tiny, "--out", tmp_path / "out", *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--adapters", "inline"), ("--quantize", "nf4")], ids=["merge", "inline", "nf4"])
def test_export_writes_a_graph_that_verify_accepts(
    run: Run, tiny: Path, adapter: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    file = tmp_path / "model.onnx"
    code, out, err = run("export", tiny, file, "--adapter", adapter, *more)
    assert code == 0, err
    assert f"wrote {file}" in out
    if "--quantize" not in more:
        code, out, _ = run("verify", tiny, file, "--adapter", adapter, "--text", "abc def", "--text", "g")
        assert code == 0, out


def test_adapters_of_one_graph_are_exported_together_and_one_by_one(
    run: Run, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    file, named = tmp_path / "m.onnx", [f"{name}={adapter}" for name in ("one", "two", "three")]
    code, out, err = run("export", tiny, file, "--adapters", "inputs", "--adapter", named[0], "--adapter", named[1])
    assert code == 0, err
    assert out.count("prove it: lrcompile verify") == 2
    assert "no adapter 'three'" in refused(run("verify", tiny, file, "--adapter", named[2], "--text", "abc"))
    code, out, err = run("export-adapter", tiny, file, named[2])
    assert code == 0, err
    assert {entry.name for entry in tmp_path.glob("*.onnx_adapter")} == {
        f"m.{name}.onnx_adapter" for name in ("one", "two", "three")
    }
    for each in (named[0], named[2]):
        assert run("verify", tiny, file, "--adapter", each, "--text", "abc def", "--text", "g")[0] == 0
    several = ["--adapter", named[0], "--adapter", named[1]]
    assert "--adapters inputs" in refused(run("export", tiny, tmp_path / "n.onnx", *several))


def test_a_folder_that_cannot_be_written_is_refused(run: Run, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(run("merge", tiny, adapter, "--out", tmp_path / "file" / "sub"))
    assert "cannot write" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny: Path, adapter: Path, tmp_path: Path, command: str) -> None:
    """A limit on the size of files fails a write for real, as a full disk does."""
    more = [str(adapter)] if command == "merge" else []
    arguments = [command, str(tiny), *more, "--out", str(tmp_path / "out")]
    code = f"""
import resource, sys
from lrcompile.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write" in refused((done.returncode, done.stdout, done.stderr))
    assert list(tmp_path.iterdir()) == []


def test_export_to_another_suffix_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert ".onnx" in refused(run("export", tiny, tmp_path / "model.pb"))


def test_golden_records_checks_and_updates(run: Run, tiny: Path, tmp_path: Path) -> None:
    case = tmp_path / "cases" / "tiny"
    code, _, err = run("golden", "record", case, tiny, "--reason", "a test", "--text", "abc")
    assert code == 0, err
    assert run("golden", "check", tmp_path / "cases")[0] == 0
    code, out, err = run("golden", "record", tmp_path / "cases" / "two", tiny, "--reason", "a test", "--text", "def")
    assert code == 0, err
    assert run("golden", "check", tmp_path / "cases")[1].endswith("\n2 of 2 hold\n")
    assert run("golden", "update", case, "--reason", "another test")[0] == 0
    (manifest,) = case.glob("*.json")
    assert "another test" in manifest.read_text()
    (case / "data.safetensors").write_bytes(b"something else")
    code, out, err = run("golden", "check", tmp_path / "cases")
    assert code == 1, err
    assert out.endswith(f"\n1 of 2 hold; not {case}\n")


# interruption


def test_an_interruption_is_one_line_and_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrcompile.listing.list_methods", interrupted)
    assert run("methods") == (130, "", "lrcompile: interrupted; nothing was left half-written\n")


@pytest.mark.slow
def test_control_c_during_training_leaves_nothing_and_exits_130(tiny: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{'aab' if i % 2 else 'zzy'} {i}", "label": i % 2} for i in range(400)]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "lrcompile.cli", "train", "--model", tiny, "--data", data, "--epochs", 1000]
    process = subprocess.Popen(
        [*map(str, command), "--rank", "2", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Control-C, and so would whatever it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/base/classifier.json")) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "lrcompile: interrupted; nothing was left half-written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]
