# The real wheels, for their signatures: 10 MB beside attn-flashinfer's, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.mla
.cache/wheels/.mla: plugins/attn-mla/tests/test_signatures.py | $(VENV)/.tools
	@echo "setup: the wheels of sgl-flash-mla and flashinfer-python, for their signatures"
	@$(BIN)/python plugins/attn-mla/tests/real_wheel.py sgl-flash-mla==1.0.0 flashinfer-python==0.7.2.post1
	@touch $@
