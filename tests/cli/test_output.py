"""JSON has one form, numbers are readable, progress knows where it may speak."""

import json
import math

import numpy as np
import pytest

from effc.cli import output


def test_json_is_one_object_with_null_for_what_json_cannot_say(capsys) -> None:
    output.print_json(
        {
            "a": math.nan,
            "b": [math.inf, 1.5, -math.inf],
            "c": ("ü", None, True),
            "d": np.float32(0.5),
            "e": np.arange(2),
        }
    )
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": None, "b": [None, 1.5, None], "c": ["ü", None, True], "d": 0.5, "e": [0, 1]}
    assert "ü" in text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "–"),
        (0.0, 3, "0"),
        (1.5e-7, 3, "1.5e-07"),
        (63.456, 3, "63.46"),
        (12345.6, 3, "12,345.60"),
        (1.0, 3, "1.00"),
    ],
)
def test_numbers(value, digits, text) -> None:
    assert output.number(value, digits) == text


def test_megabytes() -> None:
    assert output.megabytes(None) == "–"
    assert output.megabytes(0) == "0.0 MB"
    assert output.megabytes(1_234_567_890) == "1,234.6 MB"


def test_tables_keep_brackets_and_long_cells(capsys) -> None:
    long = "x" * 150
    output.print_table(("name", ">size"), [("[bold]a[/bold]", "1"), (long, "22")])
    text = capsys.readouterr().out
    assert "[bold]a[/bold]" in text
    assert long in text
    assert text.splitlines()[-1].endswith("22")


def test_off_a_terminal_each_stage_is_one_line(capsys) -> None:
    with output.reporting(quiet=False) as reporter:
        for done in (0, 1, 2):
            reporter.progress("write", done, 2)
        reporter.announce("note [x]")
        reporter.progress("hash", 0, 0)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["… write", "note [x]", "… hash"]
    assert captured.out == ""


def test_quiet_says_nothing(capsys) -> None:
    with output.reporting(quiet=True) as reporter:
        reporter.progress("write", 1, 2)
        reporter.announce("note")
    captured = capsys.readouterr()
    assert captured.err + captured.out == ""


def test_on_a_terminal_there_is_a_bar_on_stderr_only(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with output.reporting(quiet=False) as reporter:
        reporter.progress("write weights", 5_000_000, 10_000_000)
        reporter.announce("[note]")
        reporter.progress("hash", 0, 0)
    captured = capsys.readouterr()
    assert "[note]" in captured.err
    assert captured.out == ""
