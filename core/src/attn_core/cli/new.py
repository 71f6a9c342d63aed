"""`attn new`: a plugin package that works, rendered from the template that ships with the core."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Final

import click

import attn_core
from attn_core.cli.output import note
from attn_core.errors import AttnError, UsageError

TEMPLATE: Final = Path(attn_core.__file__).parent / "template"


@click.command()
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write; a folder that is not there yet. [default: ./attn-NAME]",
)
def command(name: str, output: Path | None) -> None:
    """Write a plugin package for a backend called NAME: entry point, manifest, a backend that works, tests, CI."""
    folder = render(name, Path(f"attn-{name.replace('_', '-')}") if output is None else output)
    print(folder)
    note(f"next: cd {folder} && pip install -e '.[test]' && attn verify {name} --tier contract")


def render(name: str, folder: Path) -> Path:
    """Render the template for the backend ``name`` into ``folder`` and give the folder.

    Raises UsageError for a name that cannot be a backend's, one that an installed backend has, or a folder that has
    something in it; AttnError if copier is not installed.
    """
    _check_name(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", given=str(folder), accepted="a new folder", hint="--output DIR")
    try:
        import copier
    except ImportError as error:
        raise AttnError("attn new needs copier", hint="pip install 'attn-core[testing]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}",
            given=str(folder),
            accepted="a new folder",
            hint="--output DIR",
        ) from error
    from attn_core.cli.listing import core_version

    copier.run_copy(
        str(TEMPLATE), folder, data={"name": name, "core_version": core_version()}, defaults=True, quiet=True
    )
    return folder


def _check_name(name: str) -> None:
    if not name.isidentifier() or not name.isascii() or name != name.lower() or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be a backend's name", given=name, accepted="lower case letters, digits and underscores"
        )
    from attn_core.planning.discovery import discover

    taken = next((ref for ref in discover().backends if ref.name == name), None)
    if taken is not None:
        raise UsageError(f"{name!r} is the name of a backend of {taken.dist}", given=name, hint="choose another name")
