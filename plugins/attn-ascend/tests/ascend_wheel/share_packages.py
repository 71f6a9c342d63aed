"""Makes an empty environment see the packages of the one that runs this, editable installs among them."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def share_packages(environment: Path) -> Path:
    """Write the .pth file of ``environment`` that adds this interpreter's site-packages; returns the file."""
    own = sysconfig.get_path("purelib")
    target = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    pointer = target / "workspace.pth"
    pointer.write_text(f"import site; site.addsitedir({own!r})\n", encoding="utf-8")
    return pointer


if __name__ == "__main__":
    print(f"setup: packages shared by {share_packages(Path(sys.argv[1]))}")
