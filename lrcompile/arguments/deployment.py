"""From a trained adapter to a file that is proven: merge, quantize, export, verify."""

from __future__ import annotations

from lrcompile.arguments.options import (
    MODEL,
    Commands,
    add,
    calibration_options,
    input_options,
    json_option,
    report_options,
)


def merge(commands: Commands) -> None:
    parser = add(
        commands, "merge", "commands:merge",
        "Fold an adapter into its model and save a plain model; says what rounding took of each update.",
        "  lrcompile merge lrcompile-demo/base lrcompile-demo/adapter --out merged\n"
        "  lrcompile merge nf4-base adapter --out merged --into nf4 --optimise --inputs calibration.safetensors",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder (PEFT's layout)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--into", choices=("keep", "float32", "bfloat16", "float16", "nf4"), default="keep",
                        help="what the weights of an NF4 base become; nf4 needs --optimise")  # fmt: skip
    parser.add_argument("--optimise", action="store_true",
                        help="choose NF4 codes by what layers put out on --text or --inputs")  # fmt: skip
    parser.add_argument("--limit", type=float, metavar="SHARE",
                        help="the most rounding may take of an update, of 1 (default 0.5)")  # fmt: skip
    input_options(parser)
    calibration_options(parser)


def quantize(commands: Commands) -> None:
    parser = add(
        commands, "quantize", "commands:quantize",
        "Store a model's linear maps as NF4 codes, or within a budget each as float, int8, int4 or NF4.\n\n"
        "export, verify, merge and golden read the folder again. A budget is spent where the outputs on your data\n"
        "gain most, and the table says what each map got and why; integers take no adapter any more.",
        "  lrcompile quantize merged --out merged-nf4 --exclude head\n"
        "  lrcompile quantize merged --out small --budget share=0.2 --data texts.jsonl\n"
        "  lrcompile quantize merged --out fast --budget error=2% --integer-inputs --data texts.txt --json why.json\n"
        "  lrcompile export fast fast.onnx --nf4-form int8",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--block-size", type=int, default=64, metavar="N")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the blocks' maxima in float32")
    parser.add_argument("--exclude", metavar="NAMES", help="names with commas, or re:EXPRESSION")
    parser.add_argument("--budget", metavar="KIND=LIMIT",
                        help="share=0.2 of what these weights take now, bytes=25MiB of them, or error=0.02, what the"
                             " model's outputs may move by, of their own size")  # fmt: skip
    parser.add_argument("--integer-inputs", action="store_true",
                        help="the budget is about export --nf4-form int8, which rounds inputs to 8 bits, and stores"
                             " nothing as NF4")  # fmt: skip
    input_options(parser)
    calibration_options(parser)
    json_option(parser)


def export(commands: Commands) -> None:
    parser = add(
        commands, "export", "commands:export",
        "Write a model, with or without an adapter, as one deployable file; verify it with the printed command.",
        "  lrcompile export merged model.onnx --text 'an example sentence'\n"
        "  lrcompile export base model.onnx --adapter adapter --adapters inline --quantize nf4\n"
        "  lrcompile export chat-model chat/model.onnx --adapter adapter --use-cache --genai\n"
        "  lrcompile export base model.onnx --adapters inputs --adapter support=one --adapter sales=two",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("file", metavar="FILE", help="ends in .onnx (ONNX Runtime) or .pt2 (AOTInductor)")
    parser.add_argument("--adapter", metavar="[NAME=]DIR", action="append", default=[],
                        help="load this adapter first; with --adapters inputs it may be repeated")  # fmt: skip
    parser.add_argument("--adapters", choices=("auto", "merge", "inline", "inputs"), default="auto",
                        help="fold them, keep each pair beside its base, or make them swappable inputs")  # fmt: skip
    parser.add_argument("--quantize", choices=("nf4",), help="store the linear maps of the written copy so")
    parser.add_argument("--into", choices=("float32", "bfloat16", "float16"), help="what a merge makes of NF4 weights")
    parser.add_argument("--nf4-form", choices=("exact", "portable", "int8", "int8-rows", "int4"), default="exact",
                        help="how .onnx holds NF4 weights; int…: fast, declared approximations")  # fmt: skip
    parser.add_argument("--opset", type=int)
    parser.add_argument("--use-cache", action="store_true",
                        help="a decoder with its key-value cache in and out (lrcompile run)")  # fmt: skip
    parser.add_argument("--genai", action="store_true",
                        help="also write genai_config.json and the tokenizer, for onnxruntime-genai")  # fmt: skip
    input_options(parser)
    one_more = add(
        commands, "export-adapter", "commands:export_adapter",
        "Write one more adapter for a graph that was exported with --adapters inputs from the same model.",
        "  lrcompile export-adapter base model.onnx sales=adapter\n"
        "  lrcompile verify base model.onnx --adapter sales=adapter",
    )  # fmt: skip
    one_more.add_argument("model", metavar="MODEL", help=MODEL)
    one_more.add_argument("file", metavar="FILE.onnx", help="its graph; the adapter is written beside it")
    one_more.add_argument("adapter", metavar="[NAME=]DIR", help="an adapter's folder (PEFT's layout)")


def verify(commands: Commands) -> None:
    parser = add(
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
    parser.add_argument("reference", metavar="A", help=f"what says what is right; a model is {MODEL}")
    parser.add_argument("candidate", metavar="B", help="what is held against it")
    parser.add_argument("--adapter", metavar="[NAME=]DIR", help="load this adapter into the model A first")
    parser.add_argument(
        "--base", metavar="MODEL",
        help="the model without its adapter: what an adapter's folder belongs to, or where A has it merged",
    )  # fmt: skip
    parser.add_argument("--build", metavar="MODULE:FUNCTION", help="your code that makes a golden's model")
    parser.add_argument("--repro", metavar="DIR", help="if it does not hold, the smallest part that shows it goes here")
    report_options(parser)
    input_options(parser)
