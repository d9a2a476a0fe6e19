"""Analyses on a small gated decoder in canonical form, and costs against counts by hand."""

import itertools

import networkx as nx
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from effc.errors import UsageError
from effc.ir.analysis.attention import attention_sites
from effc.ir.analysis.cost import critical_path, node_costs, total_cost
from effc.ir.analysis.embedding import embedding_sites
from effc.ir.analysis.gated_mlp import gated_mlp_sites
from effc.ir.analysis.graph_view import graph_view
from effc.ir.analysis.layer_names import layer_in
from effc.ir.analysis.linear import linear_sites
from effc.ir.analysis.norm import norm_sites
from effc.ir.analysis.residual_blocks import residual_blocks
from effc.ir.rewrite.inference import infer_graph

WEIGHTS = {
    "model.embed": (50, 16),
    "model.layers.0.norm1": (16,),
    "model.layers.0.q": (16, 16),
    "model.layers.0.k": (8, 16),
    "model.layers.0.v": (8, 16),
    "model.layers.0.o": (16, 16),
    "model.layers.0.norm2": (16,),
    "model.layers.0.gate": (24, 16),
    "model.layers.0.up": (24, 16),
    "model.layers.0.down": (16, 24),
    "model.layers.0.bias": (24,),
}


@pytest.fixture
def graph() -> ir.Graph:
    def linear(out: str, x: str, name: str) -> str:
        return f"{out}_t = Transpose<perm = [1, 0]>({name})\n {out} = MatMul({x}, {out}_t)\n"

    names = {name: name.replace("model.layers.0.", "w_").replace("model.embed", "w_embed") for name in WEIGHTS}
    body = (
        "x = Gather(w_embed, ids)\n n1 = RMSNormalization<axis = -1>(x, w_norm1)\n"
        + linear("q0", "n1", "w_q")
        + linear("k0", "n1", "w_k")
        + linear("v0", "n1", "w_v")
        + "q1 = Reshape(q0, heads)\n q = Transpose<perm = [0, 2, 1, 3]>(q1)\n"
        + "k1 = Reshape(k0, kv)\n k = Transpose<perm = [0, 2, 1, 3]>(k1)\n"
        + "v1 = Reshape(v0, kv)\n v = Transpose<perm = [0, 2, 1, 3]>(v1)\n"
        + "a, pk, pv = Attention<is_causal = 1, scale = 0.5>(q, k, v, , past_k, past_v)\n"
        + "a1 = Transpose<perm = [0, 2, 1, 3]>(a)\n a2 = Reshape(a1, rows)\n"
        + linear("o", "a2", "w_o")
        + "r1 = Add(x, o)\n n2 = RMSNormalization<axis = -1>(r1, w_norm2)\n"
        + linear("g", "n2", "w_gate")
        + "gb = Add(g, w_bias)\n s = Sigmoid(gb)\n act = Mul(gb, s)\n"
        + linear("u", "n2", "w_up")
        + "m = Mul(act, u)\n"
        + linear("d", "m", "w_down")
        + "r2 = Add(r1, d)\n"
        + linear("y", "r2", "w_embed")
    )
    weights = ", ".join(f"float[{','.join(map(str, shape))}] {names[name]}" for name, shape in WEIGHTS.items())
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 24]> g (int64[batch,seq] ids, float[batch,1,past,8] past_k, '
        f"float[batch,1,past,8] past_v, {weights}) => "
        "(float[batch,seq,50] y, float[batch,1,t,8] pk, float[batch,1,t,8] pv) "
        f"<int64[4] heads = {{0, 0, 2, 8}}, int64[4] kv = {{0, 0, 1, 8}}, int64[3] rows = {{0, 0, 16}}> {{ {body} }}"
    )
    result = ir.from_proto(proto).graph
    real = {short: name for name, short in names.items()}
    for value in [value for value in result.inputs if value.name in real]:
        result.inputs.remove(value)
        value.const_value = ir.tensor(np.zeros(WEIGHTS[real[value.name]], np.float32))
        value.name = real[value.name]
        result.register_initializer(value)
    infer_graph(result)
    return result


def test_attention(graph: ir.Graph) -> None:
    (site,) = attention_sites(graph)
    assert (site.name, site.heads, site.kv_heads, site.head_size, site.value_size) == ("attention layers.0", 2, 1, 8, 8)
    assert (site.scale, site.softcap, site.causal, site.window, site.understood) == (0.5, 0.0, True, None, True)
    assert (str(site.queries), str(site.keys)) == ("seq", "past + seq")
    assert site.past_key.name == "past_k"
    assert site.present_value.name == "pv"


def test_linear(graph: ir.Graph) -> None:
    sites = {site.name: site for site in linear_sites(graph)}
    assert len(sites) == 8
    gate = sites["model.layers.0.gate"]
    assert (gate.n, gate.k, gate.transposed, gate.uses) == (24, 16, True, 1)
    assert gate.bias.name == "model.layers.0.bias"
    assert gate.output is gate.bias_node.outputs[0]
    assert sites["model.embed"].uses == 2
    assert [node.op_type for node in gate.route] == ["Transpose"]


def test_embedding_norm_and_gated_mlp(graph: ir.Graph) -> None:
    (table,) = embedding_sites(graph)
    assert (table.rows, table.width, table.uses) == (50, 16, 2)
    assert [(site.kind, site.width) for site in norm_sites(graph)] == [("rms", 16), ("rms", 16)]
    (mlp,) = gated_mlp_sites(graph)
    assert mlp.activation == "silu"
    assert (mlp.gate.name, mlp.up.name, mlp.down.name) == tuple(
        f"model.layers.0.{part}" for part in ("gate", "up", "down")
    )


def test_residual_blocks(graph: ir.Graph) -> None:
    blocks = residual_blocks(graph)
    assert [block.kind for block in blocks] == ["attention", "feed-forward"]
    assert blocks[0].exit is blocks[1].entry
    assert blocks[1].nodes[-1] is blocks[1].add


def test_graph_view_is_acyclic_and_complete(graph: ir.Graph) -> None:
    view = graph_view(graph)
    assert nx.is_directed_acyclic_graph(view)
    assert view.number_of_nodes() == len(list(graph))


def test_costs_by_hand(graph: ir.Graph) -> None:
    sizes = {"batch": 2, "seq": 3, "past": 5}
    costs = node_costs(graph, sizes)
    gate = next(site for site in linear_sites(graph) if site.name == "model.layers.0.gate")
    assert costs[gate.node].flops == 2 * 2 * 3 * 24 * 16
    (attention,) = attention_sites(graph)
    assert costs[attention.node].flops == 2 * 2 * 3 * 8 * (2 * 8 + 5 + 2 * 8)
    (table,) = embedding_sites(graph)
    assert costs[table.node].read == costs[table.node].written == 2 * 3 * 16 * 4
    assert total_cost(costs).flops == sum(cost.flops for cost in costs.values())
    with pytest.raises(UsageError, match="seq"):
        node_costs(graph, {"batch": 1})


def test_critical_path(graph: ir.Graph) -> None:
    path = critical_path(graph, dict.fromkeys(graph, 1.0))
    assert path[-1].outputs[0].name == "y"
    for before, node in itertools.pairwise(path):
        assert before in [value.producer() for value in node.inputs if value is not None]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.weight", "layers.3"),
        ("transformer.h.11.attn.bias", "h.11"),
        ("/encoder/layer.2/MatMul", "layer.2"),
        ("past_key_values.7.key", "layers.7"),
        ("lm_head.weight", None),
        (None, None),
    ],
)
def test_layer_names(name: str | None, layer: str | None) -> None:
    assert layer_in(name) == layer
