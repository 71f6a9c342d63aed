"""`attn completion`: a static script for a shell, made from the commands; it asks only for backend names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import click

from attn_core.cli import COMMANDS

_BACKENDS: Final = "$(attn list-backends --names 2>/dev/null)"


@dataclass(frozen=True, slots=True)
class Word:
    """An option or an argument: its flags (none for an argument), and what may stand as its value.

    ``values`` is a list of words, possibly with a command in it for the shell to run; None takes no value, "" any.
    """

    flags: tuple[str, ...]
    values: str | None
    files: bool
    help: str


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Write the completion script of SHELL to stdout.

    \b
    bash:  attn completion bash > ~/.local/share/bash-completion/completions/attn
    zsh:   attn completion zsh > ~/.zfunc/_attn       (a folder of your fpath)
    fish:  attn completion fish > ~/.config/fish/completions/attn.fish
    """
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]())


def words(name: str) -> list[Word]:
    """What can follow ``attn <name>``."""
    from attn_core.cli.group import attn

    command = attn.get_command(click.Context(attn), name)
    assert command is not None, f"{name} is in COMMANDS"
    return [*map(_word, command.params), Word(("--help",), None, False, "Show help and exit.")]


def _word(param: click.Parameter) -> Word:
    flags = tuple(flag for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-"))
    takes_value = not (isinstance(param, click.Option) and (param.is_flag or param.count))
    text = (param.help or "").split(". ")[0] if isinstance(param, click.Option) else ""
    return Word(flags, _values(param.type) if takes_value else None, isinstance(param.type, click.Path), text)


def _values(kind: click.ParamType[Any]) -> str:
    if isinstance(kind, click.Choice):
        return " ".join(map(str, kind.choices))
    if kind.name == "backend":
        return _BACKENDS
    if kind.name == "model":
        from attn_core.planning.presets import preset_names

        return " ".join(preset_names())
    return ""


def _after_option() -> Iterator[tuple[str, Word]]:
    """Every (command, option) whose value can be offered."""
    for name in COMMANDS:
        for word in words(name):
            if word.flags and word.values:
                yield name, word


def _bash() -> str:
    values = "\n".join(
        f'        "{name} {flag}") COMPREPLY=($(compgen -W "{word.values}" -- "$cur")); return ;;'
        for name, word in _after_option()
        for flag in word.flags
    )
    options = "\n".join(
        f'        {name}) words="{" ".join(flag for word in words(name) for flag in word.flags)}" ;;'
        for name in COMMANDS
    )
    arguments = "\n".join(
        f'        {name}) words="{word.values}" ;;'
        for name in COMMANDS
        for word in words(name)
        if not word.flags and word.values
    )
    return f"""# bash completion for attn
_attn() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" name="${{COMP_WORDS[1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(COMMANDS)} --help --version" -- "$cur"))
        return
    fi
    case "$name $prev" in
{values}
    esac
    if [[ "$cur" == -* ]]; then
        case "$name" in
{options}
        esac
    else
        case "$name" in
{arguments}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _attn attn"""


def _zsh() -> str:
    cases = "\n".join(f"        {name})\n            _arguments {_zsh_arguments(name)} ;;" for name in COMMANDS)
    commands = " ".join(_quoted(f"{name}:{text.replace(':', '')}") for name, text in COMMANDS.items())
    return f"""#compdef attn
_attn() {{
    if (( CURRENT == 2 )); then
        local -a names=({commands})
        _describe command names
        return
    fi
    local name=$words[2]
    shift words
    (( CURRENT-- ))
    case $name in
{cases}
    esac
}}
# Autoloaded from fpath, this file is the function's body at its first call; sourced, it only registers it.
if [[ "$funcstack[1]" == _attn ]]; then _attn "$@"; else compdef _attn attn; fi"""


def _zsh_arguments(name: str) -> str:
    specs = []
    for word in words(name):
        values = f'"({word.values})"' if word.values else "_files" if word.files else '" "'
        action = "" if word.values is None else f":value:{values}"
        if not word.flags:
            specs.append(f"'*'{action}" if word.values or word.files else "'*: : '")
        for flag in word.flags:
            specs.append(_quoted(f"{flag}[{word.help.replace('[', '(').replace(']', ')')}]") + action)
    return " ".join(specs)


def _fish() -> str:
    lines = ["# fish completion for attn", "complete -c attn -f -n __fish_use_subcommand -l help -l version"]
    for name, text in COMMANDS.items():
        lines.append(f"complete -c attn -f -n __fish_use_subcommand -a {name} -d {_quoted(text)}")
    for name in COMMANDS:
        seen = f"complete -c attn -n '__fish_seen_subcommand_from {name}'"
        for word in words(name):
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in word.flags)
            if not flags and not word.values:
                continue
            value = (
                "" if word.values is None else f' -x -a "{word.values.replace("$(", "(")}"' if word.values else " -r"
            )
            lines.append(
                " ".join(filter(None, (seen, flags, value.strip(), f"-d {_quoted(word.help)}" if word.help else "")))
            )
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "’") + "'"
