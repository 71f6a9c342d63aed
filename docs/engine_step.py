"""A prompt of 40 tokens and one decode over the paged cache: the example of reference/engine.md, which a test runs."""

import attn_core as attn
import torch

config = attn.AttentionConfig.preset("smollm2-135m", dtype="float32")  # or from_hf("path/to/model")
plan = attn.plan(config)
cache = attn.KVCache.allocate(plan.config, num_pages=64)
pages = attn.PageAllocator(num_pages=64)
backend = attn.build(plan, cache)
layers = [attn.AttentionLayer.of_kind(plan.config.kind_of(i), i) for i in range(plan.config.num_layers)]
size = plan.config.page_size
prompt, own = 40, pages.allocate(-(-(40 + 1) // size))


def step(batch):
    backend.init_forward_metadata(batch)  # once a step
    n, out = batch.num_tokens, None
    for layer in layers:  # q, k, v come from the model
        q, k, v = torch.randn(n, 9, 64), torch.randn(n, 3, 64), torch.randn(n, 3, 64)
        out = backend.forward(q, k, v, layer, batch)
    return out


build, mode = attn.ForwardBatch.build, attn.ForwardMode
prefill = build(mode.EXTEND, query_lens=[prompt], seq_lens=[prompt], pages=[own], page_size=size)
decode = build(mode.DECODE, query_lens=[1], seq_lens=[prompt + 1], pages=[own], page_size=size)
print(step(prefill).shape, step(decode).shape)  # [40, 9, 64], [1, 9, 64]
pages.release(own)
