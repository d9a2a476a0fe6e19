"""Products of the kernels against float64, and of the layouts against each other."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from effc import kernels
from effc.kernels import codec

BF16 = np.dtype(ml_dtypes.bfloat16)
ROWS_OF_X = (1, 2, 3, 4, 5, 8, 17)


def weight_of(shape: tuple[int, int], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * 0.02
    weight[0] *= 2.0 ** rng.integers(-12, 12, shape[1])  # a row full of rare exponents
    return weight.astype(dtype)


def tolerance(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Rounding bound of a sum of K products: (K + 2) eps / 2 of the sum of magnitudes."""
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    return (weight.shape[1] + 2) * np.finfo(np.float32).eps / 2 * magnitude


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32), np.dtype(np.float16)])
@pytest.mark.parametrize("shape", [(5, 1), (9, 63), (6, 64), (33, 200), (18, 640), (4, 129)])
def test_product_is_right_and_the_same_for_all_layouts(shape: tuple[int, int], dtype: np.dtype, isa: str) -> None:
    weight = weight_of(shape, dtype)
    layouts = ("raw",) if dtype == np.float16 else ("raw", "rank4", "rank3")
    coded = [codec.encode(weight, layout) for layout in layouts]
    for m in ROWS_OF_X:
        x = np.random.default_rng(m).standard_normal((m, shape[1])).astype(np.float32)
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        plain = codec.matmul(x, coded[0])
        assert np.all(np.abs(plain - exact) <= tolerance(x, weight))
        for other in coded:
            for threads in (1, 2, 3):
                assert codec.matmul(x, other, threads).tobytes() == plain.tobytes(), (other.layout, m, threads)


@pytest.mark.parametrize("name", kernels.available_isas())
def test_environment_forces_the_instruction_set(name: str) -> None:
    code = "from effc import kernels; print(kernels.isa())"
    env = os.environ | {"EFFC_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name


def test_unknown_instruction_set_is_an_error() -> None:
    code = "from effc import kernels; kernels.isa()"
    env = os.environ | {"EFFC_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "'mmx' is not available here" in done.stderr


def test_x_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="x has shape"):
        codec.matmul(np.zeros((1, 3), np.float32), codec.encode(np.zeros((2, 2), np.float32), "raw"))
