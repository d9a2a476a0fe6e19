"""Describes the inputs, outputs and cache of a program for the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from effc.backends.onnxruntime.static_cache import is_static_cache
from effc.ir.analysis.cached_attention import (
    CachedAttentionSite,
    cache_figures,
    cached_attention_sites,
    is_cached_attention,
)
from effc.ir.dialect.cached_attention import constant_values
from effc.ir.dialect.selections import ClusterSelection, LowRankSelection, WindowSelection
from effc.ir.program import Program
from effc.runtime.bundle import CacheLayout, CachePort, ClusterPorts, LowRankPorts, Port, SharedWeight


def ports(program: Program, values: Iterable[ir.Value]) -> list[Port]:
    """Inputs or outputs that are neither cache nor brought by a prefix."""
    cached = {value for pair in program.cache_pairs() for value in pair}
    for site in cached_attention_sites(program.graph):
        cached.update(_prefix_values(site))
    return [Port(str(value.name), _dtype(value), _shape(value)) for value in values if value not in cached]


def cache_layout(program: Program) -> CacheLayout | None:
    """The cache of a program, None when it has none; in place where only ops that append to it read it."""
    pairs = program.cache_pairs()
    if not pairs:
        return None
    entries = [CachePort(str(past.name), str(present.name), _dtype(past), _shape(past)) for past, present in pairs]
    readers = {use.node for past, _ in pairs for use in past.uses()}
    in_place = bool(readers) and all(is_cached_attention(node) or is_static_cache(node) for node in readers)
    sites = cached_attention_sites(program.graph)
    return CacheLayout(
        "in-place" if in_place else "growing",
        entries,
        [cache_figures(site) for site in sites],
        endless=bool(sites) and _is_endless(sites),
        clusters=[_cluster_ports(site) for site in sites if isinstance(site.selection, ClusterSelection)],
        low_rank=[_low_rank_ports(site) for site in sites if isinstance(site.selection, LowRankSelection)],
        longest_step=min((one for site in sites if (one := site.selection.longest_step)), default=None),
    )


def _cluster_ports(site: CachedAttentionSite) -> ClusterPorts:
    key, value, queries = site.past
    return ClusterPorts(
        key=str(key.name),
        value=str(value.name),
        queries=str(queries.name),
        dtype=_dtype(key),
        scale=site.form.scale,
        softcap=site.form.softcap,
        inputs=_prefix_ports(site),
    )


def _low_rank_ports(site: CachedAttentionSite) -> LowRankPorts:
    selection = site.selection
    assert isinstance(selection, LowRankSelection)
    key, value = site.past
    return LowRankPorts(
        key=str(key.name),
        value=str(value.name),
        dtype=_dtype(key),
        chunk=selection.block,
        rotary=site.form.rotary,
        angles=[weight_entry(table) for table in _tables(site)],
        inputs=_prefix_ports(site),
    )


def angle_tables(program: Program) -> list[ir.Value]:
    """Cosines and sines that the runtime reads in the weight file, to undo a rotation."""
    sites = cached_attention_sites(program.graph)
    return [table for site in sites if isinstance(site.selection, LowRankSelection) for table in _tables(site)]


def _tables(site: CachedAttentionSite) -> list[ir.Value]:
    return constant_values(site.node)[: -len(site.selection.prefix)]


def weight_entry(value: ir.Value) -> SharedWeight:
    """Where an initializer lies that was written to a weight file."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    shape = list(tensor.shape.numpy())
    return SharedWeight(str(value.name), tensor.dtype.numpy().name, shape, tensor.offset, str(tensor.location))


def _prefix_values(site: CachedAttentionSite) -> list[ir.Value]:
    """Inputs of the graph that a prefix brings to one attention."""
    count = len(site.selection.prefix)
    return constant_values(site.node)[-count:] if count else []


def _prefix_ports(site: CachedAttentionSite) -> list[Port]:
    return [Port(str(one.name), _dtype(one), _shape(one)) for one in _prefix_values(site)]


def _is_endless(sites: Sequence[CachedAttentionSite]) -> bool:
    """Whether every attention rotates its keys, and meets them at bounded distances only."""
    selections = [site.selection for site in sites]
    moved = all(one.positions != "keep" for one in selections if isinstance(one, WindowSelection))
    bounded = all(site.form.window or site.selection.turns_by_place for site in sites)
    return moved and bounded and all(site.form.rotary != "none" for site in sites)


def _dtype(value: ir.Value) -> str:
    return value.dtype.numpy().name if value.dtype is not None else "float32"


def _shape(value: ir.Value) -> list[int | str]:
    dims = value.shape if value.shape is not None else ()
    return [dim if isinstance(dim, int) else str(dim.value or f"{value.name}_{axis}") for axis, dim in enumerate(dims)]
