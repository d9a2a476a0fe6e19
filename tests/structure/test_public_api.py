"""The public names are a promise: this list changes on purpose only."""

import subprocess
import sys

import pytest

import effc
from effc import errors

PUBLIC = {
    "EffcError",
    "Program",
    "__version__",
    "errors",
    "import_model",
    "load",
    "optimize",
    "parse_pipeline",
}
EXIT_CODES = {
    "EffcError": 1,
    "ContractError": 1,
    "UsageError": 2,
    "InputError": 3,
    "EngineError": 3,
    "OutputError": 3,
    "MissingDependencyError": 4,
}


def test_public_names() -> None:
    assert set(effc.__all__) == PUBLIC
    assert set(dir(effc)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves_and_says_what_it_is(name: str) -> None:
    value = getattr(effc, name)
    assert value is getattr(effc, name)
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = effc.no_such_name


def test_star_import_gives_the_public_names() -> None:
    check = f"from effc import *; assert {PUBLIC - {'__version__'}} <= set(globals())"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_exit_codes_of_errors() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.EffcError)
    }
    assert found == EXIT_CODES


def test_the_version_is_the_one_of_the_package() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert effc.__version__ == project["version"]
