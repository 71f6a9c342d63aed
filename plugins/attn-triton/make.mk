# Triton without a GPU: its interpreter runs the kernels, its compiler compiles them. In an environment of its own over
# .venv, since its wheel is larger than all the rest but torch. The release is the one that torch 2.11 comes with: its Gluon
# and its ptxas are what the evidence from GPUs is about.
TRITON_ENV   := .venvs/triton-tests
TRITON_TESTS := plugins/attn-triton/tests
PLUGIN_TESTS += test-triton
OWN_TESTS    += $(TRITON_TESTS)

.PHONY: test-triton verify-triton

$(TRITON_ENV)/.ready: $(VENV)/.plugins
	@echo "setup: triton 3.6.0 in $(TRITON_ENV)"
	@rm -rf $(TRITON_ENV) && $(BIN)/python -m venv --without-pip $(TRITON_ENV)
	@printf "import site; site.addsitedir('%s')\n" "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(echo $(TRITON_ENV)/lib/python*/site-packages)/workspace.pth"
	@$(PIP) --python $(TRITON_ENV)/bin/python install --quiet --no-deps triton==3.6.0
	@touch $@

# Interpreted and compiled in processes of their own: a kernel is the one or the other from when it is defined.
test-triton: $(TRITON_ENV)/.ready
	TRITON_INTERPRET=1 $(TRITON_ENV)/bin/python -m pytest -n 2 $(TRITON_TESTS)/interpreted
	TRITON_CACHE_DIR=$(TRITON_ENV)/cache $(TRITON_ENV)/bin/python -m pytest -n 2 $(TRITON_TESTS)/compiled

# The whole contract tier on the interpreter, with evidence: about 20 minutes of two cores.
verify-triton: $(TRITON_ENV)/.ready
	TRITON_INTERPRET=1 $(TRITON_ENV)/bin/python -m attn_core verify triton --device emulated:triton-interpreter \
		--tier contract --evidence evidence
