"""Builds a small ONNX model with a squared ReLU, and compiles it with the pass of this folder."""

import json
import sys

import numpy as np
import onnx
from square_by_product import SquareByProduct

import effc


def model() -> onnx.ModelProto:
    """`y = relu(x @ w) ** 2`, `z = y ** 0.5`."""
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    graph = onnx.parser.parse_graph("""
        squared_relu (float[batch, 64] x) => (float[batch, 96] y, float[batch, 96] z)
        <float two = {2.0}, float half = {0.5}> {
            h = MatMul(x, w)
            r = Relu(h)
            y = Pow(r, two)
            z = Pow(y, half)
        }
    """)
    graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


def main(folder: str) -> None:
    """Compile into the folder, run the engine, print what the pass did."""
    result = effc.optimize(model(), folder, passes=[SquareByProduct()])
    record = next(one for one in result.summary["passes"] if one["name"] == SquareByProduct.name)
    print(json.dumps({key: record[key] for key in ("name", "contract", "rewritten", "left")}, indent=1))
    with effc.load(folder) as engine:
        print(engine.run({"x": np.ones((2, 64), np.float32)})["y"].shape)


if __name__ == "__main__":
    main(sys.argv[1])
