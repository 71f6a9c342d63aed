# The real wheels, for their signatures: 10 MB beside attn-flashinfer's, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.mla
.cache/wheels/.mla: plugins/attn-mla/tests/test_signatures.py | $(VENV)/.tools
	@echo "setup: the wheels of sgl-flash-mla and flashinfer-python, for their signatures"
	@$(BIN)/python plugins/attn-mla/tests/real_wheel.py sgl-flash-mla==1.0.0 flashinfer-python==0.7.2.post1
	@touch $@

# Our Triton kernels around the libraries, on Triton's interpreter and through its compiler, where attn-triton's tests run.
PLUGIN_TESTS += test-mla-kernels
.PHONY: test-mla-kernels
test-mla-kernels: .venvs/triton-tests/.ready
	.venvs/triton-tests/bin/python -m pytest -n 0 plugins/attn-mla/kernel_tests
