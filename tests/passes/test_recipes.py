"""Recipe files: what is taken, what is refused, and the presets that come along."""

from pathlib import Path

import pytest

from effc.errors import UsageError
from effc.passes.pipeline_text import parse_pipeline
from effc.passes.recipes import PRESETS, Recipe, preset, preset_names, read_recipe


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_all_keys(tmp_path: Path) -> None:
    text = '[pipeline]\npasses = "a,b{c=1}"\ntarget = "ort-cpu"\nbudget = "top1=0.99"\ndescription = "d"\n'
    assert read_recipe(written(tmp_path, text)) == Recipe("a,b{c=1}", "ort-cpu", "top1=0.99", "d")


def test_only_passes_are_required(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, '[pipeline]\npasses = ""\n')) == Recipe("")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no [pipeline] table"),
        ("pipeline = 3", "has no [pipeline] table"),
        ("[pipeline]\n", "names no passes"),
        ('[pipeline]\npases = "a"\n', "Did you mean 'passes'?"),
        ("[pipeline]\npasses = 3\n", "must be text in quotes, it is 3"),
        ("[pipeline]\npasses = ['a']\n", "must be text in quotes"),
        ('[pipeline]\npasses = "a"\n[pipelines]\n', "Did you mean 'pipeline'?"),
        ('[pipeline]\npasses = "a"\n[x]\n', "unknown table or key 'x'"),
        ("[pipeline\n", "is not a TOML file"),
        (b"\xff\xfe\x00\x01", "is not a TOML file"),
        ("x = " + "[" * 100_000, "recipe.toml"),
        ("#" * ((1 << 20) + 1), "is larger than 1024 KiB"),
    ],
)
def test_what_is_refused_names_the_file_and_the_reason(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read as a recipe"):
            read_recipe(path)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_to_passes_and_says_what_it_is_for(name: str) -> None:
    recipe = preset(name)
    assert parse_pipeline(recipe.passes)
    assert recipe.description


def test_a_file_more_is_a_choice_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in PRESETS.glob("*.toml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine.toml").write_text('[pipeline]\npasses = "canonicalize"\n')
    before = preset_names()
    monkeypatch.setattr("effc.passes.recipes.PRESETS", tmp_path)
    assert set(preset_names()) == {*before, "mine"}
    assert preset("mine").passes == "canonicalize"


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'lossless'\? Presets: .*lossless"):
        preset("loseless")
