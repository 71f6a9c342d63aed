"""The group `attn` in click: its subcommands are imported when they are called, and listed without being imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from attn_core.cli import COMMANDS, INTERRUPTED
from attn_core.errors import nearest


class LazyGroup(click.Group):
    """Knows its commands by COMMANDS, so that neither ``--help`` nor a typing error imports them all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module: Any = importlib.import_module(f"attn_core.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = nearest(args[0], COMMANDS)
            raise click.UsageError(
                f"no command {args[0]!r}. " + (f"Did you mean {near!r}?" if near else "attn --help lists them."), ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def run(args: list[str]) -> int:
    """Run the command line ``args`` through click and give the exit code. Raises AttnError as the subcommand does."""
    warnings.showwarning = _show_warning
    try:
        # Not through click's main(), which makes an exit of 1, a failed check, of a closed pipe.
        with attn.make_context("attn", args) as context:
            outcome = attn.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's own ^C
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return outcome if isinstance(outcome, int) else 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Our own warnings are one line of prose for the user; others keep the place they come from."""
    ours = category.__module__.startswith("attn_core.")
    print(f"attn: {message}" if ours else warnings.formatwarning(message, category, filename, lineno), file=sys.stderr)


def _show_version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    if asked:
        from attn_core.cli.listing import core_version

        print(f"attn {core_version()}")
        ctx.exit()


attn = LazyGroup(
    name="attn",
    help="The plugin layer for attention kernels in LLM serving: correct, or refused.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 a check failed, 2 usage, 3 nothing fits, 4 broken or ambiguous, 5 protocol,"
    " 74 cannot read or write.",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_show_version,
            help="Show the version and exit.",
        )
    ],
)
