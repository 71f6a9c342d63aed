# The real torch-npu, without a card: an environment of its own over .venv, and empty CANN libraries made by test code.
ASCEND_ENV   := .venvs/ascend
ASCEND_TESTS := plugins/attn-ascend/tests
ASCEND_STUBS := $(ASCEND_ENV)/cann-stubs
PLUGIN_TESTS += ascend-schema

.PHONY: ascend-schema ascend-schemas-json

# torch and everything else are .venv's: only the wheel of 44 MB is added, where nobody else imports it.
$(ASCEND_ENV)/.ready: $(VENV)/.plugins $(ASCEND_TESTS)/ascend_wheel/cann_stubs.py $(ASCEND_TESTS)/ascend_wheel/acl.c
	@echo "setup: torch-npu 2.13.0 in $(ASCEND_ENV)"
	@rm -rf $(ASCEND_ENV) && $(BIN)/python -m venv --without-pip $(ASCEND_ENV)
	@$(BIN)/python $(ASCEND_TESTS)/ascend_wheel/share_packages.py $(ASCEND_ENV)
	@$(PIP) --python $(ASCEND_ENV)/bin/python install --quiet --no-deps torch-npu==2.13.0
	@$(ASCEND_ENV)/bin/python $(ASCEND_TESTS)/ascend_wheel/cann_stubs.py $(ASCEND_STUBS)
	@touch $@

ASCEND_RUN = TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=$(ASCEND_TESTS)/ascend_wheel:$(ASCEND_TESTS)/ascend \
	LD_LIBRARY_PATH=$(ASCEND_STUBS)
ASCEND_PYTHON = $(ASCEND_ENV)/bin/python

# Once over empty libraries: every test again, on the wheel's schemas and Meta kernels. Once over a fake card: eager steps,
# graphs, the kit and whole models on it.
ascend-schema: $(ASCEND_ENV)/.ready
	$(ASCEND_RUN)/empty $(ASCEND_PYTHON) -m pytest $(ASCEND_TESTS) -k "not planted_fault" \
		--ignore-glob '*/test_fake_card*'
	TASK_QUEUE_ENABLE=0 $(ASCEND_RUN)/device $(ASCEND_PYTHON) -m pytest $(ASCEND_TESTS)/ascend_wheel/test_fake_card*.py

ascend-schemas-json: $(ASCEND_ENV)/.ready
	$(ASCEND_RUN)/empty $(ASCEND_PYTHON) plugins/attn-ascend/tools/vendor_schemas.py
