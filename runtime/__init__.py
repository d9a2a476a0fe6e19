"""Runs engine folders. Needs numpy, onnxruntime and tokenizers; never torch, never the compiler."""
