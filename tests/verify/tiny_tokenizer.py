"""A tokenizer of 37 ids: BOS, digits, letters; everything else is the letter z."""

from __future__ import annotations

import json
from dataclasses import replace

import tokenizers

from effc.ir.program import Program

BOS, ZERO, A = 0, 1, 11
UNKNOWN = A + 25


def tokenizer_json() -> bytes:
    """Characters in lower case, BOS before a text."""
    words = {"<s>": BOS, **{str(digit): ZERO + digit for digit in range(10)}}
    words.update({chr(ord("a") + place): A + place for place in range(26)})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="z"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made.to_str().encode()


def with_tokenizer(program: Program) -> Program:
    """The program with this tokenizer."""
    assets = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": json.dumps({"bos_token": "<s>"}).encode()}
    program.source = replace(program.source, assets=assets)
    return program
