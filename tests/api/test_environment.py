"""Facts about the machine, with and without the things they are about."""

import pytest

from effc import environment as module
from effc import kernels
from effc.errors import MissingDependencyError


def fake_tool(folder, body: str):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    return folder


def test_the_facts_of_this_machine() -> None:
    facts = module.environment()
    assert facts["isa"] in facts["isas"]
    assert facts["kernels"].endswith("libeffc.so")
    assert facts["targets"]["ort-cpu"] == {"available": True, "reason": ""}
    assert facts["missing"] == []


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("printf 'NVIDIA H100 80GB\\nNVIDIA A10\\n'", ["NVIDIA H100 80GB", "NVIDIA A10"]),
        ("exit 9", []),
        ("", []),
    ],
)
def test_gpus_are_those_the_driver_names(tmp_path, monkeypatch, body, names) -> None:
    monkeypatch.setenv("PATH", f"{fake_tool(tmp_path, body)}:/usr/bin:/bin")
    assert module.gpu_names() == names


def test_no_tool_and_a_tool_that_hangs_mean_no_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.gpu_names() == []
    monkeypatch.setenv("PATH", f"{fake_tool(tmp_path, 'exec sleep 5')}:/usr/bin:/bin")
    monkeypatch.setattr(module, "GPU_TIMEOUT", 0.1)
    assert module.gpu_names() == []


def test_missing_kernels_and_packages_come_with_what_to_do(monkeypatch) -> None:
    def no_library():
        raise MissingDependencyError("not built")

    monkeypatch.setattr(kernels, "library_path", no_library)
    monkeypatch.setattr(
        module, "_version", lambda name: None if name in ("torch", "onnxruntime", "onnxruntime-gpu") else "1"
    )
    facts = module.environment()
    assert facts["kernels"] is None and facts["isa"] is None
    missing = {item["what"]: item["install"] for item in facts["missing"]}
    assert missing["torch"] == "pip install 'effc[torch]'"
    assert missing["onnxruntime"] == "pip install onnxruntime"
    assert "kernels" in missing


def test_an_instruction_set_this_machine_lacks_is_named(monkeypatch) -> None:
    def refuse():
        raise ValueError("instruction set 'sse9' is not available here; choose one of: scalar")

    monkeypatch.setattr(kernels, "isa", refuse)
    facts = module.environment()
    assert facts["isa"] is None and facts["kernels"] is not None
    assert [item["install"] for item in facts["missing"]] == ["set EFFC_ISA to one of them, or unset it"]
