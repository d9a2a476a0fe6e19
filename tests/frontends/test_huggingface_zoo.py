"""Every family imports, matches torch at four shapes (the import's own check), and has the agreed interface."""

import importlib.util
from pathlib import Path

import pytest
import torch

from effc.frontends import import_model
from effc.ir.program import Task

_spec = importlib.util.spec_from_file_location("frontends_zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)

QUICK = {"llama", "gemma3", "gpt2", "mixtral", "bert", "t5", "vit", "clip"}


def _family(table):
    return [
        pytest.param(make, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, make in table.items()
    ]


def _compared(program):
    return any(note.startswith("Compared with torch in onnxruntime") for note in program.source.notes)


@pytest.mark.parametrize("make", _family(zoo.CAUSAL))
def test_decoders_match_torch(make, save):
    torch.manual_seed(0)
    program = import_model(save(make()))
    assert program.task is Task.CAUSAL_LM
    assert _compared(program)
    names = [value.name for value in program.graph.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    shapes = {value.name: str(value.shape) for value in (*program.graph.inputs, *program.graph.outputs)}
    assert shapes["input_ids"] == "[batch,seq]"
    assert shapes["attention_mask"] == "[batch,total]"
    assert shapes["past_key_values.0.key"].startswith("[batch,") and ",past," in shapes["past_key_values.0.key"]
    assert ",total," in shapes["present.1.value"]
    assert shapes["logits"] == "[batch,seq,101]"
    assert len(program.cache_pairs()) == 4


@pytest.mark.parametrize("make", _family(zoo.ENCODERS))
def test_encoders_match_torch(make, save):
    torch.manual_seed(0)
    program = import_model(save(make()))
    assert program.task is Task.ENCODER
    assert _compared(program)
    assert program.graph.outputs[0].name in ("last_hidden_state", "logits")


@pytest.mark.parametrize("make", _family(zoo.IMAGES))
def test_image_models_match_torch(make, save):
    torch.manual_seed(0)
    program = import_model(save(make()))
    assert program.task is Task.VISION
    assert _compared(program)
    assert str(program.graph.inputs[0].shape).startswith("[batch,")
