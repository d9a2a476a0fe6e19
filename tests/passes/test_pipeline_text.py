"""Pipeline text parses to passes and prints back; errors point at the place and name the choices."""

from __future__ import annotations

import pytest

from effc.errors import UsageError
from effc.passes.pipeline_text import format_pipeline, parse_pipeline


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lossless-weights",
        "stored-weights,lossless-weights",
        "lossless-weights{layout=rank3}",
        "lossless-weights{layout=rank4,min-saving=0.5,min-bytes=0}",
        'lossless-weights{skip=lm_head*|"a b"}',
    ],
)
def test_round_trip(text: str) -> None:
    passes = parse_pipeline(text)
    assert format_pipeline(passes) == text
    assert parse_pipeline(format_pipeline(passes)) == passes


def test_spaces_and_defaults_are_free() -> None:
    assert parse_pipeline(" lossless-weights { layout = huffman } ") == parse_pipeline("lossless-weights")
    assert parse_pipeline("lossless-weights{}") == parse_pipeline("lossless-weights")


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("losless-weights", 0, "Did you mean 'lossless-weights'?"),
        ("lossless-weights{layuot=rank4}", 17, "Did you mean 'layout'?"),
        ("lossless-weights{layout=rank5}", 24, "takes one of huffman, rank4, rank3"),
        ("lossless-weights{min-saving=big}", 28, "takes a number"),
        ("lossless-weights{min-bytes=1.5}", 27, "takes a whole number"),
        ("lossless-weights{min-saving=1.5}", 0, "from 0 to below 1"),
        ("lossless-weights{layout}", 23, "expected '='"),
        ("lossless-weights{layout=rank4", 29, "expected ',' or '}'"),
        ("lossless-weights{layout=rank4,layout=rank3}", 0, "given twice"),
        ("lossless-weights,,", 17, "expected the name of a pass"),
        ("lossless-weights}", 16, "expected ',' or the end"),
        ('lossless-weights{skip="a', 22, "no closing quote"),
        ("lossless-weights{min-bytes=1|2}", 27, "takes one value"),
    ],
)
def test_errors_have_a_caret_and_the_choices(text: str, column: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    lines = str(caught.value).splitlines()
    assert words in str(caught.value)
    assert lines[-2] == "  " + text
    if column:
        assert lines[-1] == "  " + " " * column + "^"
