"""`PromptFilter`: what a program says about prompts that are shortened before the model reads them."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = "prompt_scores"
"""Graph output float32 [batch, seq]: how much each new token matters to the last one; 0 at padding."""


@dataclass(frozen=True)
class PromptFilter:
    """Which tokens of a prompt the model is to read.

    The scores are one more output of the graph until a backend makes a graph of their own of what they depend on.

    Attributes:
        layer: Attention whose queries and keys give the scores, from 0.
        layers: Attentions of the model.
        keep: Tokens that stay of a longer prompt.
        forced: Tokens at its end that stay in any case, and then its first one too; 0: none.
    """

    layer: int
    layers: int
    keep: int
    forced: int
