"""Writes `report.html`: what went in, what was done to it, what was measured; one file, no other assets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from effc.errors import OutputError
from effc.verify.heat_map import passkey_maps

TOP_WEIGHTS = 40
REASONS_SHOWN = 12
UNITS = ("B", "kB", "MB", "GB")
RATES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "items_per_s": "items/s",
    "load_s": "load, s",
    "peak_rss": "peak memory",
    "bytes": "engine on disk",
}
SIZES = {
    "source": "source weights",
    "engine": "engine on disk",
    "weights_stored": "weights on disk",
    "weights_memory": "weights in memory",
}


def write_report(
    manifest: Mapping[str, Any],
    path: Path,
    *,
    verify: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None,
) -> None:
    """Render a report.

    Args:
        manifest: The content of `effc.json` as a dictionary.
        path: The file to write.
        verify: What `effc.verification.verify` returned, if it ran.
        bench: What `bench_engine` returned, if it ran.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.write_text(render_report(manifest, verify=verify, bench=bench), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Name another place.") from error


def render_report(
    manifest: Mapping[str, Any],
    *,
    verify: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None,
) -> str:
    """The report as HTML text; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=jinja2.FunctionLoader(_template)
    )
    environment.filters.update({"size": format_bytes, "number": format_number, "percent": format_percent})
    measured = verify or {}
    return environment.get_template("report.html").render(
        manifest=manifest,
        facts=_facts(manifest),
        passes=[_pass_row(record) for record in manifest["passes"]],
        caches=(manifest["cache"] or {}).get("layers", ()),
        sizes=_size_rows(manifest["bytes"]),
        weights=weight_rows(manifest["passes"]),
        weight_limit=TOP_WEIGHTS,
        verify=verify,
        contexts=measured.get("contexts"),
        passkey=measured.get("passkey"),
        maps=passkey_maps(measured["passkey"]) if measured.get("passkey") else [],
        reads=measured.get("reads"),
        bench=_bench_rows(bench) if bench else None,
        settings=dict((bench or {}).get("settings", {})),
    )


def _template(name: str) -> str:
    return files("effc.verify").joinpath(name).read_text(encoding="utf-8")


def format_bytes(count: Any) -> str:
    """Bytes in decimal units, three digits."""
    if count is None:
        return "–"
    if count < 1000:
        return f"{count} B"
    power = min(3, (len(str(int(count))) - 1) // 3)
    number = count / 1000**power
    return f"{number:.3g} {UNITS[power]}" if number < 1000 else f"{number:.0f} {UNITS[power]}"


def format_number(value: Any) -> str:
    """A figure of a measurement; null is infinite there."""
    if value is None:
        return "∞"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int | str) else f"{value:.4g}"


def format_percent(part: Any, whole: Any) -> str:
    """One number as percent of another."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    source = manifest["source"]
    rows = [
        ("source", f"{source.get('name', '–')} ({source.get('kind', '–')})"),
        ("content hash", str(source.get("content_hash") or "–")),
        ("task", str(manifest["task"])),
        ("target", manifest["target"] + (", standard ops only" if manifest["portable"] else "")),
        ("needs our kernels", format_number(bool(manifest["needs_kernels"]))),
        ("cache", manifest["cache"]["mode"] if manifest["cache"] else "none"),
        ("opset, IR version", f"{manifest['opset']}, {manifest['ir_version']}"),
        ("made by", f"effc {manifest['effc_version']}"),
        ("with", ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))),
    ]
    if manifest.get("prompt_filter"):
        rows.append(("prompts", _prompts(manifest["prompt_filter"])))
    return rows + [("note", str(note)) for note in source.get("notes", ())]


def _prompts(entry: Mapping[str, Any]) -> str:
    """What becomes of long prompts."""
    forced = f", the first and the last {entry['forced']} among them" if entry["forced"] else ""
    return (
        f"those of more than {entry['keep']} tokens are shortened to as many{forced}, chosen by layer {entry['layer']} "
        f"of {entry['layers']} (from 0). Outputs were compared on prompts that are not shortened"
    )


def _size_rows(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """(what, bytes, bytes of the source) in a fixed order; unknown sizes come last under their own names."""
    names = [*SIZES, *(name for name in sizes if name not in SIZES)]
    return [(SIZES.get(name, name), sizes[name], sizes.get("source", 0)) for name in names if name in sizes]


def _pass_row(record: Mapping[str, Any]) -> dict[str, Any]:
    left = [(item["site"], item["reason"]) for item in record.get("left", ())]
    grouped: dict[str, list[str]] = {}
    for site, reason in left:
        grouped.setdefault(reason, []).append(site)
    return {
        "name": record["name"],
        "options": record.get("options", record["name"]),
        "contract": record["contract"],
        "rewritten": len(record.get("rewritten", ())),
        "left": len(left),
        "reasons": sorted(grouped.items(), key=lambda item: -len(item[1]))[:REASONS_SHOWN],
        "more_reasons": max(0, len(grouped) - REASONS_SHOWN),
        "measured": _measured(record.get("measured", {})),
        "seconds": record.get("seconds", 0.0),
    }


def _measured(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not figures:
        return [("checked", "no")]
    names = ("bitwise", "max_abs", "max_rel", "kl", "weights_identical", "mismatched")
    rows = [(name, format_number(figures[name])) for name in names if name in figures]
    if figures.get("top1") is not None:
        rows.append(("same most likely answer", format_percent(figures["top1"], 1)))
    if "shapes" in figures:
        rows.append(("shapes", "; ".join(figures["shapes"])))
    if figures.get("not_compared"):
        rows.append(("not compared", ", ".join(figures["not_compared"])))
    for name, limit in figures.get("allowed", {}).items():
        rows.append((f"{name} allowed", format_number(limit)))
    if "peak_rss" in figures:
        rows.append(("peak memory so far", format_bytes(figures["peak_rss"])))
    return rows


def weight_rows(passes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The weights the passes report in `details.tensors`, largest first, at most `TOP_WEIGHTS`.

    Each has `name`, `shape`, `dtype`, `bytes` and, where the pass says so, `entropy_bits`, `storage_bits`,
    `runtime_bits`, per element.
    """
    rows: dict[str, dict[str, Any]] = {}
    for record in passes:
        for tensor in record.get("details", {}).get("tensors", ()):
            if "name" in tensor and "bytes" in tensor:
                rows[tensor["name"]] = {"shape": [], "dtype": "–", **tensor}
    return sorted(rows.values(), key=lambda row: (-row["bytes"], row["name"]))[:TOP_WEIGHTS]


def _bench_rows(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per figure that was measured, with both sides and their ratio as text."""
    rows = []
    for name, label in RATES.items():
        sides = [(bench.get(side) or {}).get(name) for side in ("engine", "against")]
        if sides[0] is None:
            continue
        ratio = (bench.get("ratio") or {}).get(name)
        rows.append(
            {
                "label": label,
                "engine": _figure(name, sides[0]),
                "against": _figure(name, sides[1]),
                "ratio": "–" if ratio is None else f"{ratio:.3f}",
            }
        )
    return rows


def _figure(name: str, figure: Any) -> str:
    if figure is None:
        return "–"
    if isinstance(figure, Mapping):
        return f"{figure['median']:.4g} ({figure['min']:.4g} to {figure['max']:.4g})"
    return format_bytes(figure) if name in ("peak_rss", "bytes") else format_number(figure)
