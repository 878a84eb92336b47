"""Goldens: record, check, update."""

from __future__ import annotations

from lrcompile.arguments.options import MODEL, Commands, add, input_options, report_options


def golden(commands: Commands) -> None:
    parser = commands.add_parser(
        "golden",
        help="stored inputs and outputs that later builds are held to",
        description="Goldens: record, check, update.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    record = add(
        actions, "record", "commands:golden_record", "Store a model, inputs and outputs as a new case.",
        "  lrcompile golden record golden/minilm merged --text 'one' --reason 'guards the merged demo model'",
    )  # fmt: skip
    record.add_argument("path", metavar="CASE", help="a new folder")
    record.add_argument("model", metavar="MODEL", help=MODEL)
    record.add_argument("--reason", required=True, help="why this case exists; kept in its manifest")
    record.add_argument("--adapter", metavar="DIR", help="load this adapter first")
    record.add_argument("--passes", metavar="NAMES", help="run these at each check (see: lrcompile passes)")
    record.add_argument(
        "--forms", metavar="NAMES",
        help="put the model into these at each check: merged, onnx, onnx-inline, onnx-inputs, onnx-nf4, pt2",
    )  # fmt: skip
    input_options(record)
    check = add(
        actions, "check", "commands:golden_check", "Compute every case again; exit code 1 if one does not hold.",
        "  lrcompile golden check golden",
    )  # fmt: skip
    update = add(
        actions, "update", "commands:golden_update",
        "Print the drift and store what is computed now; limits never loosen.",
        "  lrcompile golden update golden/minilm --reason 'torch 2.14 sums in another order'",
    )  # fmt: skip
    update.add_argument("--reason", required=True, help="why the old outputs are no longer right; kept in the manifest")
    check.add_argument("--forms", metavar="NAMES", help="of the forms that a case asks for only these; '' for none")
    report_options(check)
    for parser in (check, update):
        parser.add_argument("path", metavar="PATH", help="a case, or a folder of cases")
        parser.add_argument("--model", help=f"needed where a case cannot rebuild its own: {MODEL}")
        parser.add_argument(
            "--build", metavar="MODULE:FUNCTION", help="call this for the model instead; it is your code that runs"
        )
