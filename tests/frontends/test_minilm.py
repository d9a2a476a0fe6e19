"""all-MiniLM-L6-v2, a real encoder."""

import numpy as np
import torch
import transformers

from effc.frontends import import_model
from effc.ir.program import Task


def test_minilm(minilm_folder, run):
    program = import_model(minilm_folder)
    assert program.task is Task.ENCODER
    assert [value.name for value in program.graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [str(value.shape) for value in program.graph.outputs] == ["[batch,seq,384]"]
    assert {"tokenizer.json", "modules.json", "1_Pooling_config.json"} <= set(program.source.assets)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    tokens = tokenizer(["one", "a longer sentence, with more words"], padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state.numpy()
    got = run(program, {name: tensor.numpy() for name, tensor in tokens.items()})["last_hidden_state"]
    mask = tokens["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-4, atol=1e-5)
