"""Code of another compiler in the emulator: Triton's."""
