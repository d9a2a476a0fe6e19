"""Passes that edit attention and its cache."""
