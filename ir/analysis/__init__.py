"""Pure functions over a graph: what is where, and what it costs. They change nothing."""
