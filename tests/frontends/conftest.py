import json
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effc.frontends.check import Runner

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def save(tmp_path):
    """Save a transformers model with random weights in a folder; returns the folder."""

    def write(model, name="model", **kwargs):
        folder = tmp_path / name
        model.save_pretrained(folder, **kwargs)
        return folder

    return write


@pytest.fixture
def edit_config():
    """Change keys of a folder's config.json; None removes one."""

    def edit(folder, **changes):
        path = Path(folder) / "config.json"
        content = json.loads(path.read_text())
        for key, value in changes.items():
            content.pop(key, None)
            if value is not None:
                content[key] = value
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def run():
    """Outputs of an imported program in onnxruntime."""

    def evaluate(program, feeds):
        with Runner(program.model) as runner:
            return runner.run(feeds)

    return evaluate


@pytest.fixture
def onnx_model():
    """A model y = x @ w + c of a 64x64 float32 weight, as an onnx_ir model with symbolic batch."""

    def build(opset=24, domain=""):
        rng = np.random.default_rng(0)
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 64]))
        w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([64, 64]))
        w.const_value = ir.tensor(rng.standard_normal((64, 64), dtype=np.float32), name="w")
        product = ir.node("MatMul", [x, w])
        y = ir.node("Relu", [product.outputs[0]], domain=domain)
        y.outputs[0].name = "y"
        y.outputs[0].type, y.outputs[0].shape = x.type, ir.Shape(["n", 64])
        graph = ir.Graph([x], y.outputs, nodes=[product, y], initializers=[w], opset_imports={"": opset}, name="g")
        if domain:
            graph.opset_imports[domain] = 1
        return ir.Model(graph, ir_version=10)

    return build
