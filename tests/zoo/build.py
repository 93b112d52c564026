"""Every causal language model class of the pinned transformers, small enough to build in milliseconds.

A class is built from its own default configuration with every known size field shrunk, also in nested
configurations; a pattern of layers (`layer_types` and the like) keeps one layer of each kind. What needs more than the
common table has an entry in `OVERRIDES`; what cannot be built, or is not a decoder of text, is named in `UNBUILDABLE`.

Weights are random and nothing is at a neutral value: no zero bias, no unit norm, no closed gate, so that a wrong
gradient, a swapped axis or a left-out term shows in the numbers.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
FIRST_TOKEN = 8
"""Ids below this are special tokens (padding 0, beginning 1, end 2); those of images and audio are the last ones."""
LAST_TOKEN = 64
POSITIONS = 64

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD = 32, 4, 2, 8
MLP, EXPERT_MLP = 48, 24
EXPERTS, ACTIVE = 4, 2

SIZES: Mapping[str, Any] = {
    # widths
    **dict.fromkeys(
        "hidden_size d_model n_embd embed_dim emb_dim attention_hidden_size embedding_size word_embed_proj_dim "
        "embedding_dim lru_width input_embedding_size output_embedding_size encoder_hidden_size backbone_hidden_size "
        "output_dim projector_input_dim projector_output_dim input_size pronunciation_embed_dim "
        "shape_embed_dim".split(),
        HIDDEN,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff d_inner ffn_hidden_size "
        "dense_intermediate_size intermediate_size_mlp feed_forward_size mlp_dim d_ff prompt_mid_dim".split(),
        MLP,
    ),
    **dict.fromkeys(
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
        "router_hidden_size".split(),
        EXPERT_MLP,
    ),
    # heads
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads "
        "linear_num_value_heads mamba_n_heads mamba_num_heads index_n_heads".split(),
        HEADS,
    ),
    **dict.fromkeys(
        "num_key_value_heads swa_num_key_value_heads linear_num_key_heads kv_n_heads num_kv_heads "
        "num_query_groups num_global_key_value_heads".split(),
        KEY_VALUE_HEADS,
    ),
    **dict.fromkeys(
        "head_dim global_head_dim swa_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim dim_head attention_head_size d_head d_kv kv_channels "
        "attention_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim qk_rope_head_dim".split(),
        HEAD,
    ),
    "rotary_dim": 4,
    "query_pre_attn_scalar": HEAD,
    # mixtures
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), EXPERTS),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts".split(), ACTIVE),
    **dict.fromkeys("n_group num_expert_group topk_group".split(), 1),
    **dict.fromkeys("n_shared_experts num_shared_experts moe_num_shared_experts".split(), 1),
    **dict.fromkeys("first_k_dense_replace num_dense_layers moe_layer_start_index".split(), 1),
    "zero_expert_num": 2,
    # ranks, states and convolutions
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank".split(), 12),
    **dict.fromkeys("gated_norm_rank hc_lowrank adapter_rank laurel_rank d_rel".split(), 4),
    **dict.fromkeys("mamba_d_state state_size ssm_state_size".split(), 8),
    **dict.fromkeys("mamba_dt_rank time_step_rank".split(), 6),
    **dict.fromkeys("mamba_d_conv conv_kernel linear_conv_kernel_dim short_conv_kernel_size conv1d_width".split(), 3),
    **dict.fromkeys("mamba_chunk_size chunk_size".split(), 4),
    **dict.fromkeys("mamba_n_groups n_groups mamba_ngroups".split(), 1),
    "mamba_d_ssm": HIDDEN,
    "index_topk": 4,
    # positions and windows
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
        "original_max_position_embeddings rel_extent".split(),
        POSITIONS,
    ),
    **dict.fromkeys(
        "sliding_window window_size local_attention attention_window_size sliding_window_size "
        "attention_chunk_size local_attention_window_len keep_window_size".split(),
        4,
    ),
    # what a decoder of text does not use, small
    **dict.fromkeys("image_size crop_size".split(), 16),
    **dict.fromkeys("patch_size".split(), 8),
    "num_position_embeddings": 16,
    "out_hidden_size": HIDDEN,
    "hidden_size_per_layer_input": 8,
    "max_source_positions": 16,
    "num_mel_bins": 8,
    **dict.fromkeys(
        "output_channels ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels adapter_in_dim "
        "adapter_out_dim adapter_input_size".split(),
        HIDDEN,
    ),
}
"""Name of a configuration field -> its small value."""

DEPTHS = frozenset(
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers depth num_blocks num_layers_per_stack".split()
)
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types", "attn_layers")
"""Fields with one entry a layer, of which one of each kind is kept."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
_GEMMA4 = {"global_head_dim": 16}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "BambaForCausalLM": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "BltForCausalLM": {
        "encoder_config": {"hidden_size_global": HIDDEN},
        "decoder_config": {"hidden_size_global": HIDDEN},
        "encoder_hash_byte_group_vocab": 64,
    },
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "DbrxForCausalLM": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": ACTIVE},
    "Dots1ForCausalLM": {"n_routed_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "n_shared_experts": 1},
    "NemotronForCausalLM": {"num_key_value_heads": KEY_VALUE_HEADS},
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": {"text_config": _GEMMA4},
    "Gemma4UnifiedForCausalLM": _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": {"text_config": _GEMMA4},
    "Dots3NoteForCausalLM": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 2 * HEAD,
        "swa_qk_nope_head_dim": HEAD,
        "swa_v_head_dim": HEAD,
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "HunYuanMoEV1ForCausalLM": {"num_experts": EXPERTS, "moe_topk": ACTIVE},
    "HrmTextForCausalLM": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "FlaubertWithLMHeadModel": {"causal": True},
    "Mistral4ForCausalLM": {"head_dim": 2 * HEAD},
    "XLMWithLMHeadModel": {"causal": True},
    "ReformerModelWithLMHead": {
        "hash_seed": 0,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"n_mamba_heads": 8, "mamba_headdim": HEAD, "attention_hidden_size": 2 * HIDDEN, **_SHARED},
    "ZambaForCausalLM": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD, **_SHARED},
    "xLSTMForCausalLM": {"autocast_kernel_dtype": "float32", "ffn_round_up_to_multiple_of": 16, "qk_dim_factor": 1.0},
}
"""Class -> settings that the common table does not give."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "BigBirdForCausalLM original_full": {"attention_type": "original_full"},
    "FalconForCausalLM new_decoder_architecture": {"new_decoder_architecture": True},
    "FalconForCausalLM multi_head": {"multi_query": False, "alibi": True, "num_kv_heads": HEADS},
    "GPTBigCodeForCausalLM multi_head": {"multi_query": False},
    "DeepseekV3ForCausalLM no_q_lora": {"q_lora_rank": None},
    "LlamaForCausalLM biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
"""Settings of a class that change its layout of weights: class and a word -> settings."""

UNBUILDABLE: Mapping[str, str] = {
    "Gemma3nForConditionalGeneration": "its vision tower is made by timm and pillow, which are not requirements",
    "MusicgenForCausalLM": "a decoder of audio codes: its input has one row per codebook, not per example",
    "MusicgenMelodyForCausalLM": "a decoder of audio codes: its input has one row per codebook, not per example",
    "Gemma4AssistantForCausalLM": "a draft head: it reads the keys and values of the model that it drafts for",
    "Gemma4UnifiedAssistantForCausalLM": "a draft head: it reads the keys and values of the model that it drafts for",
}
"""Class -> why it is not in the zoo."""


@cache
def _classes() -> dict[str, type[PreTrainedConfig]]:
    """Class name -> configuration class, for each entry of the causal language model mapping and `EXTRA`."""
    found: dict[str, type[PreTrainedConfig]] = {}
    for kind, entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in (entry,) if isinstance(entry, str) else entry:
            own = getattr(transformers, name).config_class
            found[name] = own or CONFIG_MAPPING[kind]
    for name in EXTRA:
        found[name] = model_class(name).config_class
    return dict(sorted(found.items()))


EXTRA: Mapping[str, str] = {
    "FlaubertWithLMHeadModel": "flaubert.modeling_flaubert",
    "Kosmos2TextForCausalLM": "kosmos2.modeling_kosmos2",
    "Kosmos2_5TextForCausalLM": "kosmos2_5.modeling_kosmos2_5",
    "Mistral4ForCausalLM": "mistral4.modeling_mistral4",
    "BlipTextLMHeadModel": "blip.modeling_blip_text",
    "ClvpForCausalLM": "clvp.modeling_clvp",
}
"""Causal decoders that are not in the mapping: class -> module of transformers."""


def all_names() -> list[str]:
    """Every causal language model class, buildable or not."""
    return list(_classes())


def names() -> list[str]:
    """The classes of the zoo."""
    return [name for name in _classes() if name not in UNBUILDABLE]


def model_class(name: str) -> Any:
    """The class, of transformers or one of its modules."""
    name = name.partition(" ")[0]
    if name in EXTRA:
        return getattr(importlib.import_module(f"transformers.models.{EXTRA[name]}"), name)
    return getattr(transformers, name)


def config(name: str, *, vocab: int = VOCABULARY) -> PreTrainedConfig:
    """The small configuration of a class."""
    own = name.partition(" ")[0]
    return shrunk(_classes()[own], {**OVERRIDES.get(own, {}), **VARIANTS.get(name, {})}, vocab)


def shrunk(kind: type[PreTrainedConfig], more: Mapping[str, Any], vocab: int) -> PreTrainedConfig:
    """`kind` with every known field small, also inside nested configurations; `more` has the last word."""
    fields = {key: value for key, value in vars(kind()).items() if not key.startswith("_")}
    latent = "kv_lora_rank" in fields  # attention over a latent has no groups of heads
    settings: dict[str, Any] = {}
    patterns = {key: list(more.get(key) or dict.fromkeys(fields[key])) for key in PATTERNS if fields.get(key)}
    depth = max([2, *(len(kinds) for kinds in patterns.values())])
    settings |= {key: [kinds[i % len(kinds)] for i in range(depth)] for key, kinds in patterns.items()}
    media = iter(range(vocab - 1, LAST_TOKEN, -1))
    for key, value in fields.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, PreTrainedConfig):
            settings[key] = shrunk(type(value), more.get(key, {}), vocab)
        elif key == "is_decoder":
            settings[key] = True
        elif key.endswith(("token_id", "token_index")):
            if value is not None:
                settings[key] = SPECIAL[key] if key in SPECIAL else next(media)
        elif whole and "vocab_size" in key:
            settings[key] = vocab
        elif whole and key in DEPTHS:
            settings[key] = depth
        elif latent and key == "num_key_value_heads":
            settings[key] = HEADS
        elif key == "head_dim" and not latent:
            settings[key] = HEAD
        elif key in SIZES and isinstance(value, list):
            settings[key] = [SIZES[key]] * depth
        elif whole and value and key in SIZES:
            settings[key] = min(value, SIZES[key])
    return kind(
        **settings | {key: value for key, value in more.items() if not isinstance(settings.get(key), PreTrainedConfig)}
    )


def build(
    name: str,
    *,
    vocab: int = VOCABULARY,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    experts: str | None = None,
) -> nn.Module:
    """A small model of the class, in eval mode, on the CPU, the same numbers for the same seed.

    experts: how a mixture is computed, one of transformers' `experts_implementation`; without one, its own choice
    (`grouped_mm`), and in float64, which that kernel does not take, `eager`.
    """
    with quiet(), _marked_memory(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(name)(config(name, vocab=vocab)).float().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                _randomize(parameter, generator)
            for buffer in model.buffers():
                if buffer.is_floating_point() and buffer.isnan().any():
                    buffer.copy_(torch.randn(buffer.shape, generator=generator))
        if experts is None and dtype == torch.float64:
            experts = "eager"
        if experts is not None:
            model.set_experts_implementation(experts)
    return model.to(dtype)  # type: ignore[no-any-return]


def _randomize(parameter: Tensor, generator: torch.Generator) -> None:
    """Weights at the scale that keeps activations' size; anything with a meaning of its own is only disturbed."""
    noise = torch.randn(parameter.shape, generator=generator)
    known = parameter.nan_to_num(0.0, 0.0, 0.0)
    if parameter.ndim >= 2 and known.mean().abs() < 0.1:  # a matrix drawn around 0
        parameter.copy_(noise / math.sqrt(max(parameter.shape[-1], 8)))
    else:
        parameter.copy_(known + 0.1 * noise)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of transformers on small configurations."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _marked_memory() -> Iterator[None]:
    """Memory that a constructor leaves unwritten is NaN, so that `_randomize` finds it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
