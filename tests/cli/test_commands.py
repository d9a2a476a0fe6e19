"""What each command calls and prints; the library behind it is replaced, so that every answer is known."""

import importlib
import inspect
import io
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from effc.errors import UsageError

SUMMARY = {
    "engine": "out",
    "task": "causal-lm",
    "target": "ort-cpu",
    "pipeline": "canonicalize,lossless-weights",
    "seconds": 1.25,
    "peak_rss": 123_000_000,
    "bytes": {
        "source": 540_000_000,
        "engine": 380_000_000,
        "weights_stored": 360_000_000,
        "weights_memory": 400_000_000,
    },
    "passes": [
        {
            "name": "canonicalize",
            "contract": "equivalent",
            "rewritten": ["a", "b"],
            "left": [],
            "measured": {"bitwise": False, "max_abs": 1.5e-6, "max_rel": 2e-7},
            "seconds": 0.5,
        },
        {
            "name": "lossless-weights",
            "contract": "exact",
            "rewritten": ["w1"],
            "left": [{"site": f"w{i}", "reason": "too small"} for i in range(2, 10)],
            "measured": {"bitwise": True, "max_abs": 0.0, "max_rel": 0.0},
            "seconds": 0.5,
        },
    ],
}


@dataclass
class Compiler:
    """Records what the command asked for."""

    calls: list = field(default_factory=list)

    def optimize(self, model, output, *, progress, announce, **options):
        self.calls.append((model, output, options))
        announce("weights 540 MB; needs 1 GB of memory")
        progress("write", 1, 2)
        return type("Done", (), {"summary": SUMMARY, "folder": output})

    def reference_engine(self, model, **options):
        self.calls.append((model, options))
        return Path("cached")


@pytest.fixture
def compiler(stand_in) -> Compiler:
    fake = Compiler()
    stand_in("effc.compiler", optimize=fake.optimize, reference_engine=fake.reference_engine)
    return fake


def test_optimize_json_is_the_summary_and_notes_go_to_stderr(effc, compiler) -> None:
    result = effc("optimize", "model", "-o", "out", "--passes", "lossless-weights", "--json")
    assert result.json("optimize") == SUMMARY
    assert result.err.splitlines() == ["weights 540 MB; needs 1 GB of memory", "… write"]
    model, output, options = compiler.calls[0]
    assert (model, output) == ("model", Path("out"))
    assert options["passes"] == "lossless-weights"
    assert options["target"] == "ort-cpu"


def test_optimize_passes_every_flag_on(effc, compiler, tmp_path) -> None:
    words = [
        "--portable",
        "--allow-noop",
        "--dry-run",
        "--twin",
        "--task",
        "encoder",
        "--dtype",
        "bfloat16",
        "--target",
        "t",
        "--quiet",
    ]
    more = ["--dump", tmp_path, "--budget", "top1=0.9", "--calibrate", "c.txt", "--calibrate-tokens", 7]
    result = effc("optimize", "model", *words, *more)
    assert result.code == 0
    assert result.err == ""
    _, output, options = compiler.calls[0]
    assert output is None
    expected = {
        "portable": True,
        "allow_noop": True,
        "dry_run": True,
        "twin": True,
        "task": "encoder",
        "dtype": "bfloat16",
        "target": "t",
        "dump": tmp_path,
        "budget": "top1=0.9",
        "calibrate": Path("c.txt"),
        "calibrate_tokens": 7,
    }
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("module", "function", "names"),
    [
        (
            "effc.compiler",
            "optimize",
            "passes target portable budget calibrate calibrate_tokens allow_noop dry_run twin task dtype dump "
            "progress announce",
        ),
        ("effc.compiler", "reference_engine", "dtype task twin"),
        ("effc.frontends", "import_model", "task dtype twin check progress"),
        (
            "effc.verification",
            "verify",
            "text tokens context contexts passkey passkey_depths "
            "passkey_samples passkey_keys reads chunk threads budget report progress",
        ),
        ("effc.verify.benchmark", "bench_engine", "prompt_tokens new_tokens batch threads repeats progress"),
    ],
)
def test_the_library_takes_what_the_commands_hand_over(module, function, names) -> None:
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    assert set(names.split()) <= set(parameters)


def test_optimize_for_people_names_passes_reasons_and_sizes(effc, compiler) -> None:
    out = effc("optimize", "model", "-o", "out").out
    assert "same bits" in out
    assert "max abs 1.5e-06" in out
    assert "lossless-weights left w2 alone: too small" in out
    assert "… and 3 more" in out
    assert "540.0 MB in the source, 360.0 MB on disk, 400.0 MB in memory" in out


def test_optimize_takes_presets_and_recipes(effc, compiler, tmp_path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[pipeline]\npasses = "fuse"\ntarget = "other"\nbudget = "kl=0.1"\n')
    assert effc("optimize", "m", "-o", "out", "--preset", "lossless").code == 0
    assert effc("optimize", "m", "-o", "out", "--recipe", recipe).code == 0
    assert effc("optimize", "m", "-o", "out", "--recipe", recipe, "--target", "ort-cpu").code == 0
    chosen = [(options["passes"], options["target"]) for _, _, options in compiler.calls]
    assert [options.get("budget") for _, _, options in compiler.calls] == [None, "kl=0.1", "kl=0.1"]
    assert chosen == [("lossless-weights", "ort-cpu"), ("fuse", "other"), ("fuse", "ort-cpu")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimize", "m"], "Name one with -o DIR"),
        (["optimize", "m", "-o", "o", "--passes", "fuse", "--preset", "lossless"], "--passes and --preset both"),
        (["optimize", "m", "-o", "o", "--preset", "losless"], "Did you mean 'lossless'?"),
        (["generate", "e"], "Give --prompt"),
        (["generate", "e", "--prompt", "a", "--stream", "--json"], "--stream"),
        (["generate", "e", "--prompt", "a", "--prompt", "b", "--stream"], "--stream"),
        (["passes", "lossles-weights"], "Did you mean 'lossless-weights'?"),
    ],
)
def test_wrong_requests(effc, compiler, words, message) -> None:
    result = effc(*words)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def measurement(**more):
    return {
        "bitwise": False,
        "max_abs": 1e-6,
        "max_rel": 1e-7,
        "top1": 1.0,
        "perplexity": {"source": 20.0, "engine": 20.0, "ratio": 1.0},
        "shapes": [
            {"batch": 2, "seq": 5, "past": 7, "max_abs": 1e-6},
            {"batch": 1, "seq": 1, "past": 0, "max_abs": 0.0},
        ],
        "contract": "equivalent",
        "allowed": 1e-3,
        "holds": True,
        "reason": "",
        **more,
    }


@dataclass
class Generation:
    text: str
    token_ids: list
    finish_reason: str = "length"
    prompt_tokens: int = 3
    kept_tokens: int = 3
    prefill_seconds: float = 0.1
    decode_seconds: float = 0.2
    prefix_tokens: int = 0


class Talk:
    """A dialogue that repeats what it hears, and has had enough after three turns."""

    def __init__(self, **options):
        self.options = options
        self.heard = []

    @property
    def length(self):
        return sum(map(len, self.heard))

    def say(self, line, *, max_new_tokens, stop, stream=None):
        self.heard.append(line)
        if len(self.heard) > 3:
            raise UsageError("the dialogue has 3 tokens.")
        text = f"{line}, {max_new_tokens}"
        for piece in text.split(" ") if stream else ():
            stream(piece)
        return Generation(text, [1, 2])


class OpenEngine:
    """An engine that answers from memory."""

    def __init__(self, folder, threads):
        self.folder, self.threads = folder, threads

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def generate(self, prompts, *, stream, **options):
        self.options = options
        read = "" if options["filter_prompt"] else "all of "
        texts = [f"{read}{prompt} and [more]" for prompt in prompts]
        for row, text in enumerate(texts):
            for piece in text.split(" ") if stream else ():
                stream(row, piece)
        return [Generation(text, [1, 2]) for text in texts]

    @property
    def tokenizer(self):
        return SimpleNamespace(has_chat_template=self.folder.name == "chatty")

    def dialogue(self, **options):
        self.talk = Talk(**options)
        return self.talk

    def write_prefix(self, text, output, *, chat, **options):
        self.options = options
        tokens = len(text) + 100 * chat
        return {"prefix": str(output), "engine": str(self.folder), "tokens": tokens, "bytes": 2_500_000, "seconds": 1.5}

    def embed(self, texts, *, batch_size, normalize):
        return np.array([[len(text), 0.5] for text in texts], dtype=np.float32)


@pytest.fixture
def session(stand_in):
    stand_in("effc.runtime.session", load=lambda folder, threads=None: OpenEngine(folder, threads))


def test_generate(effc, session, tmp_path) -> None:
    result = effc("generate", "e", "--prompt", "one", "--prompt", "two", "--json")
    content = result.json("generate")["results"]
    assert [row["prompt"] for row in content] == ["one", "two"]
    assert content[0]["text"] == "one and [more]"
    assert effc("generate", "e", "--prompt", "x", "--stream").out == "xand[more]\n"
    file = tmp_path / "prompt.txt"
    file.write_text("from a file", encoding="utf-8")
    assert effc("generate", "e", "--prompt-file", file).out == "from a file and [more]\n"
    assert effc("generate", "e", "--prompt", "x", "--no-filter-prompt").out == "all of x and [more]\n"
    file.write_bytes(b"\xff\xfe")
    result = effc("generate", "e", "--prompt-file", file)
    assert result.code == 3
    assert "is not UTF-8 text" in result.err


def test_generate_passes_the_prefix_on(effc, stand_in) -> None:
    engine = OpenEngine("e", None)
    stand_in("effc.runtime.session", load=lambda folder, threads=None: engine)
    for words, prefix in (([], None), (["--prefix", "p"], Path("p"))):
        assert effc("generate", "e", "--prompt", "x", *words).code == 0
        assert engine.options["prefix"] == prefix


@pytest.fixture
def hear(monkeypatch):
    """Puts bytes on stdin."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def test_chat(effc, session, hear) -> None:
    hear("one\n\nzwö \n".encode())
    assert effc("chat", "e", "--max-new-tokens", 5).out == "one,5\nzwö,5\n"
    hear(b"one\ntwo")
    result = effc("chat", "e", "--json")
    lines = [replace(result, out=line).json("chat") for line in result.out.splitlines()]
    assert [(line["prompt"], line["text"], line["dialogue_tokens"]) for line in lines] == [
        ("one", "one, 256", 3),
        ("two", "two, 256", 6),
    ]
    hear(b"a\nb\nc\nd\ne\n")
    result = effc("chat", "e")
    assert (result.code, result.out) == (2, "a,256\nb,256\nc,256\n")
    assert "the dialogue has 3 tokens" in result.err
    hear(b"\xff\n")
    result = effc("chat", "e")
    assert result.code == 3
    assert "is not UTF-8 text" in result.err


def test_chat_passes_its_options_on(effc, stand_in, hear) -> None:
    opened = []

    def load(folder, threads=None):
        opened.append(OpenEngine(folder, threads))
        return opened[-1]

    stand_in("effc.runtime.session", load=load)
    for words, chat in ((["e"], False), (["chatty"], True), (["chatty", "--no-template"], False)):
        hear(b"a\n")
        assert effc("chat", *words, "--decay", 0.5, "--system", "s", "--top-k", 3, "--seed", 4).code == 0
        assert opened[-1].talk.options == {
            "chat": chat, "decay": 0.5, "system": "s", "temperature": 0.0, "top_k": 3, "top_p": 1.0,
            "repetition_penalty": 1.0, "seed": 4,
        }  # fmt: skip
    assert effc("chat", "e", "--decay", 2).code == 2


def test_prefix_passes_the_options_of_selections_on(effc, stand_in, tmp_path) -> None:
    engine = OpenEngine("e", None)
    stand_in("effc.runtime.session", load=lambda folder, threads=None: engine)
    file = tmp_path / "text"
    file.write_text("text", encoding="utf-8")
    names = ("keep", "cluster_tokens", "rank", "outliers")
    for words, wanted in (
        ([], (None, None, None, None)),
        (["--keep", "0.5", "--cluster-tokens", "9"], (0.5, 9, None, None)),
        (["--rank", "32", "--outliers", "0"], (None, None, 32, 0)),
    ):
        assert effc("prefix", "e", "--text", file, "-o", "out", *words).code == 0
        assert engine.options == dict(zip(names, wanted, strict=True))


def test_prefix(effc, session, tmp_path) -> None:
    file = tmp_path / "text"
    file.write_text("ünd\n", encoding="utf-8")
    content = effc("prefix", "e", "--text", file, "-o", "out", "--json").json("prefix")
    assert content == {"prefix": "out", "engine": "e", "tokens": 4, "bytes": 2_500_000, "seconds": 1.5}
    assert effc("prefix", "e", "--text", file, "-o", "out").out == "out: 4 tokens, 2.5 MB, computed in 1.50 s\n"
    assert effc("prefix", "e", "--text", file, "-o", "out", "--chat").out.startswith("out: 104 tokens")
    for content, message in ((b"", "is empty"), (b"\xff\xfe", "is not UTF-8 text")):
        file.write_bytes(content)
        result = effc("prefix", "e", "--text", file, "-o", "out")
        assert result.code == 3
        assert message in result.err
    for words in (["--text", file], ["-o", "out"], ["--text", tmp_path / "none", "-o", "out"]):
        assert effc("prefix", "e", *words).code == 2


def test_embed(effc, session, tmp_path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("a\r\n\nüü".encode())
    expected = [[1.0, 0.5], [0.0, 0.5], [2.0, 0.5]]
    assert effc("embed", "e", file, "--json").json("embed")["embeddings"] == expected
    assert effc("embed", "e", file).out == "1 0.5\n0 0.5\n2 0.5\n"
    array = tmp_path / "vectors.npy"
    result = effc("embed", "e", file, "-o", array)
    assert (result.code, result.out) == (0, "")
    np.testing.assert_array_equal(np.load(array), np.float32(expected))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_embed_refuses_nothing_and_what_is_no_text(effc, session, tmp_path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_bytes(b"")
    binary.write_bytes(b"\xff\xfe\x00")
    assert effc("embed", "e", empty).code == 3
    assert effc("embed", "e", binary).code == 3
    assert effc("embed", "e", tmp_path / "missing").code == 2


def test_verify_builds_the_reference_of_a_model_and_takes_an_engine_as_it_is(
    effc, compiler, stand_in, tmp_path
) -> None:
    seen = []

    def verify(engine, reference, **options):
        seen.append((engine, reference, options))
        return measurement()

    stand_in("effc.verification", verify=verify)
    (tmp_path / "effc.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("words", encoding="utf-8")
    words = ["--tokens", "9", "--context", "4", "--threads", "2", "--budget", "top1=0.9"]
    assert effc("verify", "e", "--against", "model", "--json").json("verify") == measurement()
    assert effc("verify", "e", "--against", tmp_path, "--text", text, *words).code == 0
    assert [(str(ours), str(other)) for ours, other, _ in seen] == [("e", "cached"), ("e", str(tmp_path))]
    expected = {"text": text, "tokens": 9, "context": 4, "threads": 2, "budget": "top1=0.9", "report": None}
    long = {"contexts": (), "passkey": (), "passkey_depths": (0, 25, 50, 75, 100), "passkey_samples": 4}
    options = seen[1][2]
    assert callable(options.pop("progress"))
    assert options == {**expected, **long, "passkey_keys": 1, "reads": None, "chunk": 64}
    assert compiler.calls == [("model", {"dtype": None, "task": None, "twin": False})]


LONG_CONTEXT = {
    "contexts": [
        {"context": 16, "source": 30.0, "engine": 33.0, "ratio": 1.1, "tokens": 90, "positions": []},
        {"context": 32, "source": None, "engine": None, "ratio": None, "tokens": 90, "positions": []},
    ],
    "passkey": {
        "lengths": [2048],
        "depths": [0, 100],
        "samples": 2,
        "keys": 1,
        "seed": 0,
        "chunk": 64,
        "tokens": [2040.5],
        "source": [[1.0, 0.5]],
        "engine": [[0.0, 0.5]],
        "log_probability": {"source": [[-0.25, -1.5]], "engine": [[None, -1.5]]},
        "rank": {"source": [[1.0, 2.5]], "engine": [[99.0, 2.5]]},
        "score": {"source": 0.75, "engine": 0.25},
    },
    "reads": {
        "tokens": 900,
        "steps": 32,
        "layers": [{"node": "attention 3", "heads": [0.25, 0.5], "least": 0.125, "most": 0.75, "map": [1.0, 0.5]}],
    },
}


def test_verify_measures_long_contexts(effc, compiler, stand_in, tmp_path) -> None:
    seen = {}

    def verify(engine, reference, **options):
        seen.update(options)
        return measurement(**LONG_CONTEXT)

    stand_in("effc.verification", verify=verify)
    words = ["--contexts", "16, 32,16", "--passkey", "2048", "--passkey-depths", "0,100", "--passkey-samples", "2"]
    more = ["--passkey-keys", 3, "--reads", 900, "--chunk", 7, "--report", tmp_path / "page.html"]
    result = effc("verify", "e", "--against", "m", *words, *more, "--json")
    assert result.json("verify")["passkey"] == LONG_CONTEXT["passkey"]
    assert (seen["contexts"], seen["passkey"], seen["passkey_depths"]) == ((16, 32), (2048,), (0, 100))
    assert (seen["passkey_samples"], seen["passkey_keys"], seen["reads"], seen["chunk"]) == (2, 3, 900, 7)
    assert seen["report"] == tmp_path / "page.html"
    people = effc("verify", "e", "--against", "m").out
    for line in (
        r"16 +90 +30\.00\d+ +33\.0\d+ +1\.10",
        r"32 +90 +– +– +–",
        r"2048 +100 % \(-0\.25\) +50 % \(-1\.5\d*\)",
        r"attention 3 +12 % +75 % +25 % 50 %",
    ):
        assert re.search(line, people)
    assert "pass keys found by the engine: 25 %" in people
    assert "0 % (–)" in people


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contexts", "512,x"], "'x' is no whole number of at least 2"),
        (["--contexts", "1"], "'1' is no whole number of at least 2"),
        (["--passkey", ""], "'' is no whole number"),
        (["--passkey", "5", "--passkey-depths", "0,101"], "'101' is no whole number from 0 to 100"),
        (["--passkey-keys", "17"], "17"),
        (["--chunk", "0"], "0"),
    ],
)
def test_verify_refuses_wrong_figures(effc, compiler, words, message) -> None:
    result = effc("verify", "e", "--against", "m", *words)
    assert result.code == 2
    assert message in result.err


def test_verify_prints_the_figures_and_fails_when_the_contract_does_not_hold(effc, compiler, stand_in) -> None:
    stand_in("effc.verification", verify=lambda *_, **__: measurement(holds=False, reason="max_rel 0.5"))
    result = effc("verify", "e", "--against", "m", "--json")
    assert result.code == 1
    assert result.json("verify")["holds"] is False
    assert "does not keep its contract: max_rel 0.5" in result.err
    people = effc("verify", "e", "--against", "m").out
    assert "ratio 1.0" in people
    assert "1e-06" in people


def test_bench(effc, compiler, stand_in) -> None:
    rate = {"median": 50.0, "min": 48.0, "max": 51.0}
    side = {
        "decode_tokens_per_s": rate,
        "prefill_tokens_per_s": rate,
        "items_per_s": None,
        "load_s": 0.5,
        "peak_rss": 9,
        "bytes": 8,
    }
    seen = {}

    def bench_engine(folder, against_folder=None, **options):
        seen.update(options, folder=folder, against=against_folder)
        both = {"against": side, "ratio": {"decode_tokens_per_s": 1.25, "bytes": 0.7}} if against_folder else {}
        return {"engine": side, **both}

    stand_in("effc.verify.benchmark", bench_engine=bench_engine)
    words = ["--prompt-tokens", "7", "--new-tokens", "3", "--batch", "2", "--threads", "1", "--repeats", "4"]
    content = effc("bench", "e", "--against", "m", *words, "--json").json("bench")
    assert content["ratio"]["bytes"] == 0.7
    assert {key: seen[key] for key in ("prompt_tokens", "new_tokens", "batch", "threads", "repeats")} == {
        "prompt_tokens": 7,
        "new_tokens": 3,
        "batch": 2,
        "threads": 1,
        "repeats": 4,
    }
    assert seen["against"] == Path("cached")
    people = effc("bench", "e").out
    assert "50.00 (48.00–51.00)" in people
    assert "ratio" not in people
    assert "items" not in people


def test_doctor_names_what_is_missing_and_the_command_that_installs_it(effc, stand_in) -> None:
    facts = {
        "version": "1",
        "isa": None,
        "isas": [],
        "kernels": None,
        "onnxruntime": "1.32",
        "gpu": [],
        "targets": {"ort-cpu": {"available": False, "reason": "no kernels [x]"}},
        "python": "3.11",
        "platform": "Linux",
        "cores": 2,
        "packages": {"torch": None},
        "missing": [{"what": "torch", "why": "models are read with it", "install": "pip install 'effc[torch]'"}],
    }
    stand_in("effc.environment", environment=lambda: facts)
    assert effc("doctor", "--json").json("doctor") == facts
    out = effc("doctor").out
    assert "pip install 'effc[torch]'" in out
    assert "no kernels [x]" in out
    assert "gpu          none" in out


def test_passes_are_listed_and_have_pages(effc) -> None:
    listed = effc("passes", "--json").json("passes")["passes"]
    assert {"canonicalize", "lossless-weights"} <= {row["name"] for row in listed}
    people = effc("passes").out
    assert all(row["name"] in people for row in listed)
    for row in listed:
        page = effc("passes", row["name"], "--json").json("pass")
        assert page["contract"] == row["contract"]
        assert page["doc"].startswith(row["summary"])
        assert effc("passes", row["name"]).out.startswith(f"{row['name']} ({row['contract']})")


def test_json_is_all_there_is_on_stdout(effc, compiler) -> None:
    out = effc("optimize", "m", "-o", "o", "--json").out
    content, end = json.JSONDecoder().raw_decode(out)
    assert out[end:] == "\n"
    assert content == SUMMARY


def test_import_df11(effc, stand_in, tmp_path) -> None:
    done = {"folder": "out", "groups": 2, "weights": 3, "bytes": {"coded": 7_000_000, "decoded": 10_000_000}}

    def import_dfloat11(folder, output, progress):
        progress("layers.0", 0, 2)
        return {**done, "folder": str(output)}

    stand_in("effc.frontends.dfloat11", import_dfloat11=import_dfloat11)
    assert effc("import-df11", "in", "-o", "out", "--json").json("import-df11") == done
    result = effc("import-df11", "in", "-o", "out")
    assert result.out == "out: 3 weights of 2 groups decoded, 7.0 MB to 10.0 MB\n"
    assert result.err == "… layers.0\n"
    assert effc("import-df11", "in").code == 2
