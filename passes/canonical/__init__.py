"""The steps of `canonicalize`: simplification first, then one file per operation raised by dataflow."""
