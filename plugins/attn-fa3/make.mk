# The real wheels, for what their functions take: 61 MB, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.fa3
.cache/wheels/.fa3: plugins/attn-fa3/tests/test_signatures.py plugins/attn-fa3/tests/test_fa4.py | $(VENV)/.tools
	@echo "setup: the wheels of tokenspeed-fa3 and flash-attn-4, for their signatures"
	@$(BIN)/python plugins/attn-fa3/tests/real_wheel.py tokenspeed-fa3==3.0.0.post20260810 flash-attn-4==4.0.0b36
	@touch $@

# Our Triton kernels around the library, on Triton's interpreter and through its compiler, where attn-triton's tests run.
PLUGIN_TESTS += test-fa3-kernels
.PHONY: test-fa3-kernels
test-fa3-kernels: .venvs/triton-tests/.ready
	.venvs/triton-tests/bin/python -m pytest -n 0 plugins/attn-fa3/kernel_tests
