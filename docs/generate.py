"""Writes the documents that are made from the code: the reference, and the tutorial around the tested template.

`python docs/generate.py` writes them, `--check` exits with 1 where one is out of date.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attn_core
import click
from attn_core import errors
from attn_core.cli import COMMANDS
from attn_core.cli.group import attn
from attn_core.cli.matrix import workspace_distributions
from attn_core.cli.new import render
from attn_core.planning import config, manifest, reasons
from attn_core.planning.discovery import discover
from attn_core.planning.plan import PhasePlan
from attn_core.runtime import backend, batch, kv_cache, layer
from figures import FIGURES, ROWS, table, with_figures, with_rows
from signatures import functions, to_call, to_make, to_write

DOCS: Final = Path(__file__).parent
ROOT: Final = DOCS.parent
OUTPUT: Final = re.compile(r"(<!-- output of: (attn .*?) -->).*?(<!-- end of output -->)", re.DOTALL)
NOTICE: Final = "<!-- made from the code by docs/generate.py; do not edit -->\n"

#: What each key of a manifest says. A key that is not described here, or described and gone, stops the generator.
TOP_KEYS: Final = {
    "schema": "the version of this format; `1`",
    "name": "the backend's name, the same as the entry point's; an identifier",
    "protocol": 'bounds on the version of the contract, such as `">=1.0,<2"`: of the contract, not of a package',
    "summary": "one line for people",
    "requires": "table: what must be there to run it",
    "fallback": "table: for a phase that no clause has, the backends to ask instead, in order",
    "supports": "array of tables, the clauses: a request is accepted if one clause accepts all of it",
}
REQUIRES_KEYS: Final = {
    "dists": 'distributions with bounds, `"name>=1.0"`; `"a>=1 | b"` where one of several is enough',
    "host_lengths": "true if the backend reads `seq_lens_cpu` and `query_start_loc_cpu` of a batch",
}
CLAUSE_KEYS: Final = {
    "phases": "which of the phases",
    "device": "one device or a list",
    "arch": 'chips: `">=sm_80"`, `">=sm_80,<sm_100"`, `["gfx942", "gfx950"]`; absent: every chip',
    "kind": "`mha` or `mla`",
    "dtypes": "of queries and output",
    "kv_dtypes": 'of the cache; absent: `["auto"]`, the dtype of the queries',
    "head_dims": '`"any"`, or a list of `[qk, v]` pairs and of tables `{ min = 32, max = 256, multiple_of = 8 }`',
    "page_sizes": 'native page sizes: `"any"`, or a list of integers and of tables `{ multiple_of = 16 }`, '
    "`{ power_of_two = true }`; absent: no cache, `ragged` only",
    "kv_layouts": "layouts of the cache; needed with `page_sizes`, but for `mla`, which has one",
    "features": "of the closed set; absent: none",
    "max_group_size": "the most query heads for each KV head",
    "max_draft_tokens": "the most draft tokens of a verify step",
    "quantizes_query": "true if the kernel also quantises queries where the cache is fp8, which costs accuracy",
}


def manifest_page() -> Iterator[str]:
    """docs/reference/manifest.md"""
    yield "# The manifest\n"
    yield "`<name>.toml`, in the top-level package that the entry point names. An unknown key, feature or value is"
    yield "an error that suggests the nearest known one.\n"
    for title, known, described in (
        ("Top level", manifest._TOP_KEYS, TOP_KEYS),
        ("`[requires]`", manifest._REQUIRES_KEYS, REQUIRES_KEYS),
        ("`[[supports]]`: a clause", manifest._CLAUSE_KEYS, CLAUSE_KEYS),
    ):
        if set(known) != set(described):
            raise SystemExit(
                f"{title}: {set(known) ^ set(described)} is in the code or in docs/generate.py, not in both"
            )
        yield f"## {title}\n"
        yield from table(("key", "what it says"), [(f"`{key}`", described[key]) for key in known])
    yield "## Values\n"
    values = {
        "phases": config.PHASES,
        "device": manifest.DEVICES,
        "kind": manifest.KINDS,
        "dtypes": config.DTYPES,
        "kv_dtypes": config.KV_DTYPES,
        "kv_layouts": config.KV_LAYOUTS,
    }
    yield from table(
        ("key", "accepted"), [(f"`{key}`", ", ".join(f"`{v}`" for v in accepted)) for key, accepted in values.items()]
    )
    yield "## Features\n"
    yield "The closed set. Causal attention and grouped queries of any group size are not features: all have them.\n"
    yield from table(
        ("feature", "what a backend that has it does"), [(f"`{k}`", v) for k, v in config.FEATURES.items()]
    )


def reasons_page() -> Iterator[str]:
    """docs/reference/reasons.md"""
    yield "# Reason codes\n"
    yield "Why a backend was refused, as `attn explain` and `evaluate` give it; the root cause comes first: "
    yield f"{', '.join(f'*{name}*' for name in reasons.LAYERS)}.\n"
    yield from table(
        ("code", "layer", "what stands against the backend"),
        [(f"`{code}`", layer_, text) for code, (layer_, text) in reasons.CODES.items()],
    )


def errors_page() -> Iterator[str]:
    """docs/reference/errors.md"""
    yield "# Errors\n"
    yield "Every error that attn raises on purpose says what was given, what is accepted, and what to do next."
    yield "`code` is stable; the command `attn` exits with `exit`.\n"
    _, root, tree = (errors.__doc__ or "").partition("AttnError")
    yield f"```\n{root}{tree.rstrip()}\n```\n"
    classes = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.AttnError)]
    yield from table(("class", "code", "exit"), [(f"`{e.__name__}`", f"`{e.code}`", str(e.exit_code)) for e in classes])


def protocol_page() -> Iterator[str]:
    """docs/reference/protocol.md"""
    yield f"# The contract, version {manifest.PROTOCOL_VERSION}\n"
    yield "What a backend implements and what it is given. Import all of it from `attn_core`.\n"
    yield "## AttentionBackend\n"
    yield f"{inspect.cleandoc(backend.AttentionBackend.__doc__ or '')}\n"
    for name, function in functions(backend.AttentionBackend):
        yield from to_write(name, function)
    yield "## ForwardBatch\n"
    yield f"{inspect.cleandoc(batch.ForwardBatch.__doc__ or '')}\n"
    yield from table(("field", "type", "meaning"), list(_fields(batch.ForwardBatch)))
    yield "### Modes\n"
    yield from table(("mode", "new tokens"), list(_members(batch.ForwardMode)))
    for described in (batch.TreeMask, layer.AttentionLayer):
        yield f"## {described.__name__}\n"
        yield f"{inspect.cleandoc(described.__doc__ or '')}\n"
    yield from to_make(kv_cache.KVCache)
    for asked in (config.AttentionConfig, config.LayerKind):
        yield f"## {asked.__name__}\n"
        yield f"{inspect.cleandoc(asked.__doc__ or '')}\n"
        yield from table(("field", "type", "default"), list(_defaults(asked)))


def engine_page() -> Iterator[str]:
    """docs/reference/engine.md, around the example of docs/engine_step.py"""
    yield "# What an engine calls\n"
    yield "From a model's config to a step: `plan` says who runs what, `build` makes it, and what comes out of `build`"
    yield "speaks [the contract](protocol.md), whichever backends are behind it. Import all of it from `attn_core`.\n"
    _, _, step = (DOCS / "engine_step.py").read_text(encoding="utf-8").partition("\n\n")
    yield f"```python\n{step.strip()}\n```\n"
    yield "## Configs\n"
    yield "Fields and defaults: [AttentionConfig](protocol.md#attentionconfig), [LayerKind](protocol.md#layerkind).\n"
    for name in ("from_hf", "preset", "replace", "without_towers", "kind_of"):
        yield from to_call(f"AttentionConfig.{name}", getattr(config.AttentionConfig, name), "###")
    yield from to_call("plan", attn_core.plan)
    yield from to_call("build", attn_core.build)
    yield from to_call("settle", attn_core.settle)
    yield from to_make(attn_core.Plan)
    yield f"### `PhasePlan`\n\n{inspect.cleandoc(PhasePlan.__doc__ or '')}\n"
    yield "## Caches, layers, batches\n"
    yield "Pools and views of an engine's own: [KVCache](protocol.md#kvcache).\n"
    yield from to_call("AttentionLayer.of_kind", layer.AttentionLayer.of_kind, "###")
    for name in ("build", "check", "split"):
        yield from to_call(f"ForwardBatch.{name}", getattr(batch.ForwardBatch, name), "###")
    yield from to_call("TreeMask.from_parents", batch.TreeMask.from_parents, "###")
    yield from to_make(kv_cache.PageAllocator)
    yield from to_make(attn_core.GraphRunner)
    yield f"### `GraphShape`\n\n{inspect.cleandoc(attn_core.GraphShape.__doc__ or '')}\n"
    yield from to_call("merge_state", attn_core.merge_state)


def cli_page() -> Iterator[str]:
    """docs/reference/cli.md"""
    yield "# The command `attn`\n"
    yield "stdout is data, stderr is prose; a table when a person looks, plain columns when piped; `NO_COLOR` is"
    yield "honoured. Every JSON document has a `schema` and a `version`. Exit codes: 0 fine, 1 a check failed, 2 usage,"
    yield "3 nothing fits, 4 broken or ambiguous, 5 another protocol, 70 a bug (`ATTN_DEBUG=1` shows where),"
    yield "74 a file or a stream that cannot be read or written, 130 interrupted, 141 a closed pipe.\n"
    for name in COMMANDS:
        context = click.Context(attn, info_name="attn")
        command = attn.get_command(context, name)
        assert command is not None
        wide = click.Context(command, parent=context, info_name=name, max_content_width=100, terminal_width=100)
        text = command.get_help(wide)
        yield f"## attn {name}\n\n```\n{text}\n```\n"


def tutorial_page() -> Iterator[str]:
    """docs/backend-in-15-minutes.md: docs/tutorial.md with the files of the rendered template in it."""
    with tempfile.TemporaryDirectory() as folder:
        project = render("mine", Path(folder) / "attn-mine")
        text = (DOCS / "tutorial.in.md").read_text(encoding="utf-8")
        for path in sorted(p for p in project.rglob("*") if p.is_file()):
            name = path.relative_to(project).as_posix()
            language = {".py": "python", ".toml": "toml", ".yml": "yaml"}.get(path.suffix, "")
            text = text.replace(
                f"{{{{{name}}}}}", f"```{language}\n# {name}\n{path.read_text(encoding='utf-8').rstrip()}\n```"
            )
    if "{{" in text:
        raise SystemExit(f"tutorial.in.md names a file that the template has not: {text[text.index('{{') :][:60]}")
    yield text


PAGES: Final[dict[str, Callable[[], Iterator[str]]]] = {
    "reference/manifest.md": manifest_page,
    "reference/reasons.md": reasons_page,
    "reference/errors.md": errors_page,
    "reference/protocol.md": protocol_page,
    "reference/engine.md": engine_page,
    "reference/cli.md": cli_page,
    "backend-in-15-minutes.md": tutorial_page,
}


def _defaults(cls: Any) -> Iterator[tuple[str, str, str]]:
    """(name, type, default) of each field of a dataclass."""
    for each in dataclasses.fields(cls):
        made = each.default_factory is not dataclasses.MISSING
        default = "" if each.default is dataclasses.MISSING else f"`{each.default!r}`"
        yield f"`{each.name}`", f"`{each.type}`", "empty" if made else default


def _fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, the ``#:`` comment above it or at its end) of each annotated field, in the order of the source.

    A comment is about the fields that follow it without one of their own.
    """
    text = ""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = _comment(lines, node.lineno) or text
            yield f"`{node.target.id}`", f"`{ast.unparse(node.annotation)}`", text


def _members(cls: type) -> Iterator[tuple[str, str]]:
    """(name, the ``#:`` comment) of each member of an enumeration."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id[0] != "_":
            yield f"`{node.targets[0].id}`", _comment(lines, node.lineno)


def _comment(lines: list[str], number: int) -> str:
    own = lines[number - 1].partition("#:")[2].strip()
    if own:
        return own
    above: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#:"):
            break
        above.insert(0, line.strip()[2:].strip())
    return " ".join(above)


def with_outputs(text: str) -> str:
    """``text`` with what its commands print between ``<!-- output of: attn ... -->`` and ``<!-- end of output -->``."""
    return OUTPUT.sub(lambda found: f"{found[1]}\n\n```\n$ {found[2]}\n{_printed(found[2])}\n```\n\n{found[3]}", text)


def _printed(command: str) -> str:
    """What ``attn ...`` prints with the plugins of this workspace, on a machine without an accelerator."""
    name, *arguments = shlex.split(command)
    assert name == "attn", command
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ATTN_")}
    found = discover()
    installed = {ref.dist for ref in found.backends} | {problem.dist for problem in found.problems}
    here = installed & workspace_distributions()
    environment |= {
        "ATTN_FORCE_SYSTEM": "cpu",
        "ATTN_PLUGINS": ",".join(sorted(here)),
        "ATTN_CACHE_DIR": str(DOCS / "no-measured-times"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "attn_core", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _pages() -> Iterator[tuple[Path, str]]:
    """Every document that is made, or has something made in it, with the text that it should have."""
    for name, page in PAGES.items():
        yield DOCS / name, NOTICE + "\n".join(page()).rstrip() + "\n"
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if any(made.search(text) for made in (OUTPUT, FIGURES, ROWS)):
            yield path, with_rows(with_figures(with_outputs(text)))


def main() -> int:
    """Write every page, or with ``--check`` say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for path, text in _pages():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        name = path.relative_to(ROOT)
        if check:
            stale.append(str(name))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: written")
    if stale:
        print(f"out of date: {', '.join(stale)}; next: make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
