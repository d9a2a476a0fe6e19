"""onnxruntime backends: lowering to its operators, external weights, the graph file."""
