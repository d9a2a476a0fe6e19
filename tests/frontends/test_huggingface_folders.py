"""Weights of Hugging Face folders: bound lazily, in their stored dtype, tied as declared; bad folders are refused."""

import json
import os
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from effc.errors import InputError, MissingDependencyError, UsageError
from effc.frontends import import_model, lowering

TRACED = {}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 80,
}


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes}))


@pytest.fixture(autouse=True)
def _trace_each_configuration_once(monkeypatch):
    """Tracing takes seconds and depends on class and configuration only; graphs are cloned."""

    def remembered(architecture, progress):
        key = (architecture.model_class, str(architecture.config), architecture.task)
        if key not in TRACED:
            TRACED[key] = lowering.lower(architecture, progress)
        return replace(TRACED[key], graph=TRACED[key].graph.clone())

    monkeypatch.setattr("effc.frontends.huggingface.lower", remembered)
    monkeypatch.setattr("effc.frontends.checked.lower", remembered)


@pytest.fixture
def folder(save):
    return save(llama())


def test_weights_keep_their_names_shapes_and_bytes(folder):
    program = import_model(folder, check=False)
    stored = load_file(folder / "model.safetensors")
    initializers = program.graph.initializers
    for name, array in stored.items():
        assert initializers[name].const_value.numpy().tobytes() == array.tobytes()
    assert program.source.kind == "huggingface"
    assert program.source.weight_bytes == sum(array.nbytes for array in stored.values())
    assert program.model.opset_imports[""] == 24


@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", ir.DataType.BFLOAT16), ("float16", ir.DataType.FLOAT16)])
def test_half_precision_stays_stored_and_is_cast_for_computing(save, dtype, element):
    folder = save(llama().to(getattr(torch, dtype)))
    program = import_model(folder)
    weight = program.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype is element
    (use,) = weight.uses()
    assert use.node.op_type == "Cast"
    assert use.node.attributes["to"].as_int() == ir.DataType.FLOAT
    assert all(output.dtype is ir.DataType.FLOAT for output in program.graph.outputs)


def test_dtype_rounds_to_nearest_even(folder):
    program = import_model(folder, dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert program.graph.initializers["model.norm.weight"].const_value.numpy().tobytes() == (
        stored.astype(ml_dtypes.bfloat16).tobytes()
    )
    with pytest.raises(UsageError, match="int3"):
        import_model(folder, dtype="int3")


def embeddings(program):
    return [name for name, value in program.graph.initializers.items() if 61 in list(value.shape)]


def test_declared_ties_are_one_weight_also_when_both_are_stored(save):
    folder = save(llama(tie_word_embeddings=True))
    assert embeddings(import_model(folder)) == ["model.embed_tokens.weight"]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, path)
    assert embeddings(import_model(folder)) == ["model.embed_tokens.weight"]


def test_a_tie_stored_under_its_other_name_is_found(save):
    folder = save(llama(tie_word_embeddings=True))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    assert len(embeddings(import_model(folder))) == 1


def test_a_declared_tie_that_differs_stays_two_weights(save):
    folder = save(llama(tie_word_embeddings=True))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, path, metadata={"format": "pt"})
    program = import_model(folder)
    assert len(embeddings(program)) == 2
    assert any("differ in the checkpoint" in note for note in program.source.notes)


def test_an_untied_model_is_never_tied(save):
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    assert len(embeddings(import_model(save(model)))) == 2


def test_a_missing_parameter_is_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        import_model(folder, check=False)


def test_a_wrong_shape_is_named(folder, edit_config):
    edit_config(folder, intermediate_size=20)
    with pytest.raises(InputError, match=r"mlp.* is \[24, 16\], the configuration says \[20, 16\]"):
        import_model(folder, check=False)


def test_shards_and_a_base_model_checkpoint_bind(save):
    program = import_model(save(llama(), max_shard_size="5KB"), check=False)
    torch.manual_seed(0)
    prefixless = save(transformers.LlamaModel(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)), "base")
    path = prefixless / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "architectures": ["LlamaForCausalLM"]}))
    based = import_model(prefixless, check=False)
    assert set(based.graph.initializers) <= set(program.graph.initializers)


def test_the_content_hash_tells_weights_and_configurations_apart(save, edit_config):
    hashes = set()
    for index, scale in enumerate((1.0, 2.0)):
        model = llama()
        model.model.norm.weight.data.mul_(scale)
        folder = save(model, f"m{index}")
        hashes.add(import_model(folder, check=False).source.content_hash)
    edit_config(folder, rope_theta=5.0)
    hashes.add(import_model(folder, check=False).source.content_hash)
    assert len(hashes) == 3


def test_a_twin_needs_no_weights_and_keeps_the_dtype(save, edit_config):
    folder = save(llama(num_hidden_layers=5).to(torch.bfloat16))
    program = import_model(folder, twin=True)
    assert len(program.cache_pairs()) == 4
    (folder / "model.safetensors").unlink()
    again = import_model(folder, twin=True, check=False)
    name = "model.layers.1.self_attn.q_proj.weight"
    first, second = (item.graph.initializers[name].const_value for item in (program, again))
    assert first.dtype is ir.DataType.BFLOAT16
    assert first.numpy().tobytes() == second.numpy().tobytes()
    assert 0.01 < first.numpy().astype(np.float32).std() < 0.03


def test_a_twin_keeps_one_layer_of_each_kind():
    from effc.frontends.twin import cut

    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    config = transformers.Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 7}, layer_types=kinds)
    assert cut(config).layer_types == ["sliding_attention", "full_attention"]
    assert cut(config).num_hidden_layers == 2


def test_the_cache_layout_of_the_hub_is_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(index))
        os.symlink(f"../../blobs/{index}", snapshot / file.name)
    assert import_model(snapshot).source.weight_bytes > 0


def test_no_torch_weight_is_kept(folder):
    program = import_model(folder, check=False)
    assert not [value for value in program.graph.initializers.values() if "torch" in type(value.const_value).__module__]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": None}, "no `model_type`"),
        ({"model_type": 3}, "no `model_type`"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"hidden_size": 15}, "does not make a LlamaForCausalLM|cannot be configured"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}},
            "never runs",
        ),
    ],
)
def test_a_bad_configuration_is_refused(folder, edit_config, changes, words):
    (folder / "own.py").write_text("raise SystemExit('code from the folder ran')")
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=words):
        import_model(folder)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "[" * 100_000])
def test_a_missing_or_damaged_configuration_is_refused(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        import_model(folder)


def test_state_space_models_are_refused(save):
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(InputError, match="state-space"):
        import_model(save(transformers.MambaForCausalLM(config)))


def test_the_task_must_fit(folder):
    with pytest.raises(UsageError, match="is a causal language model"):
        import_model(folder, task="vision")
    with pytest.raises(UsageError, match="task 'nonsense' is unknown"):
        import_model(folder, task="nonsense")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="downloads nothing"):
        import_model("some/unknown-model")
    with pytest.raises(InputError, match="downloads nothing"):
        import_model(tmp_path / "missing")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="Pass the folder"):
        import_model(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="is no model effc knows"):
        import_model(3)


def test_a_missing_library_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "effc\[torch\]"'):
        import_model(folder)


def test_assets_are_flat_and_resolved(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assets = import_model(folder, check=False).source.assets
    assert {"tokenizer.json", "generation_config.json", "modules.json", "1_Pooling_config.json"} <= set(assets)
    (folder / "modules.json").write_text(json.dumps([{"path": "../outside"}]))
    with pytest.raises(InputError, match="not a plain sub-folder"):
        import_model(folder, check=False)


def test_a_module_in_memory_imports_like_its_folder(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    program, other = import_model(model), import_model(folder, check=False)
    assert set(program.graph.initializers) == set(other.graph.initializers)
    assert program.source.kind == "memory"


def test_the_text_tower_of_a_pair(save):
    text = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    program = import_model(save(transformers.CLIPModel(config)), task="encoder")
    assert [output.name for output in program.graph.outputs] == ["last_hidden_state", "text_embeds"]


def test_a_hub_id_in_the_local_cache_is_found(folder, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("a" * 40))
    program = import_model("some/llama", check=False)
    assert program.source.name == "some/llama"


def test_a_vision_language_model_gives_its_text_decoder(save):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        image_token_index=60,
    )
    program = import_model(save(transformers.LlavaForConditionalGeneration(config)))
    assert len(program.cache_pairs()) == 4
    assert not [name for name in program.graph.initializers if "vision" in name]
    assert any("image tower is left out" in note for note in program.source.notes)
