"""Names of options: older ones work, and any other is an error that says which is near.

@dataclass
class MyConfig(metaclass=OptionNames):
    ALIASES: ClassVar[dict[str, str]] = {"max_seq_length": "max_length", "infinite": ""}
    max_length: int = 1024

MyConfig(max_seq_length=8)       MyConfig(max_length=8)
MyConfig(max_lenght=8)           ConfigError: MyConfig has no option 'max_lenght'. Did you mean 'max_length'?
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl.compat import asks_for_nothing, remedy
from trl.errors import ConfigError
from trl.option_types import settable

REFUSED: dict[str, tuple[bool, str]] = {
    "group_by_length": (True, "this is train_sampling_strategy='group_by_length' today"),
    "save_safetensors": (False, "weights are always saved as safetensors, so leave it out"),
    "use_flash_attention_2": (True, "this is attn_implementation='flash_attention_2' today"),
}
"""Older names that ask for nothing, the value of each that cannot be had, and what to do."""


def refuse_outdated(name: str, value: Any) -> None:
    """Raises ConfigError for an older option with a value that nothing does any more."""
    refused, reason = REFUSED.get(name, (None, ""))
    if refused is not None and value is refused:
        raise ConfigError(f"{name}={value}: {reason}.")


class OptionNames(type):
    """Checks the keywords of a configuration before its dataclass sees them.

    `ALIASES` of a class are older names and today's; an empty one is of what always happens now, or is no longer needed.
    """

    ALIASES: Mapping[str, str] = {}

    if not TYPE_CHECKING:  # type checkers read the fields, and know today's names alone

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **cls.translated(kwargs))

        @property
        def __signature__(cls) -> inspect.Signature:
            """The fields, for `inspect.signature` and interactive shells."""
            whole = inspect.signature(cls.__init__)
            return whole.replace(parameters=list(whole.parameters.values())[1:])

    def translated(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` under today's names. Raises ConfigError for a name that no field has."""
        fields = {field.name for field in settable(cls) if field.init}
        known: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for name, value in kwargs.items():
            refuse_outdated(name, value)
            today = name if name in fields else cls.ALIASES.get(name, name)
            if today and today not in fields:
                if asks_for_nothing(name, value):
                    continue
                raise ConfigError(f"{cls.__name__} has no option {name!r}.{remedy(name, [*fields, *cls.ALIASES])}")
            if today in spelled:
                both = f"{spelled[today]!r} and {name!r}"
                raise ConfigError(f"{cls.__name__} was given {both}, two names of the option {today!r}: keep one.")
            if today:
                known[today], spelled[today] = value, name
        return known
