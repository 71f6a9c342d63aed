# The backend through Wave's real runtime, of which only the wheel's own megabyte is needed, over a fake libamdhip64; and
# Wave's compiler, for whoever changes a kernel: what it made lies in the package, and tests hold it to the sources.
WAVE_RUNTIME := .venvs/wave-runtime
WAVE_ENV     := .venvs/wave
WAVE_TESTS   := plugins/attn-wave/tests/hip_launches
WAVE_VERSION := 3.9.1
PLUGIN_TESTS += test-wave-runtime test-wave-triton

.PHONY: test-wave-runtime test-wave-triton verify-wave-triton wave-compile

# An empty environment over .venv: $(1) is its folder, the rest what pip installs there.
define wave-environment
	@rm -rf $(1) && $(BIN)/python -m venv --without-pip $(1)
	@printf "import site; site.addsitedir('%s')\n" "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(echo $(1)/lib/python*/site-packages)/workspace.pth"
	@$(PIP) --python $(1)/bin/python install --quiet $(2)
endef

$(WAVE_RUNTIME)/.ready: $(VENV)/.plugins $(WAVE_TESTS)/hip.c
	@echo "setup: the runtime of wave-lang $(WAVE_VERSION) in $(WAVE_RUNTIME)"
	$(call wave-environment,$(WAVE_RUNTIME),--no-deps wave-lang==$(WAVE_VERSION))
	@mkdir -p $(WAVE_RUNTIME)/hip
	@cc -shared -fPIC -O1 -Wall -Werror -o $(WAVE_RUNTIME)/hip/libamdhip64.so $(WAVE_TESTS)/hip.c
	@touch $@

test-wave-runtime: $(WAVE_RUNTIME)/.ready
	LD_LIBRARY_PATH=$(WAVE_RUNTIME)/hip $(WAVE_RUNTIME)/bin/python -m pytest $(WAVE_TESTS)

# 400 MB with IREE's compiler
$(WAVE_ENV)/.ready: $(VENV)/.plugins
	@echo "setup: wave-lang $(WAVE_VERSION) and its compiler in $(WAVE_ENV)"
	$(call wave-environment,$(WAVE_ENV),wave-lang==$(WAVE_VERSION))
	@touch $@

# Eight minutes of one core; needs llvm-objdump of LLVM 17 or newer for the listings.
wave-compile: $(WAVE_ENV)/.ready
	$(WAVE_ENV)/bin/python plugins/attn-wave/tools/ship_kernels.py gfx942
	$(WAVE_ENV)/bin/python plugins/attn-wave/tools/ship_kernels.py --facts gfx950

# Another compiler's code: attn-triton's kernels as an MI300X would run them, in the emulator. Needs llvm-objdump too.
test-wave-triton: $(TRITON_ENV)/.ready
	$(TRITON_ENV)/bin/python -m pytest plugins/attn-wave/tests/triton_kernels

# The whole conformance kit over them, with evidence: about half an hour of one core.
verify-wave-triton: $(TRITON_ENV)/.ready
	cd plugins/attn-wave/tests && TRITON_CACHE_DIR=$(CURDIR)/$(TRITON_ENV)/cache $(CURDIR)/$(TRITON_ENV)/bin/python \
		-m triton_kernels.verify --evidence $(CURDIR)/evidence
