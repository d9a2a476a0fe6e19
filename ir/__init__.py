"""The IR: `Program` around `onnx_ir.Model`, lazy weights, the `effc` dialect and pure analyses."""
