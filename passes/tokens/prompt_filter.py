"""The `prompt-filter` pass: a long prompt is shortened to the tokens that matter before the model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from effc.errors import UsageError
from effc.ir import prompt_filter
from effc.ir.analysis.cached_attention import CachedAttentionSite, cached_attention_sites
from effc.ir.program import Program, Task
from effc.passes.attention.cached_attention import CachedAttention
from effc.passes.attention.raising import other_attention
from effc.passes.base import Contract, LeftAlone, Match, Pass, PassReport, Site
from effc.passes.tokens.prompt_scores import prompt_scores

SHARE = 13 / 32
"""Depth of the filter layer by default: that of layer 13 in a model of 32."""
REPORT_TOKENS = (2048, 8192, 32768)
"""Lengths of prompts at which the share that is kept is reported."""
CHECKED = "the model itself is as it was, so measured differences are those of prompts that are not shortened"


@dataclass(frozen=True)
class PromptFilter(Pass):
    """Let the first layers choose the tokens of a long prompt that the whole model reads.

    Generation runs the embedding and the first layers over the prompt. In the last of them the query of the last token
    scores every token. Those with the best scores, in their order and with positions of their own from 0, are the
    prompt. Shorter prompts, and everything but generation, are as before. `docs/prompt-filter.md` has figures.

    Before:

        logits, present.* = model(input_ids, attention_mask, position_ids, past_key_values.*)

    After (`prompt-filter{keep=1024}`), as a second graph over the same weights:

        prompt_scores = pool(sum over heads of q_last · k)          # of layer 13 of 32

    Attributes:
        scheme: `gemfilter`: tokens by the queries and keys of one layer.
        layer: Layer that scores, from 0; None: at 40 % of the layers, the nearest one without a window.
        keep: Tokens of the prompt that stay.
        pool: Tokens around each that share a score.
        padding: The mean at the ends of a prompt: `valid` counts the tokens that are there, `zero` also zeros beyond
            them, as GemFilter's reference code does.
        forced: Tokens at the end (the question) that stay in any case, and the first one with them. 0: none, as in
            GemFilter's reference code.
    """

    name: ClassVar[str] = "prompt-filter"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    scheme: Literal["gemfilter"] = "gemfilter"
    layer: int | None = field(default=None, metadata={"range": "0 or more"})
    keep: int = field(default=1024, metadata={"range": "1 or more"})
    pool: int = field(default=5, metadata={"range": "an odd number from 1 to 255"})
    padding: Literal["valid", "zero"] = "valid"
    forced: int = field(default=64, metadata={"range": "0 or more, below keep"})

    def __post_init__(self) -> None:
        limits = {"layer": (0, 10**6), "keep": (1, 2**31 - 1), "pool": (1, 255)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}, it must be from {low} to {high}.")
        if self.pool % 2 == 0:
            raise UsageError(f"pool is {self.pool}, it must be an odd number.")
        if not 0 <= self.forced < self.keep:
            raise UsageError(
                f"forced is {self.forced}, it must be from 0 to {self.keep - 1}: fewer tokens than the {self.keep} "
                "of keep."
            )

    def requires(self) -> Sequence[Pass]:
        """Attention and its cache must be one op."""
        return (CachedAttention(),)

    def match(self, program: Program) -> Match:
        """Find the layer that scores."""
        if program.prompt_filter is not None:
            return Match((), [LeftAlone("program", "its prompts are filtered already")])
        if program.task != Task.CAUSAL_LM:
            return Match((), [LeftAlone("program", f"its task is {program.task}; prompts are read by causal-lm")])
        attentions = cached_attention_sites(program.graph)
        if not attentions:
            return Match((), other_attention(program, False))
        if self.layer is not None and self.layer >= len(attentions):
            raise UsageError(f"prompt-filter: layer is {self.layer}, the model has layers 0 to {len(attentions) - 1}.")
        reasons = [_reason(site) for site in attentions]
        usable = [index for index, reason in enumerate(reasons) if not reason]
        wanted = [self.layer] if self.layer is not None else range(len(attentions))
        index = min(
            (one for one in usable if one in wanted), key=lambda one: _distance(one, len(attentions)), default=-1
        )
        if index < 0:
            return Match((), [LeftAlone(attentions[one].name, reasons[one]) for one in wanted])
        return Match([Site(attentions[index].name, (attentions[index], index, len(attentions)))])

    def apply(self, program: Program, sites: Sequence[Site]) -> PassReport:
        """Add the scores as an output."""
        if not sites:
            return PassReport()
        attention, layer, layers = sites[0].payload
        scores = prompt_scores(attention, pool=self.pool, count_padding=self.padding == "zero")
        scores.name = prompt_filter.SCORES
        program.graph.outputs.append(scores)
        program.prompt_filter = prompt_filter.PromptFilter(layer, layers, self.keep, self.forced)
        return PassReport([sites[0].name], details={"prompt_filter": self._figures(layer, layers)})

    def _figures(self, layer: int, layers: int) -> dict[str, Any]:
        """JSON-ready: the layer, what is kept, and what the contract check says."""
        kept = {str(tokens): round(min(self.keep, tokens) / tokens, 4) for tokens in REPORT_TOKENS}
        return {
            "layer": layer,
            "layers": layers,
            "keep": self.keep,
            "forced": self.forced,
            "kept_ratio": kept,
            "positions": "compact",
            "checked": CHECKED,
        }


def _distance(index: int, layers: int) -> float:
    return abs(index - SHARE * layers)


def _reason(site: CachedAttentionSite) -> str:
    """Why a layer cannot score; empty when it can."""
    if site.form.window:
        return f"its window of {site.form.window} tokens hides the others; take a layer without one"
    if site.selection.turns_by_place:
        return f"its cache has selection={site.selection.kind}, which knows places and no positions"
    if site.node.inputs[4] is not None:
        return "its mask is only known as numbers added to the scores, so what it hides cannot be told"
    return "its scale is not positive" if site.form.scale <= 0 else ""
