# Wave's compiler, for whoever changes a kernel: an environment of its own over .venv. The tests need none of it: what was
# compiled lies in the package, and is checked against the sources.
WAVE_ENV := .venvs/wave

.PHONY: wave-compile

$(WAVE_ENV)/.ready: $(VENV)/.plugins
	@echo "setup: wave-lang 3.9.1 in $(WAVE_ENV)"
	@rm -rf $(WAVE_ENV) && $(BIN)/python -m venv --without-pip $(WAVE_ENV)
	@printf "import site; site.addsitedir('%s')\n" "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(echo $(WAVE_ENV)/lib/python*/site-packages)/workspace.pth"
	@$(PIP) --python $(WAVE_ENV)/bin/python install --quiet wave-lang==3.9.1
	@touch $@
