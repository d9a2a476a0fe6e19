"""Exit codes and wording of errors; help; commands that cannot be loaded."""

import errno
import os
import subprocess
import sys

import pytest

from effc import errors
from effc.cli import main

FAILURES = [
    (errors.ContractError("pass 'x' broke its promise"), 1, "pass 'x' broke its promise"),
    (errors.UsageError("unknown pass"), 2, "unknown pass"),
    (errors.InputError("model.gguf: is truncated"), 3, "is truncated"),
    (errors.EngineError("engine: damaged"), 3, "damaged"),
    (errors.OutputError("out: no space"), 3, "no space"),
    (errors.MissingDependencyError("torch is missing"), 4, "torch is missing"),
    (ImportError("No module named 'torch'"), 4, "effc doctor"),
    (MemoryError(), 4, "out of memory"),
    (
        OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
        3,
        "/somewhere: no space left on device. The disk",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "f"), 3, "f: permission denied. Change its permissions"),
    (OSError(errno.EIO, "Input/output error", "f"), 3, "f: input/output error. Check"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (ZeroDivisionError("by zero"), 70, "an error inside effc: ZeroDivisionError: by zero"),
]


def failing(error):
    def environment():
        raise error

    return environment


@pytest.mark.parametrize(("error", "code", "words"), FAILURES, ids=lambda value: type(value).__name__)
def test_an_error_is_worded_once_on_stderr_without_a_traceback(effc, stand_in, error, code, words) -> None:
    stand_in("effc.environment", environment=failing(error))
    result = effc("doctor", "--json")
    assert result.code == code
    assert words in result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert result.out == ""


def test_the_traceback_is_there_on_request(effc, stand_in, monkeypatch) -> None:
    monkeypatch.setenv("EFFC_DEBUG", "1")
    stand_in("effc.environment", environment=failing(errors.InputError("bad")))
    result = effc("doctor")
    assert result.code == 3
    assert "Traceback" in result.err
    assert result.err.rstrip().endswith("error: bad")


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from effc.cli.main import main; main(['passes'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == main.PIPE_CLOSED
    assert err == b""


def test_a_full_disk_under_stdout_is_worded() -> None:
    code = "import sys; from effc.cli.main import main; main(['passes', '--json'])"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr.count(b"\n") == 1
    assert b"disk is full" in done.stderr


@pytest.mark.parametrize(
    "words", [["no-such-command"], ["optimize"], ["doctor", "--no-such-flag"], ["bench", "x", "--batch", "0"]]
)
def test_wrong_usage_exits_2_and_says_why(effc, words) -> None:
    result = effc(*words)
    assert result.code == 2
    assert "Error:" in result.err
    assert result.out == ""


def test_help_lists_every_command_and_every_exit_code(effc) -> None:
    result = effc("--help")
    assert result.code == 0
    for name in main.COMMANDS:
        assert f"  {name} " in result.out
    for code in (0, 1, 2, 3, 4, main.INTERNAL, main.INTERRUPTED, main.PIPE_CLOSED):
        assert f"\n    {code} " in result.out


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_has_a_help_page(effc, name) -> None:
    result = effc(name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: effc {name}")


def test_version(effc) -> None:
    from effc import __version__

    assert effc("--version").out == f"effc {__version__}\n"


def test_a_command_that_cannot_be_loaded_is_listed_with_its_reason(effc, monkeypatch) -> None:
    monkeypatch.setitem(main.COMMANDS, "doctor", "effc.cli.not_there")
    assert "(cannot be loaded: No module named 'effc.cli.not_there')" in " ".join(effc("--help").out.split())
    for words in (["doctor"], ["doctor", "--json"], ["doctor", "--help"]):
        result = effc(*words)
        assert result.code == 4
        assert "`effc doctor` cannot be loaded" in result.err


def test_no_colour_reaches_a_pipe_or_a_user_who_wants_none(monkeypatch) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "", "TERM": "xterm-256color"}
    code = "from effc.cli.main import main; main(['passes', 'no-such-pass'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert b"\x1b" not in done.stderr + done.stdout
    assert done.returncode == 2
