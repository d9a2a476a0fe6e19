from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from verify_models import causal_lm

from effc.errors import ContractError
from effc.ir.program import Program
from effc.passes.base import Contract, Match, Pass, PassReport
from effc.verify.budget import Budget
from effc.verify.compare import compare_outputs
from effc.verify.contracts import ContractCheck
from effc.verify.inputs import FeedShape


@dataclass(frozen=True)
class Edit(Pass):
    """Applies a function; the contract is set per test through a subclass."""

    name: ClassVar[str] = "edit"
    contract: ClassVar[Contract] = Contract.EXACT

    def match(self, program: Program) -> Match:
        return Match()

    def apply(self, program: Program, sites: object) -> PassReport:
        return PassReport()


class Equivalent(Edit):
    contract = Contract.EQUIVALENT


class Approximate(Edit):
    contract = Contract.APPROXIMATE


def check(one: Pass, program: Program, edit, instrument: ContractCheck | None = None) -> dict:
    instrument = instrument or ContractCheck()
    instrument.before(one, program)
    edit(program)
    return dict(instrument.after(one, program, PassReport()))


def scale_layer(program: Program, factor: float, name: str = "mlp.1", axis: int = 1) -> None:
    """Multiply one input of a node, keeping every name."""
    node = next(node for node in program.graph if node.name == name)
    constant = ir.Value(
        name=f"{name}.factor",
        const_value=ir.Tensor(np.float32(factor), name="factor"),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([]),
    )
    program.graph.register_initializer(constant)
    scaled = ir.node("Mul", [node.inputs[axis], constant], name="scale")
    program.graph.insert_before(node, scaled)
    node.replace_input_with(axis, scaled.outputs[0])


def test_an_unchanged_program_is_exact() -> None:
    measured = check(Edit(), causal_lm(), lambda program: None)
    assert measured["bitwise"] is True
    assert measured["max_abs"] == 0
    assert measured["max_rel"] == 0
    assert measured["top1"] == 1
    assert "batch=3 seq=7 past=0 padded" in measured["shapes"]
    assert len(measured["shapes"]) == 5


def test_an_exact_rewrite_keeps_the_bits() -> None:
    def twice_minus(program: Program) -> None:
        """-(-x): the same bits through two more nodes."""
        node = next(node for node in program.graph if node.name == "mlp.0")
        first = ir.node("Neg", [node.inputs[1]])
        second = ir.node("Neg", [first.outputs[0]])
        program.graph.insert_before(node, [first, second])
        node.replace_input_with(1, second.outputs[0])

    assert check(Edit(), causal_lm(), twice_minus)["bitwise"] is True


def test_a_broken_exact_pass_names_pass_shape_and_first_value() -> None:
    with pytest.raises(ContractError) as caught:
        check(Edit(), causal_lm(), lambda program: scale_layer(program, 1 + 2**-20))
    message = str(caught.value)
    assert "pass 'edit' breaks its contract (exact)" in message
    assert "batch=" in message
    assert "First value that is off: 'h.2' (Add 'mlp.1')" in message


def test_rounding_is_equivalent_and_more_is_not() -> None:
    measured = check(Equivalent(), causal_lm(), lambda program: scale_layer(program, 1 + 2**-23))
    assert measured["bitwise"] is False
    assert 0 < measured["max_rel"] <= measured["allowed"]["max_rel"] < 1e-4
    with pytest.raises(ContractError, match=r"differ by more than rounding.*\n.*\n  First value that is off: 'h.1'"):
        check(Equivalent(), causal_lm(), lambda program: scale_layer(program, 1.001, "mlp.0"))


def test_a_wrong_answer_on_an_empty_cache_only_is_found() -> None:
    """A rewrite that drops the mask is right on every shape without padding."""

    def drop_mask(program: Program) -> None:
        for node in program.graph:
            if node.op_type == "Attention":
                node.replace_input_with(3, None)

    with pytest.raises(ContractError, match="padded"):
        check(Equivalent(), causal_lm(), drop_mask)


def test_new_nan_breaks_every_contract() -> None:
    for one in (Edit(), Equivalent(), Approximate()):
        with pytest.raises(ContractError, match="NaN or infinite"):
            check(one, causal_lm(), lambda program: scale_layer(program, float("nan")))


def test_budget_is_enforced_and_measured_from_the_first_approximate_pass() -> None:
    program, instrument = causal_lm(), ContractCheck(budget=Budget(max_rel=0.8))
    first = check(Approximate(), program, lambda p: scale_layer(p, 1.2), instrument)
    second = check(Approximate(), program, lambda p: scale_layer(p, 1.2, "mlp.0"), instrument)
    assert 0 < first["max_rel"] < second["max_rel"] <= 0.8
    assert second["kl"] > first["kl"] > 0
    with pytest.raises(ContractError, match=r"the budget allows 0\.8"):
        check(Approximate(), program, lambda p: scale_layer(p, 40.0, "add.0"), instrument)


def test_without_a_budget_an_approximation_is_measured() -> None:
    measured = check(Approximate(), causal_lm(), lambda program: scale_layer(program, 2.0))
    assert measured["max_rel"] > 0.01
    assert measured["allowed"] == {}


def test_a_lost_output_is_named() -> None:
    def drop(program: Program) -> None:
        program.graph.outputs.pop()

    with pytest.raises(ContractError, match=r"present\.1\.value are gone"):
        check(Equivalent(), causal_lm(), drop)


def half_cache(program: Program, factor: float = 1.0) -> None:
    """Keep the keys of the first layer in half precision, times a factor when they are read."""
    key = next(value for value in program.graph.inputs if value.name == "past_key_values.0.key")
    key.dtype = ir.DataType.FLOAT16
    node = next(node for node in program.graph if node.name == "attention.0")
    cast = ir.node("Cast", [key], {"to": int(ir.DataType.FLOAT)})
    number = ir.node("Constant", [], {"value": ir.Tensor(np.float32(factor), name="factor")})
    scaled = ir.node("Mul", [cast.outputs[0], number.outputs[0]])
    program.graph.insert_before(node, [cast, number, scaled])
    node.replace_input_with(4, scaled.outputs[0])
    back = ir.node("Cast", [node.outputs[1]], {"to": int(ir.DataType.FLOAT16)})
    program.graph.insert_after(node, back)
    index = list(program.graph.outputs).index(node.outputs[1])
    node.outputs[1].name, back.outputs[0].name = "present.0.key.float", "present.0.key"
    back.outputs[0].dtype = ir.DataType.FLOAT16
    program.graph.outputs[index] = back.outputs[0]


def test_a_cache_of_another_form_is_built_by_each_program() -> None:
    measured = check(Approximate(), causal_lm(), half_cache)
    assert measured["not_compared"] == ["present.0.key"]
    assert "batch=1 seq=6 past=61" in measured["shapes"]
    assert 0 < measured["max_rel"] < 1e-2


def test_a_cache_that_is_read_wrongly_is_found_at_a_past() -> None:
    with pytest.raises(ContractError, match=r"Worst: output '.*' at batch=\d seq=\d past=[1-9]"):
        check(Equivalent(), causal_lm(), lambda program: half_cache(program, 0.5))


def test_a_graph_that_cannot_run_is_a_broken_contract() -> None:
    def ruin(program: Program) -> None:
        node = next(node for node in program.graph if node.name == "mlp.0")
        node.replace_input_with(1, program.graph.inputs[3])

    with pytest.raises(ContractError, match="left a graph that cannot be run"):
        check(Edit(), causal_lm(), ruin)


def test_a_graph_that_is_not_whole_is_a_broken_contract() -> None:
    def detach(program: Program) -> None:
        node = next(node for node in program.graph if node.name == "mlp.0")
        node.replace_input_with(1, ir.node("Neg", [node.inputs[1]]).outputs[0])

    with pytest.raises(ContractError, match="the graph is not whole"):
        check(Edit(), causal_lm(), detach)


def test_quick_and_own_shapes() -> None:
    for shapes, expected in (
        ("quick", ["batch=2 seq=5 past=4 padded"]),
        ([FeedShape(1, 2, 3)], ["batch=1 seq=2 past=3"]),
    ):
        measured = check(Edit(), causal_lm(1), lambda program: None, ContractCheck(shapes, limit=1))
        assert measured["shapes"] == expected


def test_outputs_are_reused_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import effc.verify.snapshot as snapshot

    runs = []
    evaluate = snapshot.evaluate
    monkeypatch.setattr(snapshot, "evaluate", lambda *a, **k: runs.append(1) or evaluate(*a, **k))
    program, instrument = causal_lm(1), ContractCheck()
    for _ in range(3):
        check(Edit(), program, lambda p: None, instrument)
    assert len(runs) == 4


def test_codes_of_a_cache_are_compared_by_their_bits() -> None:
    shape = FeedShape(1, 1, 1)
    logits, codes = np.ones((1, 1, 4), np.float32), np.full((1, 2, 2, 8), 7, np.int8)
    moved = codes.copy()
    moved[0, 0, 1, 3] += 1
    found = compare_outputs({"logits": logits, "present.0.key": codes}, {"logits": logits, "present.0.key": moved},
                            shape, np.ones((1, 2), np.int64))  # fmt: skip
    assert not found.overall().bitwise
    assert found.overall().max_rel == 0
