"""Passes that change how weights are kept."""
