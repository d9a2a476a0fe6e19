"""Passes: graph rewrites with a promise, the registry that finds them and the pipeline that runs them."""
