"""The small engine of `attn generate`: transformers gives weights and modules; cache, batching, attention are ours."""
