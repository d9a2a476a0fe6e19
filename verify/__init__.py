"""Checks and measurements: contracts of passes, equality of engines, speed, the report."""
