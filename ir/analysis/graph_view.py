"""A networkx view of a graph: nodes are graph nodes, edges carry the values between them."""

from __future__ import annotations

import networkx as nx
import onnx_ir as ir


def graph_view(graph: ir.Graph) -> nx.DiGraph:
    """The nodes of a graph in their order, with an edge from each producer to each reader.

    An edge has the attribute `values`, the tuple of values it stands for. Initializers and graph inputs are no nodes.
    Nodes inside subgraphs count as part of the node that holds them.
    """
    view: nx.DiGraph = nx.DiGraph()
    view.add_nodes_from(graph)
    for node in graph:
        for value in read_values(node):
            before = value.producer()
            if before is None or before.graph is not graph:
                continue
            known = view.get_edge_data(before, node, {"values": ()})["values"]
            view.add_edge(before, node, values=(*known, value))
    return view


def read_values(node: ir.Node) -> list[ir.Value]:
    """The values a node reads, those its subgraphs take from outside included, each once."""
    values = dict.fromkeys(value for value in node.inputs if value is not None)
    for subgraph in subgraphs(node):
        inside: set[ir.Value] = set(subgraph.inputs)
        for inner in subgraph:
            inside.update(inner.outputs)
            values.update(dict.fromkeys(value for value in read_values(inner) if value not in inside))
        values.update(dict.fromkeys(value for value in subgraph.outputs if value not in inside))
    return list(values)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in the attributes of a node (`If`, `Loop`, `Scan`)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found
