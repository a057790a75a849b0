"""Check option names: accept older aliases, and reject unknown names with a suggestion of the most similar one.

@dataclass
class MyConfig(Options):
    ALIASES: ClassVar[dict[str, str]] = {"max_seq_length": "max_length", "infinite": ""}
    max_length: int = 1024

MyConfig(max_seq_length=8)       the same as MyConfig(max_length=8)
MyConfig(max_lenght=8)           ConfigError: MyConfig has no option 'max_lenght'. Did you mean 'max_length'?
MyConfig().max_seq_length        the value of max_length; so does assigning to it set max_length
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl.compat.options import advice_on, asks_for_nothing, refuse_outdated, remedy, said_today
from trl.errors import ConfigError
from trl.option_bounds import check_share
from trl.option_types import settable


class OptionNames(type):
    """Metaclass of configurations that checks and translates keyword arguments before the dataclass gets them.

    `ALIASES` maps older names to current ones; "" marks an older option that is accepted and ignored, because it is always on
    or no longer needed.
    """

    ALIASES: Mapping[str, str] = {}

    if not TYPE_CHECKING:  # type checkers only see the fields, under their current names

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **cls.translated(kwargs))

        @property
        def __signature__(cls) -> inspect.Signature:
            """Signature of the dataclass, for `inspect.signature` and interactive shells."""
            whole = inspect.signature(cls.__init__)
            return whole.replace(parameters=list(whole.parameters.values())[1:])

    def translated(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Rename `kwargs` to the current names. Raises ConfigError for unknown names, and for two names of the same option.

        A subclass whose `__init__` takes any keyword decides about unknown names itself.
        """
        parameters = inspect.signature(cls.__init__).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        fields = {field.name for field in settable(cls) if field.init} | parameters.keys()
        known: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for name, value in kwargs.items():
            today, value = (name, value) if name in fields else cls.today(name, value)
            if today and today not in fields and not takes_any:
                if asks_for_nothing(name, value):
                    continue
                older = [alias for alias, today in cls.ALIASES.items() if today in fields]
                raise ConfigError(f"{cls.__name__} has no option {name!r}.{remedy(name, [*fields, *older])}")
            if today in spelled:
                both = f"{spelled[today]!r} and {name!r}"
                raise ConfigError(f"{cls.__name__} was given {both}, two names of the option {today!r}: keep one.")
            if today:
                known[today], spelled[today] = value, name
        return known

    def today(cls, name: str, value: Any) -> tuple[str, Any]:
        """The current name and value of an option of another release; "" for one without effect. Raises ConfigError for refused values."""
        refuse_outdated(name, value)
        check_share(name, value)
        return said_today(name, value) or (cls.ALIASES.get(name, name), value)


class Options(metaclass=OptionNames):
    """Base class of configurations, whose options can be read and set under their older names, too."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The value of the option that `name` is an older name of."""
            cls = type(self)
            if hasattr(cls, name):
                return object.__getattribute__(self, name)  # a property: raises the AttributeError from inside it
            if today := cls.ALIASES.get(name):
                return getattr(self, today)
            if name in cls.ALIASES:
                raise AttributeError(f"{cls.__name__}.{name} has no value: the option has no effect in this release.")
            raise AttributeError(f"{cls.__name__} has no option {name!r}.{advice_on(name)}")

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an option by its current or an older name. Raises ConfigError for removed options that change a run."""
            cls = type(self)
            if hasattr(cls, name) or name in cls.__dataclass_fields__:
                super().__setattr__(name, value)
            else:
                today, value = cls.today(name, value)
                super().__setattr__(today or name, value)
