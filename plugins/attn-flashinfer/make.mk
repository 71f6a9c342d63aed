# The real wheel, for its signatures: 62 MB, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.flashinfer
.cache/wheels/.flashinfer: plugins/attn-flashinfer/tests/test_signatures.py | $(VENV)/.tools
	@echo "setup: the wheel of flashinfer-python, for its signatures"
	@$(BIN)/python plugins/attn-flashinfer/tests/real_wheel.py flashinfer-python==0.7.2.post1
	@touch $@
