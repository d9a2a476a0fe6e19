"""A networkx view of a graph: nodes are graph nodes, edges carry the values between them."""

from __future__ import annotations

import networkx as nx
import onnx_ir as ir

from effc.ir.rewrite.dataflow import read_values


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
