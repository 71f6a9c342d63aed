"""FlashInfer behind the attn contract; nothing is imported here, so that listing backends stays free."""
