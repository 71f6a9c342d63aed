"""The Triton kernels; nothing here knows of batches, layers or plans."""
