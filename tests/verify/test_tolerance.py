import numpy as np
import onnx_ir as ir
import pytest
from verify_models import causal_lm

from effc.ir.dialect.cache_storage import DenseStorage
from effc.ir.dialect.cached_attention import AttentionForm, cached_attention
from effc.verify.inputs import FeedShape
from effc.verify.snapshot import Snapshot
from effc.verify.tolerance import contraction_depth, equivalence_tolerance


def test_depth_counts_the_longest_path() -> None:
    assert contraction_depth(causal_lm(1).graph) == 1 + 2 + 1 + 2 + 1
    assert contraction_depth(causal_lm(3).graph) == 3 * 6 + 1


def test_tolerance_follows_depth_length_and_dtype() -> None:
    one, two = (equivalence_tolerance(causal_lm(layers).graph) for layers in (1, 2))
    assert two.max_rel / one.max_rel == pytest.approx(13 / 7)
    assert one.length == 16
    assert one.roundoff == 2.0**-24
    half = causal_lm(1)
    half.graph.outputs[0].dtype = ir.DataType.FLOAT16
    assert equivalence_tolerance(half.graph).roundoff == 2.0**-11


def test_a_reordered_sum_stays_inside_and_a_changed_weight_does_not() -> None:
    """Reordering the inner axis of every product changes rounding only."""
    program = causal_lm(4)
    reference = Snapshot(program)
    order = np.random.default_rng(0).permutation(16)
    for layer in range(4):
        for name, axis in (("up", 0), ("down", 1)):
            value = program.graph.initializers[f"l{layer}.{name}"]
            array = np.take(value.const_value.numpy(), order, axis=axis)
            value.const_value = ir.Tensor(array, name=value.name)
    shape, bound = FeedShape(2, 9), equivalence_tolerance(program.graph).max_rel
    expected, outputs = reference.at(shape)["logits"], Snapshot(program).at(shape)["logits"]
    distance = np.abs(expected - outputs).max() / np.sqrt(np.mean(expected**2))
    assert 0 < distance < bound / 2
    assert bound < 1e-4


def test_the_type_a_cache_is_stored_in_is_not_computed_in() -> None:
    def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    operands = [value(name, ir.DataType.FLOAT, "batch", "seq", 16) for name in "qkv"]
    operands.append(value("valid", ir.DataType.BOOL, "batch", "total"))
    past = [value(name, ir.DataType.BFLOAT16, "batch", 1, "past", 16) for name in ("key", "value")]
    node = cached_attention(operands, past, AttentionForm(1, 1, 16, 16, 0.25), DenseStorage(ir.DataType.BFLOAT16))
    graph = ir.Graph([*operands, *past], node.outputs, nodes=[node], name="attention")
    assert equivalence_tolerance(graph).roundoff == 2.0**-24
