# The real wheel, for its operators' schemas: 60 MB, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.fa3
.cache/wheels/.fa3: plugins/attn-fa3/tests/test_signatures.py | $(VENV)/.tools
	@echo "setup: the wheel of tokenspeed-fa3, for its signatures"
	@$(BIN)/python plugins/attn-fa3/tests/real_wheel.py tokenspeed-fa3==3.0.0.post20260810
	@touch $@
