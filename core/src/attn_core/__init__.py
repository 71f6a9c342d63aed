"""attn: the plugin layer for attention kernels in LLM serving."""
