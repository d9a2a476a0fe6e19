import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from effc.errors import InputError
from effc.frontends.safetensors_index import HEADER_LIMIT, read_checkpoint, read_header


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_tensors_equal_those_written(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "c": np.arange(4, dtype=np.int64).reshape(2, 2),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(3.5, np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = read_checkpoint(tmp_path).tensors
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert tensors[name].numpy().dtype == array.dtype
        assert tensors[name].numpy().tobytes() == array.tobytes()
        assert tuple(tensors[name].shape) == array.shape


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"", b"", "not JSON"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"a": {}, "a": {}}', b"", "appears twice"),
        (b"[" * 100_000, b"", "not JSON"),
        ({"a": entry(0, 8)}, b"1234567", "the file at"),
        ({"a": entry(0, 8)}, b"123456789", "the file at"),
        ({"a": entry(0, 4)}, b"1234", "spans 4 bytes"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12, "overlap or hole"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"0" * 20, "overlap or hole"),
        ({"a": entry(8, 0)}, b"0" * 8, "spans -8 bytes"),
        ({"a": entry(-8, 0)}, b"", "not counts"),
        ({"a": entry(0, 8, [1 << 62, 4])}, b"0" * 8, "not counts"),
        ({"a": entry(0, 8, [True, 2])}, b"0" * 8, "not counts"),
        ({"a": entry(0, 8, [2.0])}, b"0" * 8, "not counts"),
        ({"a": entry(0, 8, dtype="Q4")}, b"0" * 8, "dtype 'Q4'"),
        ({"a": {"dtype": "F32"}}, b"", "no dtype, shape or data_offsets"),
        ({"a": 3}, b"", "no dtype, shape or data_offsets"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, data, words):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(InputError, match=words):
        read_header(path)


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 1 << 62, 1000])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(InputError, match="header claims"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * size)
    with pytest.raises(InputError, match="fewer than the 8"):
        read_header(path)


def sharded(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_joined_and_links_followed(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for index in range(2):
        save_file({f"t{index}": np.full(3, index, np.float32)}, blobs / f"{index}")
        os.symlink(f"../blobs/{index}", folder / f"s{index}.safetensors")
    checkpoint = read_checkpoint(sharded(folder, {"t0": "s0.safetensors", "t1": "s1.safetensors"}))
    assert [checkpoint.tensors[f"t{index}"].numpy()[0] for index in range(2)] == [0, 1]
    assert checkpoint.files == (blobs / "0", blobs / "1")
    assert checkpoint.nbytes == 24


@pytest.mark.parametrize("shard", ["../s.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "x\0"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, shard):
    with pytest.raises(InputError, match="leaves the folder"):
        read_checkpoint(sharded(tmp_path, {"t": shard}))


def test_a_missing_shard_or_tensor_is_refused(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        read_checkpoint(sharded(tmp_path, {"t": "s.safetensors"}))
    save_file({"other": np.zeros(1, np.float32)}, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="no tensor 't'"):
        read_checkpoint(sharded(tmp_path, {"t": "s.safetensors"}))


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError):
        read_checkpoint(tmp_path)


def test_pickles_are_named_and_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle"):
        read_checkpoint(tmp_path)
