"""Reading and editing graphs: constants, dataflow steps, symbolic sizes, type and shape inference."""
