# SGLang on the CPU, beside .venv: the engine without the kernel libraries that only GPUs have. Its torch is .venv's,
# one minor release before the one that it pins. Two gigabytes and several minutes, so it is no part of `make test`.
SGLANG_ENV   := .venvs/sglang
SGLANG_TESTS := core/tests/engines/sglang
OWN_TESTS    += $(SGLANG_TESTS)

.PHONY: test-sglang

$(SGLANG_ENV)/.ready: $(SGLANG_TESTS)/requirements.txt | $(VENV)/.plugins
	@echo "setup: sglang 0.5.23 in $(SGLANG_ENV)"
	@rm -rf $(SGLANG_ENV) && $(BIN)/python -m venv --without-pip $(SGLANG_ENV)
	@printf "import site; site.addsitedir('%s')\n" "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(echo $(SGLANG_ENV)/lib/python*/site-packages)/workspace.pth"
	@$(PIP) --python $(SGLANG_ENV)/bin/python install --quiet --no-deps --requirement $(SGLANG_TESTS)/requirements.txt
	@touch $@

# The stand-ins are for torchvision and sgl_kernel, which have no build for this CPU and this torch, and for IPython.
test-sglang: $(SGLANG_ENV)/.ready
	PYTHONPATH=$(SGLANG_TESTS)/standins SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 \
		$(SGLANG_ENV)/bin/python -m pytest -n 0 $(SGLANG_TESTS)

.PHONY: bench-sglang
bench-sglang: $(SGLANG_ENV)/.ready
	PYTHONPATH=$(SGLANG_TESTS)/standins $(SGLANG_ENV)/bin/python benchmarks/engines_sglang.py --write
