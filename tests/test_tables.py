"""Tables print what they are given, nothing interpreted."""

from lrcompile.tables import render


def test_cells_are_printed_as_they_are():
    text = render(("name",), [("[bold]x[/bold]",), (":smile:",), ("[/]",), ("a" * 500,)])
    assert "[bold]x[/bold]" in text
    assert ":smile:" in text
    assert "[/]" in text
    assert "a" * 500 in text


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
    lines = render(("name", "size"), [("a", 1), ("bbb", 1234)]).splitlines()
    assert lines[-2].rstrip().endswith("   1")
    assert lines[-2].lstrip().startswith("a ")


def test_title_and_notes_surround_the_table_and_no_rows_are_fine():
    text = render(("a",), [], title="T", notes=["n1", "n2"])
    assert text.startswith("T\n")
    assert text.endswith("· n1\n· n2")


def test_there_are_no_colours_and_no_blanks_at_the_ends_of_lines():
    text = render(("a", "b"), [("x", "y")])
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_wide_characters_and_cells_of_several_lines_keep_their_columns():
    text = render(("a", "size", "b"), [("漢字", 12, "x"), ("one\ntwo", 3, "y")])
    assert text.splitlines() == [
        " a      size   b",
        " ───────────────",
        " 漢字     12   x",
        " one       3   y",
        " two",
    ]
