# SGLang on the CPU, beside .venv: the engine without the kernel libraries that only GPUs have. Its torch is .venv's,
# one minor release before the one that it pins, and its triton, which is imported and never runs, attn-triton's.
SGLANG_ENV   := .venvs/sglang
SGLANG_TESTS := core/tests/engines/sglang
SGLANG_SITES  = $(BIN) $(TRITON_ENV)/bin
PLUGIN_TESTS += test-sglang
OWN_TESTS    += $(SGLANG_TESTS)

.PHONY: test-sglang bench-sglang

$(SGLANG_ENV)/.ready: $(SGLANG_TESTS)/requirements.txt | $(VENV)/.plugins $(TRITON_ENV)/.ready
	@echo "setup: sglang 0.5.23 in $(SGLANG_ENV)"
	@rm -rf $(SGLANG_ENV) && $(BIN)/python -m venv --without-pip $(SGLANG_ENV)
	@for bin in $(SGLANG_SITES); do \
		printf "import site; site.addsitedir('%s')\n" "$$($$bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	done > "$$(echo $(SGLANG_ENV)/lib/python*/site-packages)/workspace.pth"
	@$(PIP) --python $(SGLANG_ENV)/bin/python install --quiet --no-deps --requirement $(SGLANG_TESTS)/requirements.txt
	@touch $@

# The stand-ins are for torchvision, sgl_kernel and soundfile, which have no build for this CPU and this torch or are not
# needed, and for IPython.
test-sglang: $(SGLANG_ENV)/.ready
	PYTHONPATH=$(SGLANG_TESTS)/standins SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 \
		$(SGLANG_ENV)/bin/python -m pytest -n 2 --dist loadgroup -p no:warnings $(SGLANG_TESTS)

bench-sglang: $(SGLANG_ENV)/.ready
	PYTHONPATH=$(SGLANG_TESTS)/standins $(SGLANG_ENV)/bin/python benchmarks/engines_sglang.py --write
