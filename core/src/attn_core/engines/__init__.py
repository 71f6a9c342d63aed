"""Adapters for other engines: each translates batches and caches, all selection is `plan`; none is imported unasked."""
