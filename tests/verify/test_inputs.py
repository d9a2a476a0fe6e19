import numpy as np
import pytest
from verify_models import VOCAB, causal_lm, encoder

from effc.runtime.bundle import Port
from effc.verify.inputs import (
    FeedShape,
    Interface,
    attention_mask,
    hard_shapes,
    make_feed,
    quick_shapes,
    token_columns,
    valid_positions,
    within_step,
)
from effc.verify.snapshot import program_interface


def test_a_causal_model_gets_left_padding_and_counted_positions() -> None:
    feed = make_feed(program_interface(causal_lm()), FeedShape(3, 7, 0, True))
    np.testing.assert_array_equal(feed["attention_mask"].sum(axis=1), [7, 5, 3])
    np.testing.assert_array_equal(feed["attention_mask"][2], [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(feed["position_ids"][1], [0, 0, 0, 1, 2, 3, 4])
    assert feed["past_key_values.0.key"].shape == (3, 2, 0, 8)
    assert feed["input_ids"].max() < VOCAB
    assert all(array.dtype == np.int64 for name, array in feed.items() if not name.startswith("past"))


def test_a_past_is_masked_and_counted() -> None:
    feed = make_feed(program_interface(causal_lm()), FeedShape(2, 1, 9, True))
    assert feed["attention_mask"].shape == (2, 10)
    np.testing.assert_array_equal(feed["position_ids"], [[9], [6]])
    key = feed["past_key_values.1.value"]
    assert key.dtype == np.float32
    assert 0.3 < key.std() < 0.7


def test_encoders_get_right_padding() -> None:
    feed = make_feed(program_interface(encoder()), FeedShape(3, 4, 0, True))
    np.testing.assert_array_equal(feed["attention_mask"], [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(("batch", "total"), [(5, 1), (5, 2), (9, 7), (1, 7)])
def test_no_row_is_empty(batch: int, total: int) -> None:
    mask = attention_mask(Interface([]), FeedShape(batch, total, 0, True))
    assert mask.sum(axis=1).min() >= 1


def test_content_depends_on_name_and_seed_only() -> None:
    one = Interface([Port("a", "float32", [2, 3]), Port("b", "float32", [2, 3])])
    other = Interface([Port("b", "float32", [2, 3])])
    shape = FeedShape(1, 1)
    assert make_feed(one, shape)["b"].tobytes() == make_feed(other, shape)["b"].tobytes()
    assert make_feed(one, shape)["a"].tobytes() != make_feed(one, shape)["b"].tobytes()
    assert make_feed(one, shape, seed=1)["b"].tobytes() != make_feed(one, shape)["b"].tobytes()


def test_real_text_where_there_is_a_tokenizer() -> None:
    ports = [Port("input_ids", "int32", ["batch", "seq"])]
    interface = Interface(ports, {"vocab_size": 1000}, lambda text: list(text.encode()))
    ids = make_feed(interface, FeedShape(2, 20))["input_ids"]
    assert bytes(ids[0].tolist()).decode() == "The harbour was quie"
    assert ids.dtype == np.int32
    assert bytes(ids[1].tolist()).decode() == "as quiet before sunr"


def test_other_inputs_by_dtype() -> None:
    ports = [
        Port("pixel_values", "float32", ["batch", 3, "height", "width"]),
        Port("flags", "bool", ["batch", "patches"]),
        Port("kinds", "int64", ["batch", ""]),
        Port("half", "float16", [4]),
        Port("brain", "bfloat16", ["past + seq", "seq+1"]),
        Port("token_type_ids", "int64", ["batch", "seq"]),
        Port("scalar", "float32", []),
    ]
    feed = make_feed(Interface(ports, {"image_size": [24, 16]}), FeedShape(2, 3, 4))
    shapes = {name: array.shape for name, array in feed.items()}
    assert shapes["pixel_values"] == (2, 3, 24, 16)
    assert shapes["flags"] == shapes["kinds"] == (2, 5)
    assert shapes["brain"] == (7, 4)
    assert shapes["scalar"] == ()
    assert set(np.unique(feed["kinds"])) <= {0, 1}
    assert not feed["token_type_ids"].any()
    assert [feed[port.name].dtype.name for port in ports] == [port.dtype for port in ports]


def test_hard_shapes_reach_past_the_window_and_stay_below_the_limit() -> None:
    interface = program_interface(causal_lm())
    assert FeedShape(3, 7, 0, True) in hard_shapes(interface)
    assert {shape.past for shape in hard_shapes(interface)} == {0, 9, 61}

    def configured(**config: int) -> tuple[FeedShape, ...]:
        return hard_shapes(Interface(interface.inputs, config, None, interface.cache))

    assert max(shape.past for shape in configured(sliding_window=512)) == 515
    assert max(shape.past for shape in configured(sliding_window=4096)) == 61
    for limit in (1, 2, 8, 32):
        shapes = configured(max_position_embeddings=limit)
        assert max(shape.past + shape.seq for shape in shapes) <= limit
        assert min(shape.seq for shape in shapes) >= 1
    assert {shape.past for shape in hard_shapes(program_interface(encoder()))} == {0}
    assert quick_shapes(program_interface(encoder())) == (FeedShape(2, 5, 0, True),)


def test_scores_of_tokens_are_zeros_that_grow_with_the_mask() -> None:
    scores = Port("token_scores", "float32", ["batch", "total"])
    interface = Interface([Port("input_ids", "int64", ["batch", "seq"]), scores], {"vocab_size": 9}, longest_step=4)
    feed = make_feed(interface, FeedShape(2, 7))
    assert feed["token_scores"].shape == (2, 7)
    assert not feed["token_scores"].any()
    part = token_columns(feed, 3, 5)
    assert (part["input_ids"].shape, part["token_scores"].shape) == ((2, 2), (2, 5))
    assert make_feed(interface, FeedShape(2, 3, 4))["token_scores"].shape == (2, 7)


def test_steps_are_no_longer_than_a_run_takes() -> None:
    shapes = [FeedShape(1, 67), FeedShape(3, 7, 0, True), FeedShape(1, 4), FeedShape(1, 6, 5)]
    cut = within_step(shapes, Interface([], longest_step=4))
    assert cut == (
        FeedShape(1, 4, 63, own_past=True),
        FeedShape(3, 4, 3, True, True),
        FeedShape(1, 4),
        FeedShape(1, 4, 7, own_past=True),
    )
    assert within_step(shapes, Interface([])) == tuple(shapes)


def test_valid_positions() -> None:
    shape = FeedShape(2, 2, 3, True)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    rows = valid_positions("logits", np.zeros((2, 2, 9)), shape, mask)
    np.testing.assert_array_equal(rows, [[True, True], [False, True]])
    cache = valid_positions("present.0.key", np.zeros((2, 4, 5, 8)), shape, mask)
    assert cache.shape == (2, 4, 5)
    assert cache[1, 3].tolist() == [False] * 4 + [True]
    assert valid_positions("pooled", np.zeros((2, 2)), shape, mask) is None
    assert valid_positions("other", np.zeros((3, 2, 1)), shape, mask) is None
