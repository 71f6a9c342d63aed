"""Tests of attn-wave."""
