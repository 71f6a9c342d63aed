"""Build hook of attn-core: the evidence of the conformance kit travels in the wheel, for installed tables to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EvidenceHook(BuildHookInterface):  # type: ignore[type-arg]
    """Takes ``evidence/`` from the workspace, or from the source distribution if that is what we build from."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build: adds the folder for whichever target is built. An editable install needs none."""
        if version == "editable":
            return
        here = Path(self.root)
        target = "evidence" if self.target_name == "sdist" else "attn_core/evidence"
        for folder in (here / "evidence", here.parent / "evidence"):
            if folder.is_dir():
                build_data["force_include"][str(folder)] = target
                return
