"""Tiny configurations of many architectures."""

import transformers as t

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 300,
    "pad_token_id": 0,
}
BERT = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

CAUSAL = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
    "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, head_dim=8, sliding_window=8)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=16)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=8)),
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SMALL, eos_token_id=1, bos_token_id=1)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=300)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=101,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=300,
        )
    ),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**BERT)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)),
    "gpt-oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(
            **SMALL,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SMALL)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SMALL)),
    "deepseek-v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
        )
    ),
}

ENCODERS = {
    "bert": lambda: t.BertModel(t.BertConfig(**BERT)),
    "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**BERT)),
    "bert-classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**{**BERT, "pad_token_id": 1})),
    "distilbert": lambda: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=101, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=300)
    ),
    "modernbert": lambda: t.ModernBertModel(
        t.ModernBertConfig(
            **BERT,
            local_attention=8,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
            eos_token_id=2,
            bos_token_id=1,
        )
    ),
    "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**{**BERT, "pad_token_id": 1})),
    "t5": lambda: t.T5Model(
        t.T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=101,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
}

IMAGES = {
    "vit": lambda: t.ViTModel(t.ViTConfig(**VISION)),
    "vit-classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=3)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),
    "clip": lambda: t.CLIPModel(
        t.CLIPConfig(
            text_config={**BERT, "eos_token_id": 2, "bos_token_id": 1, "projection_dim": 16},
            vision_config={**VISION, "projection_dim": 16},
            projection_dim=16,
        )
    ),
    "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config={**BERT}, vision_config={**VISION})),
    "swin": lambda: t.SwinModel(
        t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
}
