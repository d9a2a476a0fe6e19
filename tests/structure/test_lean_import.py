"""`import effc` and the command line start fast, and never load torch."""

import subprocess
import sys
import time

import pytest

TRIES = 5


def fastest(code: str) -> float:
    """Best of several runs of the code in a fresh interpreter, seconds, its start-up included."""
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_import_takes_less_than_three_tenths_of_a_second() -> None:
    assert fastest("import effc") < 0.3


def test_help_takes_less_than_four_tenths_of_a_second() -> None:
    assert fastest("from effc.cli.main import run; run(['--help'])") < 0.4


HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "numpy")


@pytest.mark.parametrize(
    "code",
    [
        "import effc",
        "from effc.cli.main import run; run(['--help'])",
        "from effc.cli.main import run; run(['optimize', '--help'])",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    check = f"{code}\nimport sys\nloaded = [name for name in {HEAVY} if name in sys.modules]\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "module",
    [
        "effc.ir.program",
        "effc.passes.pipeline",
        "effc.runtime.session",
        "effc.backends",
        "effc.frontends",
        "effc.compiler",
    ],
)
def test_torch_is_loaded_by_need_only(module: str) -> None:
    check = f"import {module}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_no_module_carries_the_bare_name_of_a_folder() -> None:
    check = (
        "import sys, effc.compiler, effc.cli.main\n"
        "bare = {'api', 'ir', 'frontends', 'passes', 'backends', 'runtime', 'verify', 'kernels', 'cli'}\n"
        "assert not bare & set(sys.modules), bare & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_runtime_needs_no_compiler_part() -> None:
    check = (
        "import sys, effc.runtime.session\n"
        "heavy = {'onnx', 'onnx_ir', 'onnxscript', 'networkx', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
