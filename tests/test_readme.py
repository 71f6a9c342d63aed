"""The README's example runs as it stands, and the documents that are made are up to date."""

from __future__ import annotations

import re
import sys

from .conftest import ROOT, run


def test_the_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    assert run(sys.executable, "-c", example + "\nprint(tuple(out.shape))").splitlines()[-1] == "(5, 9, 64)"


def test_the_engines_example_runs_as_it_stands() -> None:
    printed = run(sys.executable, str(ROOT / "docs" / "engine_step.py")).splitlines()[-1]
    assert printed == "torch.Size([40, 9, 64]) torch.Size([1, 9, 64])"
    example = (ROOT / "docs" / "engine_step.py").read_text().partition("\n\n")[2].strip()
    assert example in (ROOT / "docs" / "reference" / "engine.md").read_text()


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"
