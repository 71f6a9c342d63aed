"""Every error that attn raises on purpose.

AttnError
├── UsageError                    exit 2: what was asked is malformed
│   ├── ConfigError               an AttentionConfig, a layer or an option with an impossible value
│   ├── UnknownModelError         neither a preset, nor a config.json, nor a model folder
│   ├── UnknownBackendError       no installed backend has that name
│   └── ModelFolderError          the folder or file is there, but cannot be read as a model
├── BatchError                    exit 2: a ForwardBatch that breaks the contract
├── CapacityError                 exit 3: does not fit
│   ├── CacheFullError            the page pool cannot hold it
│   └── RequestTooLongError       longer than the model's context
├── PlanError                     exit 3: nothing fits
│   ├── NoBackendError            no candidate takes this phase
│   ├── BackendRefusedError       the backend the user named cannot do it
│   └── NoCommonCacheError        each phase has candidates, but none share a page size and a KV layout
├── PluginError                   exit 4: something installed is broken
│   ├── ManifestError             a manifest that is missing, malformed or of a newer schema
│   ├── AmbiguousBackendError     two distributions claim one name
│   ├── PluginLoadError           importing or constructing a backend failed
│   ├── FallbackCycleError        manifests whose [fallback] lists form a circle
│   └── KernelError               the kernel library raised; the cause is kept
├── ProtocolError                 exit 5: built for another version of the contract
└── CheckFailedError              exit 1: a check or a conformance case failed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class AttnError(Exception):
    """An error that says what was given, what is accepted and what to do next.

    ``code`` is stable and meant for tests and tools; ``exit_code`` is what the command ``attn`` returns for it.
    """

    code: ClassVar[str] = "attn_error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        given: Any = None,
        accepted: str | Iterable[Any] | None = None,
        hint: str | None = None,
        trace: Iterable[str] = (),
    ) -> None:
        self.message = message
        self.given = given
        self.accepted = accepted if accepted is None or isinstance(accepted, str) else ", ".join(map(str, accepted))
        self.hint = hint
        self.trace = tuple(trace)
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.message]
        if self.accepted is not None:
            lines.append(f"accepted: {self.accepted}")
        lines.extend(self.trace)
        if self.hint is not None:
            lines.append(f"next: {self.hint}")
        return "\n".join(lines)


class UsageError(AttnError):
    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    code = "bad_config"


class UnknownModelError(UsageError):
    code = "unknown_model"


class UnknownBackendError(UsageError):
    code = "unknown_backend"


class ModelFolderError(UsageError):
    code = "bad_model_folder"


class BatchError(AttnError):
    code = "bad_batch"
    exit_code = 2


class CapacityError(AttnError):
    code = "capacity"
    exit_code = 3


class CacheFullError(CapacityError):
    code = "cache_full"


class RequestTooLongError(CapacityError):
    code = "request_too_long"


class PlanError(AttnError):
    code = "no_plan"
    exit_code = 3


class NoBackendError(PlanError):
    code = "no_backend"


class BackendRefusedError(PlanError):
    code = "backend_refused"


class NoCommonCacheError(PlanError):
    code = "no_common_cache"


class PluginError(AttnError):
    code = "broken_plugin"
    exit_code = 4


class ManifestError(PluginError):
    code = "bad_manifest"


class AmbiguousBackendError(PluginError):
    code = "ambiguous_backend"


class PluginLoadError(PluginError):
    code = "plugin_load_failed"


class FallbackCycleError(PluginError):
    code = "fallback_cycle"


class KernelError(PluginError):
    code = "kernel_failed"


class ProtocolError(AttnError):
    code = "protocol_mismatch"
    exit_code = 5


class CheckFailedError(AttnError):
    code = "check_failed"
    exit_code = 1


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name that ``given`` was probably meant to be, or None."""
    matches = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
