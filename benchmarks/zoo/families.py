"""The table of `transformers` families: every way the library multiplies by a weight, one tiny random model each.

Sizes are odd and unequal wherever a family allows, so that a transposed factor, a wrong split or swapped sizes cannot
pass by luck. Dropout stays at each family's default; dropped layers and masked features are off, for a layer that is
skipped at random has no gradient at random.
"""

from __future__ import annotations

from zoo.building import VOCAB, Family

HEADS = {"hidden_size": 48, "num_attention_heads": 4}
STACK = {"vocab_size": VOCAB, "num_hidden_layers": 2, "intermediate_size": 80, **HEADS}
GROUPED = {**STACK, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = {**GROUPED, **SPECIAL}
IMAGE = {**HEADS, "num_hidden_layers": 2, "intermediate_size": 80, "image_size": 16, "patch_size": 4}
STAGES = {"depths": [1, 1], "image_size": 32}
SPEECH = {
    **STACK, "conv_dim": (24, 24), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False, **SPECIAL,
}  # fmt: skip
TWO_STACKS = {
    "vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 40,
    "decoder_start_token_id": 2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, **SPECIAL,
}  # fmt: skip
EXPERTS = {**CAUSAL, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

_EMBED = ("embed_tokens",)
_GATE_UP = ("experts.gate_up_proj", "experts.down_proj")

# fmt: off
FAMILIES: tuple[Family, ...] = (
    # decoders
    Family("llama", "decoder", "LlamaForCausalLM", CAUSAL, also=_EMBED),
    Family("mistral", "decoder", "MistralForCausalLM", {**CAUSAL, "sliding_window": 5}),
    Family("qwen2", "decoder", "Qwen2ForCausalLM", CAUSAL),
    Family("qwen3", "decoder", "Qwen3ForCausalLM", {**CAUSAL, "head_dim": 16}),
    Family("gemma", "decoder", "GemmaForCausalLM", {**CAUSAL, "head_dim": 16}, also=_EMBED),
    Family("gemma2", "decoder", "Gemma2ForCausalLM", {**CAUSAL, "head_dim": 16, "sliding_window": 5}),
    Family("gemma3", "decoder", "Gemma3ForCausalLM", {**CAUSAL, "head_dim": 16, "sliding_window": 5}, also=_EMBED),
    Family("phi", "decoder", "PhiForCausalLM", CAUSAL),
    Family("phi3", "decoder", "Phi3ForCausalLM", CAUSAL),
    Family("gpt2", "decoder", "GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4,
           "n_inner": 80, "n_positions": 40}, also=("wte", "wpe")),
    Family("gpt_neo", "decoder", "GPTNeoForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48, "num_layers": 2,
           "num_heads": 4, "intermediate_size": 80, "max_position_embeddings": 40, "window_size": 5,
           "attention_types": [[["global", "local"], 1]]}),
    Family("gpt_neox", "decoder", "GPTNeoXForCausalLM", STACK),
    Family("gptj", "decoder", "GPTJForCausalLM", {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4,
           "n_inner": 80, "n_positions": 40, "rotary_dim": 4}),
    Family("gpt_bigcode", "decoder", "GPTBigCodeForCausalLM", {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2,
           "n_head": 4, "n_inner": 80, "n_positions": 40}),
    Family("opt", "decoder", "OPTForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "ffn_dim": 80, "word_embed_proj_dim": 40, "max_position_embeddings": 40,
           "layerdrop": 0.0}),
    Family("bloom", "decoder", "BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2,
           "n_head": 4}),
    Family("falcon", "decoder", "FalconForCausalLM", {**STACK, "ffn_hidden_size": 80,
           "new_decoder_architecture": False, "multi_query": True}),
    Family("mpt", "decoder", "MptForCausalLM", {"vocab_size": VOCAB, "d_model": 48, "n_layers": 2, "n_heads": 4,
           "expansion_ratio": 2, "max_seq_len": 40}),
    Family("olmo2", "decoder", "Olmo2ForCausalLM", CAUSAL),
    Family("starcoder2", "decoder", "Starcoder2ForCausalLM", CAUSAL),
    Family("cohere", "decoder", "CohereForCausalLM", CAUSAL),
    Family("granite", "decoder", "GraniteForCausalLM", CAUSAL),
    Family("stablelm", "decoder", "StableLmForCausalLM", {**CAUSAL, "partial_rotary_factor": 0.5}),
    Family("smollm3", "decoder", "SmolLM3ForCausalLM", CAUSAL),
    Family("glm4", "decoder", "Glm4ForCausalLM", {**CAUSAL, "head_dim": 12}),
    Family("codegen", "decoder", "CodeGenForCausalLM", {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2,
           "n_head": 4, "n_inner": 80, "n_positions": 40, "rotary_dim": 4}),
    # encoders
    Family("bert", "encoder", "BertModel", {**STACK, "max_position_embeddings": 40}, also=("word_embeddings",
           "position_embeddings")),
    Family("roberta", "encoder", "RobertaForMaskedLM", {**STACK, **SPECIAL, "max_position_embeddings": 40}),
    Family("distilbert", "encoder", "DistilBertModel", {"vocab_size": VOCAB, "dim": 48, "n_layers": 2,
           "n_heads": 4, "hidden_dim": 80, "max_position_embeddings": 40}),
    Family("albert", "encoder", "AlbertModel", {**STACK, "embedding_size": 24, "max_position_embeddings": 40}),
    Family("electra", "encoder", "ElectraForPreTraining", {**STACK, "embedding_size": 24,
           "max_position_embeddings": 40}),
    Family("deberta", "encoder", "DebertaModel", {**STACK, "max_position_embeddings": 40,
           "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Family("deberta-v2", "encoder", "DebertaV2Model", {**STACK, "max_position_embeddings": 40,
           "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Family("mpnet", "encoder", "MPNetModel", {**STACK, "max_position_embeddings": 40}),
    Family("modernbert", "encoder", "ModernBertModel", {**STACK, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2,
           "local_attention": 6}),
    Family("xlnet", "encoder", "XLNetModel", {"vocab_size": VOCAB, "d_model": 48, "n_layer": 2, "n_head": 4,
           "d_inner": 80}, also=("rel_attn.q", "rel_attn.o")),
    Family("funnel", "encoder", "FunnelBaseModel", {"vocab_size": VOCAB, "block_sizes": [1, 1], "d_model": 48,
           "n_head": 4, "d_head": 12, "d_inner": 80}),
    Family("squeezebert", "encoder", "SqueezeBertModel", {**STACK, "embedding_size": 48,
           "max_position_embeddings": 40}),
    Family("esm", "encoder", "EsmModel", {**STACK, "max_position_embeddings": 40, "pad_token_id": 0,
           "mask_token_id": 1, "position_embedding_type": "rotary"}, unused=("contact_head.regression",)),
    Family("fnet", "encoder", "FNetModel", {**STACK, "max_position_embeddings": 40}, inputs="ids"),
    # encoder-decoders
    Family("t5", "encoder-decoder", "T5ForConditionalGeneration", {"vocab_size": VOCAB, "d_model": 48, "d_kv": 16,
           "d_ff": 80, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
           "feed_forward_proj": "gated-gelu"}, inputs="seq2seq", also=("shared",)),
    Family("bart", "encoder-decoder", "BartForConditionalGeneration", TWO_STACKS, inputs="seq2seq"),
    Family("marian", "encoder-decoder", "MarianMTModel", {**TWO_STACKS, "decoder_vocab_size": VOCAB},
           inputs="seq2seq"),
    Family("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", TWO_STACKS, inputs="seq2seq"),
    Family("mbart", "encoder-decoder", "MBartForConditionalGeneration", TWO_STACKS, inputs="seq2seq"),
    Family("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", TWO_STACKS, inputs="seq2seq"),
    # vision
    Family("vit", "vision", "ViTModel", IMAGE, inputs="pixels"),
    Family("deit", "vision", "DeiTModel", IMAGE, inputs="pixels"),
    Family("beit", "vision", "BeitModel", IMAGE, inputs="pixels"),
    Family("dinov2", "vision", "Dinov2Model", {**IMAGE, "mlp_ratio": 2, "drop_path_rate": 0.0}, inputs="pixels"),
    Family("swin", "vision", "SwinModel", {**STAGES, "embed_dim": 24, "num_heads": [2, 4], "window_size": 4,
           "patch_size": 2, "drop_path_rate": 0.0}, inputs="pixels32"),
    Family("convnext", "vision", "ConvNextModel", {"hidden_sizes": [24, 40], "depths": [1, 1], "num_stages": 2,
           "layer_scale_init_value": 1.0}, inputs="pixels32"),
    Family("segformer", "vision", "SegformerModel", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2,
           1], "hidden_sizes": [24, 40], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "patch_sizes": [7,
           3], "strides": [4, 2], "drop_path_rate": 0.0}, inputs="pixels32"),
    Family("clip", "vision", "CLIPModel", {"text_config": {**STACK, **SPECIAL, "max_position_embeddings": 40},
           "vision_config": IMAGE, "projection_dim": 36}, inputs="text+pixels"),
    Family("siglip", "vision", "SiglipModel", {"text_config": {**STACK, **SPECIAL, "max_position_embeddings": 40,
           "projection_size": 48}, "vision_config": IMAGE}, inputs="text+pixels",
           also=("head.attention.in_proj_weight", "head.attention.out_proj")),
    # speech
    Family("wav2vec2", "speech", "Wav2Vec2Model", {**SPEECH, "num_feat_extract_layers": 2}, inputs="audio"),
    Family("hubert", "speech", "HubertModel", {**SPEECH, "num_feat_extract_layers": 2}, inputs="audio"),
    Family("wavlm", "speech", "WavLMModel", {**SPEECH, "num_feat_extract_layers": 2}, inputs="audio"),
    Family("whisper", "speech", "WhisperForConditionalGeneration", {**TWO_STACKS, "num_mel_bins": 8,
           "max_source_positions": 20, "max_target_positions": 20}, inputs="mel+text"),
    Family("speech_to_text", "speech", "Speech2TextForConditionalGeneration", {**TWO_STACKS,
           "input_feat_per_channel": 8, "max_source_positions": 80, "max_target_positions": 20,
           "conv_channels": 24}, inputs="frames+text"),
    Family("ast", "speech", "ASTModel", {**HEADS, "num_hidden_layers": 2, "intermediate_size": 80, "patch_size": 8,
           "frequency_stride": 5, "time_stride": 5, "max_length": 32, "num_mel_bins": 16}, inputs="spectrogram"),
    # mixture of experts
    Family("mixtral", "mixture", "MixtralForCausalLM", {**CAUSAL, "num_local_experts": 4,
           "num_experts_per_tok": 2}, also=_GATE_UP),
    Family("qwen2_moe", "mixture", "Qwen2MoeForCausalLM", {**EXPERTS, "num_experts": 4,
           "shared_expert_intermediate_size": 56}, also=_GATE_UP, narrow=("shared_expert_gate",)),
    Family("qwen3_moe", "mixture", "Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4, "head_dim": 12},
           also=_GATE_UP),
    Family("gpt_oss", "mixture", "GptOssForCausalLM", {**CAUSAL, "num_local_experts": 4, "num_experts_per_tok": 2,
           "head_dim": 12, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
           also=_GATE_UP),
    Family("olmoe", "mixture", "OlmoeForCausalLM", {**CAUSAL, "num_experts": 4, "num_experts_per_tok": 2},
           also=_GATE_UP),
    Family("deepseek_v3", "mixture", "DeepseekV3ForCausalLM", {**EXPERTS, "n_routed_experts": 4,
           "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 20,
           "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}, also=_GATE_UP),
    Family("phimoe", "mixture", "PhimoeForCausalLM", {**CAUSAL, "num_local_experts": 4, "num_experts_per_tok": 2},
           also=_GATE_UP),
    Family("granitemoe", "mixture", "GraniteMoeForCausalLM", {**CAUSAL, "num_local_experts": 4,
           "num_experts_per_tok": 2}),
    Family("llama4", "mixture", "Llama4ForCausalLM", {**CAUSAL, "num_local_experts": 4, "num_experts_per_tok": 1,
           "head_dim": 12, "intermediate_size_mlp": 72, "attn_temperature_tuning": False,
           "attention_chunk_size": 16}, also=_GATE_UP),
    Family("dbrx", "mixture", "DbrxForCausalLM", {"vocab_size": VOCAB, "d_model": 48, "n_heads": 4, "n_layers": 2,
           "max_seq_len": 40, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
           "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2}}, base_exports=False),
    Family("jetmoe", "mixture", "JetMoeForCausalLM", {**CAUSAL, "num_local_experts": 4, "num_experts_per_tok": 2,
           "kv_channels": 12}),
    # state space
    Family("mamba", "state-space", "MambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48,
           "num_hidden_layers": 2, "state_size": 8, "intermediate_size": 80, "expand": 2, "time_step_rank": 5}),
    Family("falcon_mamba", "state-space", "FalconMambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48,
           "num_hidden_layers": 2, "state_size": 8, "expand": 2, "time_step_rank": 5}),
    Family("mamba2", "state-space", "Mamba2ForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48,
           "num_hidden_layers": 2, "state_size": 8, "expand": 2, "head_dim": 12, "num_heads": 8, "n_groups": 2,
           "chunk_size": 4, **SPECIAL}),
    Family("jamba", "state-space", "JambaForCausalLM", {**CAUSAL, "num_experts": 4, "num_experts_per_tok": 2,
           "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
           "mamba_d_state": 8, "mamba_dt_rank": 5}),
    Family("bamba", "state-space", "BambaForCausalLM", {**CAUSAL, "attn_layer_indices": [1], "mamba_n_heads": 8,
           "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}),
    Family("zamba2", "state-space", "Zamba2ForCausalLM", {**CAUSAL, "num_key_value_heads": 4, "mamba_d_state": 8,
           "mamba_expand": 2, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 4, "num_hidden_layers": 3,
           "hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid", "mamba"], "adapter_rank": 4,
           "num_mem_blocks": 1, "use_mem_eff_path": False}),
    # recurrent
    Family("rwkv", "recurrent", "RwkvForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48,
           "attention_hidden_size": 40, "num_hidden_layers": 2, "intermediate_size": 80, "context_length": 40},
           inputs="ids"),
    Family("recurrent_gemma", "recurrent", "RecurrentGemmaForCausalLM", {**CAUSAL, "head_dim": 12, "lru_width": 48,
           "attention_window_size": 6, "block_types": ["recurrent", "attention"], "num_hidden_layers": 2}),
    Family("xlstm", "recurrent", "xLSTMForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48, "embedding_dim": 48,
           "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4, "chunk_size": 4, "mode": "inference"},
           inputs="ids"),
    Family("lfm2", "recurrent", "Lfm2ForCausalLM", {**CAUSAL, "full_attn_idxs": [1], "layer_types": ["conv",
           "full_attention"]}),
    Family("qwen3_next", "recurrent", "Qwen3NextForCausalLM", {**EXPERTS, "num_experts": 4, "head_dim": 12,
           "shared_expert_intermediate_size": 56, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
           "linear_key_head_dim": 12, "linear_value_head_dim": 10, "layer_types": ["linear_attention",
           "full_attention"]}, also=_GATE_UP, narrow=("shared_expert_gate",)),
)
# fmt: on
