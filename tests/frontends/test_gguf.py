"""GGUF files: damaged headers refused; values, names and layouts equal to transformers' own loading."""

import struct

import gguf
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from effc.errors import InputError
from effc.frontends import import_model
from effc.frontends.gguf_header import KEPT_ARRAY, read_gguf_header
from effc.frontends.gguf_tensors import dequantise

HEADS, KV_HEADS, HIDDEN, WIDTH, VOCABULARY = 4, 2, 64, 96, 70


def write_llama(path, quantised=None, tied=True, alignment=None, layers=2):
    """A small llama with random weights; matrices in the given block type, else float16."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    if not tied:
        shapes["output"] = (VOCABULARY, HIDDEN)
    for layer in range(layers):
        block = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        block |= {"attn_output": (HIDDEN, HIDDEN), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        block |= {"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32) * 0.1
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
        elif quantised is None:
            writer.add_tensor(f"{name}.weight", values.astype(np.float16))
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference(path):
    """The state dict transformers loads, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_quantised_weights_equal_those_of_transformers(tmp_path):
    path = write_llama(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    expected = reference(path)
    exact = import_model(path, dtype="float32")
    rounded = import_model(path, check=False)
    assert set(exact.graph.initializers) >= set(expected) - {"lm_head.weight"}
    for name, values in expected.items():
        if name == "lm_head.weight":
            continue
        assert exact.graph.initializers[name].const_value.numpy().tobytes() == values.tobytes(), name
        stored = rounded.graph.initializers[name].const_value
        assert stored.dtype is (ir.DataType.BFLOAT16 if values.ndim == 2 else ir.DataType.FLOAT)
        assert (
            stored.numpy().astype(np.float32).tobytes()
            == (values.astype(ml_dtypes.bfloat16).astype(np.float32) if values.ndim == 2 else values).tobytes()
        )
    assert any("15 Q8_0) are dequantised to bfloat16, rounded to nearest even" in note for note in rounded.source.notes)
    assert any(note.startswith("Compared with torch") for note in exact.source.notes)
    assert any("gives no tokenizer" in note for note in exact.source.notes)


def test_plain_types_are_kept_and_an_untied_head_stays(tmp_path):
    path = write_llama(tmp_path / "m.gguf", tied=False)
    program = import_model(path)
    expected = reference(path)
    assert program.graph.initializers["lm_head.weight"].dtype is ir.DataType.FLOAT16
    assert program.graph.initializers["model.norm.weight"].dtype is ir.DataType.FLOAT
    for name, values in expected.items():
        stored = program.graph.initializers[name].const_value.numpy()
        assert stored.astype(np.float32).tobytes() == values.tobytes(), name


@pytest.mark.parametrize("rows", [1, 3, 257])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_dequantising_in_steps_equals_doing_it_at_once(tmp_path, monkeypatch, rows, kind):
    kind = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((rows, 64), dtype=np.float32)
    blocks = gguf.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("effc.frontends.gguf_tensors.ROWS_AT_ONCE", 128)
    (tensor,) = read_gguf_header(tmp_path / "m.gguf").tensors
    result = dequantise(tmp_path / "m.gguf", tensor, ir.DataType.FLOAT)
    assert result.tobytes() == gguf.dequantize(blocks, kind).tobytes()


def test_a_twin_of_a_gguf_file(tmp_path):
    path = write_llama(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    program = import_model(path, twin=True, check=False)
    assert program.graph.initializers["model.embed_tokens.weight"].dtype is ir.DataType.BFLOAT16


def test_twins_of_different_files_have_different_hashes(tmp_path):
    one, two, same = (write_llama(tmp_path / f"{n}.gguf", layers=2 + n % 2) for n in range(3))
    hashes = [import_model(path, twin=True, check=False).source.content_hash for path in (one, two, same)]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("alignment", [64, 4096])
def test_a_file_with_an_alignment_of_its_own(tmp_path, alignment):
    path = write_llama(tmp_path / "m.gguf", alignment=alignment)
    weight = import_model(path, check=False).graph.initializers["model.embed_tokens.weight"]
    plain = import_model(write_llama(tmp_path / "p.gguf"), check=False).graph.initializers["model.embed_tokens.weight"]
    assert weight.const_value.tobytes() == plain.const_value.tobytes()


def test_the_header_says_what_the_gguf_package_reads(tmp_path):
    path = write_llama(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.architecture == "llama"
    found = {tensor.name: (tensor.shape, tensor.kind, tensor.offset, tensor.nbytes) for tensor in header.tensors}
    assert found == {
        tensor.name: (tuple(map(int, tensor.shape[::-1])), tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        for tensor in reader.tensors
    }


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = pair("general.architecture", 8, text("llama"))


def tensor(name="t", dims=(8,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(tensors=(), pairs=(ARCHITECTURE,), data=b"", version=3, counts=None, magic=b"GGUF"):
    counts = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def array(kind, count, data=b""):
    return struct.pack("<IQ", kind, count) + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "fewer than a header"),
        (b"GGUF", "fewer than a header"),
        (file(magic=b"GGML"), "does not begin with `GGUF`"),
        (file(version=1), "GGUF version 1"),
        (file(version=4), "GGUF version 4"),
        (file(version=3 << 24), "big-endian"),
        (file(counts=(1 << 40, 1)), "tensors, more than fit"),
        (file(counts=(0, 1 << 40)), "key-value pairs, more than fit"),
        (file(counts=(0, 3)), "ends inside|unknown value type|appears twice|no `general.architecture`"),
        (file(pairs=()), "no `general.architecture`"),
        (file(pairs=(pair("general.architecture", 4, struct.pack("<I", 1)),)), "no `general.architecture`"),
        (file(pairs=(ARCHITECTURE, ARCHITECTURE)), "appears twice"),
        (file(pairs=(pair("k", 8, struct.pack("<Q", 1 << 60)),)), "ends inside k"),
        (file(pairs=(pair("k", 8, struct.pack("<Q", 2) + b"\xff\xfe"),)), "not UTF-8"),
        (file(pairs=(pair("k", 13, b""),)), "unknown value type 13"),
        (file(pairs=(pair("k", 9, array(4, 1 << 60)),)), "more than fit"),
        (file(pairs=(pair("k", 9, array(8, 1 << 60)),)), "more than fit"),
        (file(pairs=(pair("k", 9, array(9, 1)),)), "unsupported type 9"),
        (file(pairs=(pair("k", 9, array(8, KEPT_ARRAY + 1, struct.pack("<Q", 1 << 40) * (KEPT_ARRAY + 1))),)), "ends"),
        (file([tensor(dims=(8,) * 5)], data=bytes(64)), "5 dimensions"),
        (file([tensor(dims=())], data=bytes(64)), "0 dimensions"),
        (file([tensor(dims=(0,))], data=bytes(64)), "impossible shape"),
        (file([tensor(dims=(1 << 40, 1 << 40))], data=bytes(64)), "impossible shape"),
        (file([tensor(kind=999)], data=bytes(64)), "ggml type 999"),
        (file([tensor(kind=8)], data=bytes(64)), "whole blocks of 32"),
        (file([tensor()], data=bytes(31)), "past the end"),
        (file([tensor(offset=1 << 62)], data=bytes(64)), "past the end"),
        (file([tensor(offset=16)], data=bytes(64)), "misaligned"),
        (file([tensor(), tensor("u")], data=bytes(64)), "overlaps"),
        (file([tensor(), tensor(offset=32)], data=bytes(64)), "same name"),
        (file(pairs=(ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 0)))), "alignment 0"),
        (file(pairs=(ARCHITECTURE, pair("general.alignment", 4, struct.pack("<I", 48)))), "alignment 48"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, content, words):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_gguf_header(path)


def test_every_truncation_is_refused(tmp_path):
    whole = write_llama(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    for length in (*range(0, 3000, 41), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_gguf_header(path)


def test_an_unknown_architecture_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(file(pairs=(pair("general.architecture", 8, text("no-such")),)))
    with pytest.raises(InputError, match="'no-such'"):
        import_model(path)


@pytest.mark.slow
def test_gemma(gemma_gguf, tmp_path):
    """The real model: bit for bit what transformers loads and saves, rounded to bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gemma_gguf.parent,
        gguf_file=gemma_gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(tmp_path / "hf")
    del model
    program = import_model(gemma_gguf)
    other = import_model(tmp_path / "hf", check=False)
    assert set(program.graph.initializers) == set(other.graph.initializers)
    for name, value in other.graph.initializers.items():
        ours, theirs = program.graph.initializers[name].const_value.numpy(), value.const_value.numpy()
        assert ours.astype(theirs.dtype).tobytes() == theirs.tobytes(), name
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(program.source.assets)
    assert program.source.config["sliding_window"] == 512
