"""Our Triton kernels around FlashInfer."""
