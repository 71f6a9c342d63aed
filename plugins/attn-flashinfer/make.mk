# The real wheel, for its signatures: 62 MB, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.flashinfer
.cache/wheels/.flashinfer: plugins/attn-flashinfer/tests/test_signatures.py | $(VENV)/.tools
	@echo "setup: the wheel of flashinfer-python, for its signatures"
	@$(BIN)/python plugins/attn-flashinfer/tests/real_wheel.py flashinfer-python==0.7.2.post1
	@touch $@

# Our Triton kernels around the library, on Triton's interpreter and through its compiler, where attn-triton's tests run.
PLUGIN_TESTS += test-flashinfer-kernels
.PHONY: test-flashinfer-kernels
test-flashinfer-kernels: .venvs/triton-tests/.ready
	.venvs/triton-tests/bin/python -m pytest -n 0 plugins/attn-flashinfer/kernel_tests
