import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from verify_models import encoder, write_engine

from effc.errors import OutputError
from effc.runtime.bundle import read_manifest
from effc.verify.heat_map import passkey_maps
from effc.verify.report import format_bytes, format_number, render_report, weight_rows, write_report

RATE = {"median": 12.5, "min": 11.0, "max": 13.0}
SIDE = {
    "decode_tokens_per_s": RATE,
    "prefill_tokens_per_s": None,
    "items_per_s": None,
    "load_s": 0.5,
    "peak_rss": 5_000_000,
    "bytes": 100,
}
RECORD = {
    "name": "lossless-weights",
    "options": 'lossless-weights{skip="a*"}',
    "contract": "exact",
    "rewritten": ["w"],
    "left": [{"site": f"s{index}", "reason": "too <small>"} for index in range(9)],
    "details": {"tensors": [{"name": "w", "shape": [3, 5], "dtype": "bfloat16", "bytes": 30, "entropy_bits": 10.6}]},
    "measured": {"bitwise": True, "max_abs": None, "max_rel": 1e-7, "top1": 0.5, "shapes": ["batch=1"], "allowed": {}},
    "seconds": 1.25,
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = write_engine(encoder(), tmp_path_factory.mktemp("engine") / "engine")
    return asdict(read_manifest(folder))


class Checker(HTMLParser):
    """Collects references to other files, and checks that tags are balanced."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(text: str) -> None:
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not checker.references
    assert not re.search(r"url\(|@import|<script", text)


def test_a_plain_engine(manifest: dict, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(manifest, path)
    text = path.read_text(encoding="utf-8")
    check(text)
    assert "encoder engine for ort-cpu" in text
    assert "<h2>Speed" not in text
    assert "shortened" not in text


def test_an_engine_that_shortens_prompts(manifest: dict) -> None:
    entry = {"model": "f.onnx", "layer": 5, "layers": 18, "keep": 1024, "forced": 64, "weights": []}
    text = render_report({**manifest, "prompt_filter": entry})
    check(text)
    assert "more than 1024 tokens are shortened to as many, the first and the last 64 among them" in text
    assert "layer 5 of 18" in text
    assert "the first and" not in render_report({**manifest, "prompt_filter": {**entry, "forced": 0}})


def test_everything_measured(manifest: dict) -> None:
    verify = {
        "bitwise": False,
        "max_abs": 1e-5,
        "max_rel": None,
        "top1": 0.987,
        "perplexity": {"source": 20.0, "engine": 20.1, "ratio": 1.005},
        "shapes": [{"batch": 1, "seq": 1, "past": 0, "max_abs": 1e-5}],
    }
    bench = {"engine": SIDE, "against": SIDE, "ratio": dict.fromkeys(SIDE, 1.0), "settings": {"batch": 1}}
    text = render_report({**manifest, "passes": [RECORD]}, verify=verify, bench=bench)
    check(text)
    for expected in ("98.7 %", "12.5 (11 to 13)", "too &lt;small&gt;", "and 5 more", "10.60", "3 × 5", "1.005", "∞"):
        assert expected in text
    assert "too <small>" not in text
    assert "prefill" not in text


def long_contexts(engine: float | None) -> dict:
    position = {"begin": 0, "end": 128, "tokens": 127, "source": 2.5, "engine": engine}
    figures = {"context": 4096, "source": 12.0, "engine": engine, "ratio": 1.25, "tokens": 8190}
    return {
        "bitwise": False,
        "max_abs": 1e-5,
        "max_rel": 1e-5,
        "top1": None,
        "perplexity": None,
        "shapes": [],
        "contexts": [{**figures, "positions": [position]}],
        "passkey": {
            "lengths": [2048, 4096],
            "depths": [0, 50, 100],
            "samples": 4,
            "keys": 1,
            "chunk": 64,
            "source": [[1.0, 0.5, 1.0], [1.0, 0.25, 1.0]],
            "engine": [[1.0, 0.75, 1.0], [0.0, 0.25, 1.0]],
            "log_probability": {"source": [[-0.25] * 3] * 2, "engine": [[-0.25, -0.125, -0.25], [engine, -0.5, -0.25]]},
            "score": {"source": 0.79, "engine": 0.67},
        },
    }


def test_long_contexts(manifest: dict) -> None:
    text = render_report(manifest, verify=long_contexts(2.75))
    check(text)
    for expected in ("4096", "8190", "1.25", "0 to 127", "+0.2500", "engine: 67 % found", "+25 points", "−100 points"):
        assert expected in text
    assert "4096 tokens, 50 % deep: 0 %, ln p −0.250" in text
    assert text.count("<svg") == text.count("<title id") == text.count("<desc") == 3
    assert text.count("<rect") == 18
    assert text.count('class="bad" fill-opacity="0.500"') == 1
    assert text.count('class="good" fill-opacity="0.125"') == 3
    assert "2048 tokens, 0 % deep: 0 %, ln p 0.000" in text
    assert "2048 tokens, 50 % deep: +25 points, ln p +0.125" in text
    unknown = render_report(manifest, verify=long_contexts(None))
    check(unknown)
    assert "4096 tokens, 0 % deep: 0 %, ln p –" in unknown


def test_tokens_that_are_read(manifest: dict) -> None:
    layer = {"node": "layer <3>", "heads": [0.25, 0.5], "least": 0.125, "most": 0.75, "map": [1.0, 0.0, 0.0625]}
    reads = {"tokens": 900, "steps": 32, "layers": [layer]}
    text = render_report(manifest, verify={**long_contexts(2.75), "reads": reads})
    check(text)
    for expected in ("at the end of 900 tokens", "layer &lt;3&gt;", "37.5 %", "12.5 %", "75.0 %", "25.0 %, 50.0 %"):
        assert expected in text
    assert text.count('class="good read"') == 2
    assert 'x="2" y="0" width="1" height="12" class="good read" fill-opacity="0.062"' in text


def test_every_cell_lies_within_its_picture(manifest: dict) -> None:
    for picture in passkey_maps(long_contexts(2.75)["passkey"]):
        places = {(cell.x, cell.y) for cell in picture.cells}
        assert len(places) == len(picture.columns) * len(picture.rows) == 6
        assert all(x + 92 <= picture.width and y + 46 <= picture.height for x, y in places)


def test_the_cache_of_every_layer(manifest: dict) -> None:
    figures = {"storage": "pages", "bits": 4, "bits_with_parameters": 4.39, "tokens": 8192, "bytes_of_codes": 1}
    layers = [{"site": f"layer {i}", "bytes": 250_000 * (i + 1), "dense_bytes": 1_000_000, **figures} for i in (0, 1)]
    text = render_report({**manifest, "cache": {"mode": "in-place", "entries": [], "layers": layers}})
    check(text)
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", text, re.S)]
    assert ["layer", "1", "pages", "4.39", "500", "kB", "50.0", "%"] in rows
    assert ["all", "layers", "750", "kB", "37.5", "%"] in rows


def test_an_unchecked_pass_says_so(manifest: dict) -> None:
    text = render_report({**manifest, "passes": [{**RECORD, "measured": {}, "details": {}, "left": []}]})
    check(text)
    assert "<dt>checked</dt><dd>no</dd>" in text
    assert "<h2>Weights" not in text


def test_largest_weights_first() -> None:
    tensors = [{"name": f"w{index}", "bytes": index} for index in range(100)]
    rows = weight_rows([{"details": {"tensors": tensors}}, {"details": {"layout": "raw"}}, {}])
    assert [row["name"] for row in rows[:2]] == ["w99", "w98"]
    assert len(rows) == 40


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (536_000_000, "536 MB"), (3_210_000_000, "3.21 GB"), (None, "–")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_numbers() -> None:
    shown = [format_number(value) for value in (None, True, False, 3, 0.000012345)]
    assert shown == ["∞", "yes", "no", "3", "1.234e-05"]


def test_a_place_that_cannot_be_written(manifest: dict, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(manifest, tmp_path / "no" / "report.html")
