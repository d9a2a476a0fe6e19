"""Tiny random models of many architectures: they prove plumbing, never quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN = 64
VOCABULARY = 128
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo.

    Attributes:
        name: Row of the coverage table.
        config: Name of the transformers configuration class.
        model: Name of the transformers model class.
        options: Arguments of the configuration.
        feature: What this entry exercises beyond the others.
    """

    name: str
    config: str
    model: str
    options: dict[str, Any]
    feature: str = ""

    def save(self, folder: Path, dtype: str = "float32") -> Path:
        """Write a seeded random model as a Hugging Face folder."""
        import torch
        import transformers

        torch.manual_seed(7)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)(config).eval().to(getattr(torch, dtype))
        model.save_pretrained(folder)
        return folder


def _decoder(name: str, prefix: str, feature: str = "", drop: tuple[str, ...] = (), **options: Any) -> Architecture:
    base = {key: value for key, value in DECODER.items() if key not in drop}
    return Architecture(name, f"{prefix}Config", f"{prefix}ForCausalLM", {**base, **options}, feature)


def _encoder(name: str, prefix: str, feature: str = "", drop: tuple[str, ...] = (), **options: Any) -> Architecture:
    base = {key: value for key, value in ENCODER.items() if key not in drop}
    return Architecture(name, f"{prefix}Config", f"{prefix}Model", {**base, **options}, feature)


def _vision(name: str, config: str, model: str, feature: str = "", **options: Any) -> Architecture:
    return Architecture(name, config, model, {**VISION, **options}, feature)


TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

ZOO: tuple[Architecture, ...] = (
    _decoder("llama", "Llama", "GQA, RoPE, gated MLP"),
    _decoder("llama-tied", "Llama", "tied embeddings", tie_word_embeddings=True),
    _decoder(
        "llama3-rope",
        "Llama",
        "scaled RoPE",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    _decoder("mistral", "Mistral", "sliding window", sliding_window=16),
    _decoder("qwen2", "Qwen2", "biases on q, k, v"),
    _decoder("qwen3", "Qwen3", "norms on q and k", head_dim=16),
    _decoder("gemma", "Gemma", "1 + w norms, MQA", head_dim=16, num_key_value_heads=1),
    _decoder(
        "gemma2", "Gemma2", "softcap, alternating windows", head_dim=16, sliding_window=16, query_pre_attn_scalar=16
    ),
    Architecture(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
        "two rotary bases, windows",
    ),
    _decoder("phi3", "Phi3", "fused qkv and gate", pad_token_id=0),
    _decoder("phi", "Phi", "partial RoPE, parallel blocks", drop=()),
    _decoder("starcoder2", "Starcoder2", "biases, plain MLP"),
    _decoder("olmo2", "Olmo2", "norm after the block"),
    _decoder("granite", "Granite", "multipliers"),
    _decoder("cohere", "Cohere", "interleaved RoPE, logit scale"),
    _decoder("stablelm", "StableLm", "partial RoPE"),
    _decoder("smollm3", "SmolLM3", "layers without RoPE"),
    _decoder("glm4", "Glm4", "partial interleaved RoPE", head_dim=16),
    _decoder("nemotron", "Nemotron", "squared ReLU, layer norm 1p"),
    _decoder("mixtral", "Mixtral", "mixture of experts", num_local_experts=4, num_experts_per_tok=2),
    _decoder(
        "qwen3-moe",
        "Qwen3Moe",
        "mixture of experts",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
    ),
    Architecture(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128, **TOKENS},
        "Conv1D weights, learned positions",
    ),
    Architecture(
        "gpt-neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {key: value for key, value in DECODER.items() if key != "num_key_value_heads"},
        "fused qkv, partial RoPE",
    ),
    Architecture(
        "gptj",
        "GPTJConfig",
        "GPTJForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "rotary_dim": 8,
            **TOKENS,
        },
        "interleaved partial RoPE",
    ),
    Architecture(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            **TOKENS,
        },
        "positions with an offset",
    ),
    Architecture(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, **TOKENS},
        "ALiBi",
    ),
    Architecture(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            **TOKENS,
        },
        "MQA, parallel blocks",
    ),
    Architecture(
        "mpt",
        "MptConfig",
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, **TOKENS},
        "ALiBi",
    ),
    Architecture(
        "mamba",
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8, **TOKENS},
        "state space model",
    ),
    _encoder("bert", "Bert"),
    _encoder("roberta", "Roberta", "positions from padding", pad_token_id=1, max_position_embeddings=130),
    Architecture(
        "distilbert",
        "DistilBertConfig",
        "DistilBertModel",
        {
            "vocab_size": VOCABULARY,
            "dim": HIDDEN,
            "hidden_dim": 96,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 128,
        },
        "no token types",
    ),
    _encoder("electra", "Electra", "projected embeddings", embedding_size=32),
    _encoder("albert", "Albert", "layers share weights", embedding_size=32),
    _encoder(
        "deberta-v2",
        "DebertaV2",
        "disentangled attention",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
    ),
    _encoder("mpnet", "MPNet", "relative bias", pad_token_id=1, max_position_embeddings=130),
    _encoder(
        "modernbert",
        "ModernBert",
        "RoPE, local windows",
        global_attn_every_n_layers=2,
        local_attention=16,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    Architecture(
        "t5-encoder",
        "T5Config",
        "T5EncoderModel",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        "relative bias, RMS norm",
    ),
    _vision("vit", "ViTConfig", "ViTModel"),
    _vision("deit", "DeiTConfig", "DeiTModel", "distillation token"),
    _vision("dinov2", "Dinov2Config", "Dinov2Model", "layer scale"),
    _vision("clip-vision", "CLIPVisionConfig", "CLIPVisionModel"),
    _vision("siglip-vision", "SiglipVisionConfig", "SiglipVisionModel", "attention pooling"),
    Architecture(
        "whisper-encoder",
        "WhisperConfig",
        "WhisperModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "num_mel_bins": 20,
            "max_source_positions": 40,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            **TOKENS,
        },
        "audio features",
    ),
)
