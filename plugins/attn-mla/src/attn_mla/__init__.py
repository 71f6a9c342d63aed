"""Decode libraries for multi-head latent attention behind the attn contract; nothing is imported here."""
