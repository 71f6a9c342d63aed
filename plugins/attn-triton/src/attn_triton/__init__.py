"""attn-triton: paged attention kernels of our own in Triton, for NVIDIA and AMD."""
