"""What every selection of CachedAttention cannot have, and the reasons: the table is `selection_cases.py`."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import numpy as np
import onnx_ir as ir
import pytest
from attention_feeds import tokens_of
from attention_oracle import Form
from cached_attention_model import open_model
from selected_cache import PAGED, Cache, attributes_of, storage_of
from selection_cases import CASES

from effc.errors import InputError
from effc.ir.dialect.cache_storage import StaticStorage, Storage
from effc.ir.dialect.cached_attention import AttentionForm, cached_attention

FORMS = {
    "a window": {"window": 40},
    "not causal": {"causal": 0},
    "a negative scale": {"scale": -0.3},
    "no rotation": {"rotary": "none", "rotary_size": 0},
}
SITUATIONS = (*PAGED, "static", *FORMS, "another ring", "a bias")
ASKED = [(name, situation) for name in CASES for situation in SITUATIONS if situation != "a bias"]


def legal_cache(name: str, situation: str) -> Cache:
    case = CASES[name]
    setup = case.small(situation if situation in case.storages else "float32")
    return Cache(case.form("gqa", "int8", setup), "float32", setup.selection)


def asked(cache: Cache, situation: str) -> tuple[Form, Storage]:
    """What it is to be instead."""
    form = replace(cache.form, **FORMS.get(situation, {}))
    if situation == "static":
        return form, StaticStorage(8)
    if situation == "another ring":
        return form, storage_of("float32", 0 if cache.places else 64)
    return form, PAGED.get(situation, cache.kept_as)


def test_every_refusal_is_of_a_situation() -> None:
    assert {situation for case in CASES.values() for situation in case.refused} <= set(SITUATIONS)


@pytest.mark.parametrize(("name", "situation"), ASKED)
def test_reasons(name: str, situation: str) -> None:
    """Each that the table has, and no other."""
    cache = legal_cache(name, situation)
    form, storage = asked(cache, situation)
    reason = cache.selection.reason_against(AttentionForm(**asdict(form)), storage)
    refusal = CASES[name].refused.get(situation)
    wanted = refusal.reason if refusal else ""
    assert wanted in reason
    assert bool(wanted) == bool(reason)


@pytest.mark.parametrize(
    ("name", "situation"), [pair for pair in ASKED if pair[1] in CASES[pair[0]].refused and pair[1] != "static"]
)
def test_the_op_gives_reasons(name: str, situation: str) -> None:
    cache = legal_cache(name, situation)
    form, storage = asked(cache, situation)
    message = re.escape(CASES[name].refused[situation].kernel)
    with pytest.raises(Exception, match=message):
        open_model(form, cache.past, cache.optional, storage=attributes_of(storage, cache.selection))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "a bias" in case.refused])
def test_a_bias_has_its_reason(name: str) -> None:
    """Of a node, and of a step of the op."""
    cache, refusal = legal_cache(name, "a bias"), CASES[name].refused["a bias"]
    with pytest.raises(InputError, match=f"selection={cache.selection.kind}: {refusal.reason}"):
        biased_node(cache)
    selection, form = cache.selection, cache.form
    model = open_model(
        form,
        cache.past,
        ["bias", *cache.optional],
        storage=attributes_of(cache.kept_as, selection),
        constants=cache.constants,
        scores=selection.reads_scores,
    )
    step = cache.feeds(tokens_of(form), 1) | {"bias": np.zeros((1, 1, 1, 1), np.float32)}
    with pytest.raises(Exception, match=refusal.kernel):
        model.run(step, cache.past)


def biased_node(cache: Cache) -> ir.Node:
    def value(dtype: ir.DataType) -> ir.Value:
        return ir.Value(type=ir.TensorType(dtype))

    form, fp32 = AttentionForm(**asdict(cache.form)), ir.DataType.FLOAT
    return cached_attention(
        [value(fp32), value(fp32), value(fp32), value(ir.DataType.BOOL)],
        [value(ir.DataType.from_numpy(tensor.dtype)) for tensor in cache.past],
        form,
        cache.kept_as,
        selection=cache.selection,
        bias=value(fp32),
        constants=[value(fp32) for _ in cache.selection.constants(form)],
    )
