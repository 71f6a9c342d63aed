# The real wheels, for what their functions take: 61 MB, kept in .cache/wheels, never installed.
PLUGIN_SETUP += .cache/wheels/.fa3
.cache/wheels/.fa3: plugins/attn-fa3/tests/test_signatures.py plugins/attn-fa3/tests/test_fa4.py | $(VENV)/.tools
	@echo "setup: the wheels of tokenspeed-fa3 and flash-attn-4, for their signatures"
	@$(BIN)/python plugins/attn-fa3/tests/real_wheel.py tokenspeed-fa3==3.0.0.post20260810 flash-attn-4==4.0.0b36
	@touch $@
