"""Package map, the CMake build of the kernels, and a wheel tag that serves every Python 3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
FOLDERS = ("ir", "frontends", "passes", "backends", "runtime", "verify", "kernels", "cli")
ROOTS = {"effc": "api", **{f"effc.{folder}": folder for folder in FOLDERS}}


def packages() -> list[str]:
    """Every importable package below the mapped roots."""
    subs = {name: find_packages(folder) for name, folder in ROOTS.items() if name != "effc"}
    return ["effc", *ROOTS.keys() - {"effc"}, *(f"{name}.{sub}" for name in subs for sub in subs[name])]


class BuildKernels(build_ext):
    """Builds `kernels/` with CMake into the package, beside its Python loader."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and place the shared library."""
        if os.environ.get("EFFC_BUILD_KERNELS", "1") == "0":
            return
        in_source = self.editable_mode or self.inplace
        target = HERE / "kernels" if in_source else Path(self.build_lib).resolve() / "effc" / "kernels"
        build = HERE / "build" / f"kernels-{sys.platform}"
        subprocess.run(
            [
                "cmake",
                "-S",
                HERE / "kernels",
                "-B",
                build,
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DEFFC_LIBRARY_DIR={target / '_lib'}",
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)], check=True)

    def get_outputs(self) -> list[str]:
        """The library is placed by CMake; setuptools copies nothing."""
        return []

    def copy_extensions_to_source(self) -> None:
        """An editable build already writes into the source tree."""


class AnyPythonWheel(bdist_wheel):
    """The library is loaded by ctypes and onnxruntime, so one wheel serves all Pythons of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return (python, abi, platform)."""
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Marks the wheel as platform specific."""

    def has_ext_modules(self) -> bool:
        """A native library is shipped."""
        return True


setup(
    packages=packages(),
    package_dir=ROOTS,
    package_data={
        "effc": ["py.typed"],
        "effc.kernels": ["_lib/*"],
        "effc.passes": ["presets/*"],
        "effc.verify": ["*.html"],
    },
    ext_modules=[Extension("effc.kernels._native", sources=[])],
    distclass=BinaryDistribution,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
