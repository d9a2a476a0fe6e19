import zipfile

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from effc.errors import InputError, UsageError
from effc.frontends import import_model


class Tied(torch.nn.Module):
    """Two products with one weight, and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.scale


def test_a_module_gets_a_dynamic_batch(run):
    module = Tied().eval()
    program = import_model(module, example_inputs=(torch.randn(1, 5, 8),))
    assert str(program.graph.inputs[0].shape) == "[batch,5,8]"
    assert program.graph.inputs[0].name == "x"
    x = torch.randn(7, 5, 8)
    with torch.no_grad():
        np.testing.assert_allclose(run(program, {"x": x.numpy()})["output"], module(x).numpy(), rtol=1e-5, atol=1e-5)
    assert [list(value.shape) for value in program.graph.initializers.values()].count([8, 8]) == 1
    assert any("batch 1, batch 2, batch 3, batch 5" in note for note in program.source.notes)


def test_training_mode_and_half_precision_are_handled():
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Dropout(0.5)).to(torch.bfloat16).train()
    program = import_model(module, example_inputs=torch.randn(2, 8))
    assert module.training
    weight = program.graph.initializers["0.weight"]
    assert weight.dtype is ir.DataType.BFLOAT16
    assert weight.const_value.numpy().dtype == ml_dtypes.bfloat16


def test_keyword_inputs_and_named_outputs():
    class Heads(torch.nn.Module):
        def forward(self, a, b):
            return {"total": a + b, "other": a - b}

    program = import_model(Heads(), example_inputs={"b": torch.ones(2, 3), "a": torch.ones(2, 3)})
    assert [value.name for value in program.graph.inputs] == ["b", "a"]
    assert [value.name for value in program.graph.outputs] == ["total", "other"]


def test_a_module_that_fixes_its_batch_is_exported_fixed():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(6)

    program = import_model(Fixed(), example_inputs=(torch.ones(2, 3),))
    assert str(program.graph.inputs[0].shape) == "[2,3]"
    assert any("batch is fixed" in note for note in program.source.notes)


def test_a_partly_dynamic_shape_stays_partly_dynamic(run):
    class View(torch.nn.Module):
        def forward(self, x):
            return torch.softmax(x.reshape(x.size(0), -1), dim=1)

    program = import_model(View(), example_inputs=(torch.randn(4, 20, 16),))
    assert str(program.graph.inputs[0].shape) == "[batch,20,16]"
    assert run(program, {"x": np.zeros((7, 20, 16), np.float32)})["output"].shape == (7, 320)


def test_attention_with_dynamic_batch_and_length(run):
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(64, 8, batch_first=True).eval()

    class Self(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    exported = torch.export.export(
        Self().eval(), (torch.randn(2, 16, 64),), dynamic_shapes=({0: batch, 1: length},), strict=False
    )
    program = import_model(exported)
    assert program.source.kind == "torch-export"
    for shape in ((2, 16, 64), (3, 5, 64), (1, 1, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = attention(x, x, x, need_weights=False)[0].numpy()
        name = program.graph.inputs[0].name
        np.testing.assert_allclose(run(program, {name: x.numpy()})["output"], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def pt2(tmp_path):
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Tied().eval(), (torch.randn(2, 8),)), path)
    return path


def test_a_saved_program_is_imported(pt2):
    program = import_model(pt2)
    assert [list(value.shape) for value in program.graph.initializers.values()].count([8, 8]) == 1
    assert any("the example inputs" in note for note in program.source.notes)
    assert len(program.source.content_hash) == 64


def test_an_archive_with_pickled_objects_is_refused(pt2):
    with zipfile.ZipFile(pt2, "a") as archive:
        archive.writestr("model/data/constants/opaque_obj_0", b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="does not load"):
        import_model(pt2)


@pytest.mark.parametrize("keep", [0, 100, -50])
def test_a_truncated_archive_is_refused(pt2, keep):
    data = pt2.read_bytes()
    pt2.write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"not a \.pt2 archive|cannot be loaded"):
        import_model(pt2)


def test_an_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(InputError, match="cannot be loaded"):
        import_model(path)


def test_wrong_examples_are_refused():
    with pytest.raises(UsageError, match="needs example_inputs"):
        import_model(Tied())
    with pytest.raises(UsageError, match="must be tensors"):
        import_model(Tied(), example_inputs=(3,))
    with pytest.raises(UsageError, match="must be tensors"):
        import_model(Tied(), example_inputs=())


def test_nested_outputs_are_all_kept(run):
    module = torch.nn.GRU(4, 4, batch_first=True).eval()

    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = module

        def forward(self, x):
            rows, state = self.gru(x)
            return rows, (state[0], None, {"last": rows[:, -1]})

    program = import_model(Nested(), example_inputs=torch.randn(2, 3, 4))
    assert [value.name for value in program.graph.outputs] == ["output_0", "output_1_0", "output_1_2_last"]
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = module(x)[1][0].numpy()
    np.testing.assert_allclose(run(program, {"x": x.numpy()})["output_1_0"], expected, rtol=1e-5, atol=1e-6)


class Silent(torch.nn.Module):
    def forward(self, x):
        return None


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Tied(), torch.ones(2, 7), r"does not run on example_inputs x\[2, 7\]"),
        (Tied(), {"q": torch.ones(2, 8)}, "names q; forward takes x"),
        (Silent(), torch.ones(2), "returns no tensors"),
        (torch.nn.Linear(8, 8, device="meta"), torch.ones(2, 8), "meta device"),
        (torch.jit.script(torch.nn.Linear(8, 8)), torch.ones(2, 8), "TorchScript"),
    ],
    ids=["shape", "name", "nothing", "meta", "script"],
)
def test_modules_that_do_not_run_are_refused_in_words(module, inputs, message):
    with pytest.raises((InputError, UsageError), match=message):
        import_model(module, example_inputs=inputs)
