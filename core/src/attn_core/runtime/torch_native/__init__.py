"""torch_native: the embedded default backend, on every device torch has, in plain torch."""
