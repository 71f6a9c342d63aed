"""Reading a Hugging Face config: values with the library's defaults, each checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fields:
    """A config of one model type; a key that is missing has its default of the transformers library."""

    data: Mapping[str, Any]
    defaults: Mapping[str, Any]
    model_type: str

    def get(self, key: str) -> Any:
        """The value or its default, None if there is neither."""
        return self.data[key] if key in self.data else self.defaults.get(key)

    def integer(self, key: str) -> int:
        """A positive integer. Raises ConfigError for anything else."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.model_type}: {key} is {value!r}", given=value, accepted="an integer from 1")
        return value

    def maybe_integer(self, key: str) -> int | None:
        """A positive integer, or None."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str) -> float | None:
        """A number, or None."""
        value = self.get(key)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ConfigError(f"{self.model_type}: {key} is {value!r}", given=value, accepted="a number")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0."""
        value = self.get(key)
        if not isinstance(value, Sequence) or not all(isinstance(n, int) and n >= 0 for n in value):
            raise ConfigError(f"{self.model_type}: {key} is {value!r}", given=value, accepted="a list of layer indices")
        return tuple(value)

    def part(
        self, key: str, defaults: Mapping[str, Any], model_type: str, absent: Mapping[str, Any] | None = None
    ) -> Fields:
        """A nested config; ``absent`` is what stands for one that is not there at all.

        Raises ConfigError if it is there and no mapping, or of another model type.
        """
        value = self.data.get(key) or absent or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.model_type}: {key} is {value!r}", given=value, accepted="a nested config")
        given = value.get("model_type", model_type)
        if given != model_type:
            raise ConfigError(f"{self.model_type}: {key} is of type {given!r}", given=given, accepted=model_type)
        return Fields(value, defaults, model_type)

    def refuse(self, key: str, problem: str) -> ConfigError:
        """The error for a key that asks for attention which the contract does not define."""
        return ConfigError(f"{self.model_type}: {key} is {self.get(key)!r}: {problem}", given=self.get(key))
