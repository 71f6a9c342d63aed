"""What the transformers library fills in for keys that a config leaves out, of those that attention depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Defaults = Mapping[str, Any]


def _decoder(layers: int, hidden: int, heads: int, kv_heads: int | None, context: int, **more: Any) -> Defaults:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        **more,
    }


_QWEN_WINDOW: Final[Defaults] = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

LLAMA: Final = _decoder(32, 4096, 32, None, 2048)
MISTRAL: Final = _decoder(32, 4096, 32, 8, 131072, sliding_window=4096)
MIXTRAL: Final = _decoder(32, 4096, 32, 8, 131072, sliding_window=None)
QWEN2: Final = _decoder(32, 4096, 32, 32, 32768, **_QWEN_WINDOW)
QWEN2_MOE: Final = _decoder(24, 2048, 16, 16, 32768, **_QWEN_WINDOW)
QWEN3: Final = _decoder(32, 4096, 32, 32, 32768, head_dim=128, **_QWEN_WINDOW)
QWEN3_MOE: Final = _decoder(24, 2048, 32, 4, 32768, use_sliding_window=False, sliding_window=4096)
GEMMA: Final = _decoder(28, 3072, 16, 16, 8192, head_dim=256)
GEMMA2: Final = _decoder(
    26, 2304, 8, 4, 8192, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0
)
GEMMA3_TEXT: Final = _decoder(
    26, 2304, 8, 4, 131072, head_dim=256, sliding_window=4096, sliding_window_pattern=6, query_pre_attn_scalar=256
)
GPT_OSS: Final = _decoder(36, 2880, 64, 8, 131072, head_dim=64, sliding_window=128)
DEEPSEEK_V2: Final = _decoder(32, 4096, 32, None, 2048, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64)
DEEPSEEK_V3: Final = _decoder(61, 7168, 128, None, 4096, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64)
MLLAMA_TEXT: Final = _decoder(40, 4096, 32, 8, 131072, cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38))
SIGLIP: Final[Defaults] = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
#: What a PaliGemma config fills into its parts, over the parts' own defaults, where it names none at all.
PALIGEMMA_TEXT: Final[Defaults] = {
    "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
}  # fmt: skip
PALIGEMMA_TOWER: Final[Defaults] = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
WHISPER: Final[Defaults] = {
    "d_model": 384,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "encoder_attention_heads": 6,
    "max_target_positions": 448,
}
