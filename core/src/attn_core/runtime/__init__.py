"""What runs: batches, layers, the paged cache, the backend protocol, and what binds a plan to backends."""
