"""Passes that decide which tokens stay."""
