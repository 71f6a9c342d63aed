"""Our Triton kernels around the library: joining partial results, and the keys of tree drafts."""
