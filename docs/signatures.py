"""How functions and classes look in the reference: their signatures as they are written, and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any


def functions(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions of a class, in the order of the source."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(function) and not name.startswith("_"):
            yield name, function


def to_write(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """What there is to write: a function with its ``self``."""
    required = " (required)" if getattr(function, "__isabstractmethod__", False) else ""
    yield f"### `{name}`{required}\n"
    yield f"```python\n{name}{_signature(inspect.signature(function))}\n```\n"
    yield f"{inspect.cleandoc(function.__doc__ or '')}\n"


def to_call(name: str, function: Any, level: str = "##") -> Iterator[str]:
    """What there is to call: a function without ``self`` and ``cls``."""
    signature = inspect.signature(function)
    given = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    yield f"{level} `{name}`\n"
    yield f"```python\n{name}{_signature(signature.replace(parameters=given))}\n```\n"
    yield f"{inspect.cleandoc(function.__doc__ or '')}\n"


def to_make(cls: Any) -> Iterator[str]:
    """A class, how it is made, and what there is to call of it."""
    yield f"## {cls.__name__}\n"
    yield f"{inspect.cleandoc(cls.__doc__ or '')}\n"
    if not dataclasses.is_dataclass(cls):
        yield f"```python\n{cls.__name__}{_signature(inspect.signature(cls))}\n```\n"
        yield f"{inspect.cleandoc(vars(cls)['__init__'].__doc__ or '')}\n"
    for name, function in functions(cls):
        yield from to_call(name, function, "###")


class _Bare(str):
    """A postponed annotation, shown as it is written."""

    __slots__ = ()
    __repr__ = str.__str__


def _signature(signature: inspect.Signature) -> str:
    """The signature as it is written, one line if it fits."""
    parameters = [each.replace(annotation=_bare(each.annotation)) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation)))
    if len(text) <= 100:
        return text
    inside, _, result = text[1:].rpartition(")")
    return "(\n" + textwrap.indent(",\n".join(_split_arguments(inside)), "    ") + ",\n)" + result


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _split_arguments(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and not depth:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()
