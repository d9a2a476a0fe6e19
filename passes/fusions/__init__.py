"""The rewrites of `fuse`, one a file: forms that onnxruntime's CPU kernels run faster. Each says what was measured."""
