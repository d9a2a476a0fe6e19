"""`CachedAttention`: its reference body against float64 NumPy over many steps, its checks, its storages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from effc.errors import InputError
from effc.ir.dialect import infer_dialect_types
from effc.ir.dialect.cache_storage import DenseStorage, HeadSizes, PageStorage
from effc.ir.dialect.cached_attention import AttentionForm, attention_form, cache_storage, cached_attention
from effc.ir.dialect.inline import inline_dialect

FORM = AttentionForm(heads=4, kv_heads=2, head_size=8, value_size=6, scale=0.4)
NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass
class Oracle:
    """The op in float64, token by token: all tokens it has seen, as float32 and as they were stored."""

    form: AttentionForm
    storage: DenseStorage

    def __post_init__(self) -> None:
        self.fresh: list[list[np.ndarray]] = [[], []]
        self.stored: list[list[np.ndarray]] = [[], []]

    def step(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        form = self.form
        batch, count = feed["query"].shape[:2]
        past = len(self.stored[0])
        query = rotate(form, feed["query"].reshape(batch, count, form.heads, -1).astype(np.float64), feed)
        key = rotate(form, feed["key"].reshape(batch, count, form.kv_heads, -1).astype(np.float64), feed)
        value = feed["value"].reshape(batch, count, form.kv_heads, -1).astype(np.float64)
        new = [[tensor[:, i] for i in range(count)] for tensor in (key, value)]
        seen = [old + fresh for old, fresh in zip(self.stored, new)]
        result = np.zeros((batch, count, form.heads, form.value_size))
        for row in range(batch):
            for i in range(count):
                slots = [j for j in range(past + count) if self.sees(feed, row, past + i, j)]
                for head in range(form.heads) if slots else ():
                    group = head // (form.heads // form.kv_heads)
                    scores = np.array([query[row, i, head] @ seen[0][j][row, group] * form.scale for j in slots])
                    if form.softcap:
                        scores = form.softcap * np.tanh(scores / form.softcap)
                    if "bias" in feed:
                        bias = np.broadcast_to(feed["bias"], (batch, form.heads, count, past + count))
                        scores = scores + bias[row, head, i, slots]
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    for weight, j in zip(weights, slots):
                        result[row, i, head] += weight * seen[1][j][row, group]
        dtype = NUMPY[self.storage.dtype]
        for old, fresh in zip(self.stored, new):
            old += [item.astype(np.float32).astype(dtype).astype(np.float64) for item in fresh]
        return result.reshape(batch, count, -1)

    def sees(self, feed: dict[str, np.ndarray], row: int, i: int, j: int) -> bool:
        causal = not self.form.causal or j <= i
        window = not self.form.window or i - j < self.form.window
        return bool(feed["valid"][row, j]) and causal and window


def rotate(form: AttentionForm, x: np.ndarray, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Rotate pairs of the first `rotary_size` elements of [batch, tokens, heads, size]."""
    if form.rotary == "none":
        return x
    half = form.rotary_size // 2
    out = x.copy()
    cos, sin = (np.broadcast_to(feed[name], (len(x), x.shape[1], half))[:, :, None] for name in ("cos", "sin"))
    for pair in range(half):
        a, b = (pair, pair + half) if form.rotary == "half" else (2 * pair, 2 * pair + 1)
        out[..., a] = x[..., a] * cos[..., pair] - x[..., b] * sin[..., pair]
        out[..., b] = x[..., a] * sin[..., pair] + x[..., b] * cos[..., pair]
    return out


def operand(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def node_inputs(form: AttentionForm, storage: Any, bias: Sequence[int | str] | None = None) -> dict[str, ir.Value]:
    fp32 = ir.DataType.FLOAT
    values = {
        "query": operand("query", fp32, ["batch", "seq", form.heads * form.head_size]),
        "key": operand("key", fp32, ["batch", "seq", form.kv_heads * form.head_size]),
        "value": operand("value", fp32, ["batch", "seq", form.kv_heads * form.value_size]),
        "valid": operand("valid", ir.DataType.BOOL, ["batch", "total"]),
    }
    if bias is not None:
        values["bias"] = operand("bias", fp32, bias)
    if form.rotary != "none":
        for name in ("cos", "sin"):
            values[name] = operand(name, fp32, ["rows", "seq", form.rotary_size // 2])
    for tensor in storage.tensors(form.sizes):
        values[f"past.{tensor.name}"] = operand(f"past.{tensor.name}", tensor.dtype, tensor.shape)
    return values


def make_node(form: AttentionForm, storage: Any, values: dict[str, ir.Value]) -> ir.Node:
    operands = [values[name] for name in ("query", "key", "value", "valid")]
    tables = (values["cos"], values["sin"]) if "cos" in values else None
    past = [value for name, value in values.items() if name.startswith("past.")]
    return cached_attention(operands, past, form, storage, bias=values.get("bias"), tables=tables, name="attention")


def body_session(form: AttentionForm, storage: DenseStorage, bias: Sequence[int | str] | None) -> Any:
    """The body behind fp32 ports, so that NumPy can feed every cache type."""
    values = node_inputs(form, storage, bias)
    ports, casts = [], []
    for name, value in values.items():
        if name.startswith("past."):
            port = operand(f"in.{name}", ir.DataType.FLOAT, list(value.shape))
            casts.append(ir.node("Cast", [port], {"to": int(value.dtype)}, outputs=[value]))
            ports.append(port)
        else:
            ports.append(value)
    node = make_node(form, storage, values)
    out = [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}) for value in node.outputs[1:]]
    outputs = [node.outputs[0], *(cast.outputs[0] for cast in out)]
    for value, name in zip(outputs, ("y", "present.key", "present.value"), strict=True):
        value.name = name
        value.dtype = ir.DataType.FLOAT
    graph = ir.Graph(ports, outputs, nodes=[*casts, node, *out], opset_imports={"": 24, "effc": 1})
    model = ir.Model(graph, ir_version=11)
    assert inline_dialect(model) == 1
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def run_steps(
    form: AttentionForm,
    steps: Sequence[int],
    *,
    storage: DenseStorage | None = None,
    batch: int = 2,
    valid: np.ndarray | None = None,
    bias: tuple[int, int] | None = None,
    spare: int = 0,
    tables: int = 1,
) -> None:
    """Run steps of these lengths and compare every result, and the cache at the end, with the oracle."""
    storage = storage or DenseStorage()
    draw = np.random.default_rng(sum(steps) + batch)
    session = body_session(form, storage, None if bias is None else [*bias, "seq", "total"])
    oracle = Oracle(form, storage)
    length = storage.ring or spare
    past = [np.full((batch, 2, length, size), 7, np.float32) for size in (form.head_size, form.value_size)]
    whole = np.ones((batch, sum(steps)), bool) if valid is None else valid
    total = 0
    for count in steps:
        total += count
        feed = random_feed(form, draw, batch, count)
        feed["valid"] = whole[:, :total]
        if bias is not None:
            feed["bias"] = draw.standard_normal((*bias, count, total)).astype(np.float32)
        if form.rotary != "none":
            angles = draw.uniform(0, 6, (tables, count, form.rotary_size // 2))
            feed["cos"], feed["sin"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        result, *past = session.run(None, {**feed, "in.past.key": past[0], "in.past.value": past[1]})
        np.testing.assert_allclose(result, oracle.step(feed), rtol=3e-6, atol=3e-6)
        assert past[0].shape[2] == (storage.ring or max(total, spare))
    for tensor, stored in zip(past, oracle.stored, strict=True):
        for j in range(max(0, total - (storage.ring or total)), total):
            place = j % storage.ring if storage.ring else j
            rounded = {"rtol": 2e-3, "atol": 1e-6} if form.rotary != "none" else {"rtol": 0, "atol": 0}
            np.testing.assert_allclose(tensor[:, :, place], stored[j], **rounded)
        if not storage.ring:
            np.testing.assert_array_equal(tensor[:, :, total:], 7)


def random_feed(form: AttentionForm, draw: np.random.Generator, batch: int, count: int) -> dict[str, np.ndarray]:
    widths = {
        "query": form.heads * form.head_size,
        "key": form.kv_heads * form.head_size,
        "value": form.kv_heads * form.value_size,
    }
    return {name: draw.standard_normal((batch, count, width)).astype(np.float32) for name, width in widths.items()}


@pytest.mark.parametrize("steps", [(1,), (5,), (1, 1, 1), (7, 1, 3, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_causal_attention_in_steps(steps: tuple[int, ...], batch: int) -> None:
    run_steps(FORM, steps, batch=batch)


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"window": 1},
        {"window": 4},
        {"window": 100},
        {"softcap": 0.5},
        {"kv_heads": 2, "heads": 2},
        {"heads": 6},
    ],
)
def test_what_a_query_sees(change: dict[str, Any]) -> None:
    run_steps(replace(FORM, **change), (6, 1, 2))


def test_padding_holes_and_rows_that_see_nothing() -> None:
    valid = np.array([[0, 0, 0, 1, 0, 1, 1, 0, 1], [0] * 9, [1] * 9], bool)
    run_steps(FORM, (4, 1, 4), batch=3, valid=valid)
    run_steps(replace(FORM, window=2, softcap=1.0), (4, 1, 4), batch=3, valid=valid)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_bias_comes_after_the_softcap(shape: tuple[int, int]) -> None:
    valid = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    run_steps(replace(FORM, softcap=0.7, window=3), (3, 1, 2), bias=shape, valid=valid)


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
@pytest.mark.parametrize("size", [2, 6, 8])
@pytest.mark.parametrize("tables", [1, 2])
def test_rotation_of_all_or_some_elements(rotary: str, size: int, tables: int) -> None:
    run_steps(replace(FORM, rotary=rotary, rotary_size=size), (3, 1, 2), tables=tables)


@pytest.mark.parametrize("ring", [3, 4, 5, 8])
@pytest.mark.parametrize("steps", [(1,) * 13, (3, 1, 1), (9, 1, 6, 1), (20, 3), (2, 8, 8, 1)])
def test_a_ring_goes_round(ring: int, steps: tuple[int, ...]) -> None:
    valid = np.ones((2, sum(steps)), bool)
    valid[1, : min(4, sum(steps) - 1)] = False
    run_steps(replace(FORM, window=3), steps, storage=DenseStorage(ring=ring), valid=valid)


def test_a_ring_with_bias_and_rotation() -> None:
    form = replace(FORM, window=5, rotary="half", rotary_size=4, softcap=2.0)
    run_steps(form, (7, 1, 4), storage=DenseStorage(ring=6), bias=(2, 4))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("ring", [0, 4])
def test_half_precision_caches_round_once(dtype: ir.DataType, ring: int) -> None:
    run_steps(replace(FORM, window=4 if ring else 0), (5, 1, 1, 3), storage=DenseStorage(dtype, ring))


@pytest.mark.parametrize("spare", [1, 6, 7, 20])
def test_a_capacity_is_kept_and_what_lies_beyond_is_not_read(spare: int) -> None:
    run_steps(FORM, (3, 1, 3), spare=spare)


def test_output_types_and_round_trip_of_attributes() -> None:
    form = replace(FORM, window=64, softcap=30.0, rotary="half", rotary_size=8)
    for storage in (
        DenseStorage(ir.DataType.FLOAT16),
        DenseStorage(ring=64),
        PageStorage(salient=96, page=160, importance="normalised", key_bits=(4, 2), value_bits=(4, 2), window=64),
    ):
        node = make_node(form, storage, node_inputs(form, storage))
        assert attention_form(node).softcap == 30.0
        assert attention_form(node) == form
        assert cache_storage(node) == storage
        assert str(node.outputs[0].shape) == "[batch,seq,24]"
    assert [str(value.shape) for value in node.outputs[1:]] == [
        "[batch,2,196,8]",
        "[batch,2,196,6]",
        f"[batch,2,2,{storage.page_bytes(form.sizes)}]",
        "[batch,2,400]",
    ]
    storage = PageStorage()
    node = make_node(FORM, storage, node_inputs(FORM, storage))
    assert str(node.outputs[3].shape[2]).replace(" ", "") in ("total//128", "floor(total/128)")


BREAKS = [
    ("heads", ir.AttrInt64("heads", 3), "heads is 3, it must be a multiple of kv_heads"),
    ("window", ir.AttrInt64("window", -1), "window finite and not negative"),
    ("rotary", ir.AttrString("rotary", "full"), "rotary is 'full', it must be one of none, half, interleaved"),
    ("rotary_size", ir.AttrInt64("rotary_size", 4), "rotary_size is 4, it must be even and at most head_size"),
    ("storage", ir.AttrString("storage", "lost"), "storage is 'lost', it must be one of dense, pages, static"),
    ("ring", ir.AttrInt64("ring", 4), "a ring of 4 places needs a window from 1 to 4, it is 0"),
    ("head_size", ir.AttrInt64("head_size", 16), r"query is \[batch,seq,32\], it must be \[batch, seq, 64\]"),
    ("scale", ir.AttrInt64("scale", 1), "'scale' of CachedAttention is INT, it must be FLOAT"),
    ("extra", ir.AttrInt64("extra", 1), "has no attribute 'extra'"),
]


@pytest.mark.parametrize(("name", "attribute", "message"), BREAKS, ids=[item[0] for item in BREAKS])
def test_a_node_that_does_not_fit_is_refused(name: str, attribute: ir.Attr, message: str) -> None:
    values = node_inputs(FORM, DenseStorage())
    node = make_node(FORM, DenseStorage(), values)
    graph = ir.Graph(list(values.values()), node.outputs, nodes=[node], opset_imports={"": 24, "effc": 1})
    node.attributes[name] = attribute
    with pytest.raises(InputError, match=message) as caught:
        infer_dialect_types(graph)
    assert "node 'attention'" in str(caught.value)


def test_operands_that_do_not_fit_are_refused() -> None:
    values = node_inputs(FORM, DenseStorage())
    with pytest.raises(InputError, match="storage=pages with selection=all has 3 tensors"):
        make_node(FORM, PageStorage(dtype=ir.DataType.FLOAT), values)
    turned = {**values, "cos": values["query"], "sin": values["query"]}
    with pytest.raises(InputError, match="has none without"):
        make_node(FORM, DenseStorage(), turned)
    with pytest.raises(InputError, match=r"past.key|key is FLOAT, it must be FLOAT16|value is FLOAT"):
        make_node(FORM, DenseStorage(), {**values, "past.key": operand("k", ir.DataType.FLOAT16, ["b", 2, "p", 8])})


def test_pages_have_no_body() -> None:
    values = node_inputs(FORM, PageStorage())
    node = make_node(FORM, PageStorage(), values)
    graph = ir.Graph(list(values.values()), node.outputs, nodes=[node], opset_imports={"": 24, "effc": 1})
    with pytest.raises(InputError, match="storage=pages has no body in standard ops"):
        inline_dialect(ir.Model(graph, ir_version=11))


PAGES = [
    ({"page": 24}, "page is 24, it must be a multiple of 16 from 16 to 256"),
    ({"page": 272, "salient": 272}, "page is 272"),
    ({"salient": 0}, "salient is 0"),
    ({"salient": 144}, "salient is 144"),
    ({"salient": 64}, "importance is 'none', it must be one of normalised"),
    ({"key_bits": (8, 3)}, r"key_bits is \(8, 3\)"),
    ({"key_scheme": "row"}, "key_scheme is 'row'"),
    ({"value_scheme": "separable", "value_group": 32}, "separable values have no value_group"),
    ({"key_scheme": "balanced", "key_group": 32}, "balanced keys have no key_group"),
    ({"sinks": -1}, "sinks is -1"),
    ({"dtype": ir.DataType.INT8}, "the exact tokens are INT8"),
]


@pytest.mark.parametrize(("options", "message"), PAGES, ids=[str(item[0]) for item in PAGES])
def test_storages_outside_their_ranges_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PageStorage(**options)


def test_bytes_of_a_page_by_hand() -> None:
    sizes = HeadSizes(1, 64, 48)
    # 8 bits: keys 4 + 64 * 4 parameters, rows of 128 codes; values 4 + 128 * 4 and rows of 48.
    assert PageStorage().page_parts(sizes) == {
        "key parameters 0": 272,
        "key codes 0": 64 * 128,
        "value parameters 0": 528,
        "value codes 0": 128 * 48,
    }
    storage = PageStorage(
        page=160, salient=96, key_bits=(4, 2), value_bits=(4, 16), value_scheme="separable", importance="normalised"
    )
    assert storage.page_parts(sizes) == {
        "classes": 32,
        "value factor": 96,
        "key parameters 0": 272,
        "key codes 0": 64 * 48,  # 96 lanes of 4 bits: three words
        "value parameters 0": 400,  # 4 + 96 * 4 = 388
        "value codes 0": 96 * 32,  # 48 lanes of 4 bits: two words
        "key parameters 1": 272,
        "key codes 1": 64 * 16,
        "value parameters 1": 0,
        "value codes 1": 64 * 96,
    }
    grouped = PageStorage(key_group=32, value_group=32, key_bits=(2, 2), value_bits=(2, 2))
    assert grouped.page_parts(sizes)["key parameters 0"] == 1040  # 4 + 64 * 4 groups * 4
    assert grouped.page_parts(sizes)["value parameters 0"] == 1040  # 4 + 128 * 2 groups * 4
    balanced = PageStorage(key_scheme="balanced", key_bits=(4, 4))
    assert balanced.page_parts(sizes)["key factor"] == 128
    assert balanced.page_parts(sizes)["key parameters 0"] == 528


def test_bytes_and_bits_of_a_cache() -> None:
    sizes = HeadSizes(2, 64, 64)
    assert DenseStorage(ir.DataType.BFLOAT16).bytes_at(sizes, 1000) == 2 * 2 * 1000 * 64 * 2
    assert DenseStorage(ring=512).bytes_at(sizes, 10**6) == 2 * 2 * 512 * 64 * 4
    storage = PageStorage()
    exact = 2 * 2 * (4 + 32 + 128) * 64 * 2
    assert storage.bytes_at(sizes, 4 + 32 + 127) == exact
    assert storage.bytes_at(sizes, 4 + 32 + 128) == exact + 2 * storage.page_bytes(sizes)
    assert storage.bytes_at(sizes, 1280) == exact + 2 * 9 * storage.page_bytes(sizes)
    codes, whole = storage.stored_bits(sizes)
    assert codes == 8.0
    assert whole == pytest.approx(8 + 8 * (272 + 528) / (128 * 128))
    assert PageStorage(window=512).bytes_at(sizes, 10**6) == exact + 2 * 6 * storage.page_bytes(sizes)
