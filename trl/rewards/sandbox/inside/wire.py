"""Remote calls between two Python interpreters that do not trust each other, as lines of JSON.

Plain values are sent as copies, all other objects as a number by which the side that owns them finds them. Reading a message
executes no code. Only the standard library is used, since this file runs inside a sandbox.
"""

import builtins
import functools
import json
import operator
import sys
from contextlib import suppress

COPIES = {tuple: "tuple", set: "set", frozenset: "frozenset"}
FROM_NAMES = {name: kind for kind, name in COPIES.items()}
FROM_TEXT = {"bytes": bytes.fromhex, "bytearray": bytearray.fromhex, "complex": lambda parts: complex(*parts)}
MUTABLE = (list, dict, set)
sys.set_int_max_str_digits(0)


class Wire:
    """One end of a connection: `ask` sends requests to the other side, and answers its requests while waiting.

    `serves` maps the names of operations to functions: the other side can request only these.
    """

    def __init__(self, reader, writer, serves):
        self.reader, self.writer, self.serves = reader, writer, serves
        self.owned = []

    def ask(self, operation, *arguments, **keywords):
        """The result of an operation on the other side; raises the exception that it raised."""
        self._send([operation, [self.encode(a) for a in arguments], {k: self.encode(v) for k, v in keywords.items()}])
        while True:
            message = self._receive()
            if message[0] == "result":
                for given, now in zip(arguments, message[2], strict=True):
                    renew(given, now, self.decode)
                return self.decode(message[1])
            if message[0] == "error":
                raise error_of(message[1], message[2])
            self._serve(message)

    def serve(self):
        """Answer requests of the other side until it closes the connection."""
        with suppress(EOFError):
            while True:
                self._serve(self._receive())

    def _serve(self, message):
        try:
            operation, arguments, keywords = message
            given = [self.decode(each) for each in arguments]
            result = self.serves[operation](*given, **{k: self.decode(v) for k, v in keywords.items()})
            after = [self.encode(each) if type(each) in MUTABLE else None for each in given]
            answer = ["result", self.encode(result), after]
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            answer = ["error", names, str(error)[:10_000]]
        self._send(answer)

    def _send(self, message):
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def _receive(self):
        line = self.reader.readline()
        if not line:
            raise EOFError("The other side is gone.")
        return json.loads(line)

    def encode(self, value):
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is list:
            return [self.encode(each) for each in value]
        if kind in COPIES:
            return {COPIES[kind]: [self.encode(each) for each in value]}
        if kind is dict:
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if kind in (bytes, bytearray):
            return {kind.__name__: value.hex()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind is Remote:
            return {"yours": value._number}
        self.owned.append(value)
        return {"mine": len(self.owned) - 1, "plain": self._plain(value)}

    def _plain(self, value):
        """A copy of an instance of a subclass (`Counter`, named tuple, `IntEnum`) as its built-in base type; None for others."""
        for kind in (int, float, str, tuple, list, dict, set, frozenset):
            if isinstance(value, kind):
                with suppress(Exception):
                    return [self.encode(kind(value))]
        return None

    def decode(self, value):
        if isinstance(value, list):
            return [self.decode(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "mine" in value:
            plain = value["plain"]
            return Remote(self, int(value["mine"]), plain and [self.decode(plain[0])])
        ((kind, content),) = value.items()
        if kind == "yours":
            return self.owned[content]
        if kind == "dict":
            return {self.decode(key): self.decode(each) for key, each in content}
        return FROM_NAMES[kind](map(self.decode, content)) if kind in FROM_NAMES else FROM_TEXT[kind](content)


def renew(given, now, decode):
    """Update a list, dict or set of this side with the content of the copy that the other side has changed."""
    if type(given) in MUTABLE and now is not None and type(given) is type(now := decode(now)) and given != now:
        given.clear()
        given.extend(now) if type(given) is list else given.update(now)


def error_of(names, message):
    """An exception for one of the other side, from the names of its class and base classes."""
    kind = kind_of(tuple(names))
    error = kind.__new__(kind)
    error.args = (message,)
    return error


@functools.cache
def kind_of(names):
    """The exception class for these names: a built-in class, or else one new class for each list of names."""
    known = getattr(builtins, names[0], None)
    if isinstance(known, type) and issubclass(known, Exception):
        return known
    return type(names[0], (kind_of(names[1:]) if len(names) > 1 else Exception,), {})


class Remote:
    """A proxy for an object of the other side, where all operations on it are executed.

    It equals a plain value only if the copy that was sent with it does, so that a class whose `__eq__` always returns True
    passes no test.
    """

    def __init__(self, wire, number, plain):
        object.__setattr__(self, "_wire", wire)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_copy", plain)

    def __call__(self, *arguments, **keywords):
        return self._wire.ask("call", self, *arguments, **keywords)

    def __getattr__(self, name):
        return self._wire.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._wire.ask("setattr", self, name, value)

    def __eq__(self, other):
        if type(other) is Remote:
            return bool(self._wire.ask("eq", self, other))
        return bool(self._copy) and self._copy[0] == other

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return self._wire.ask("hash", self)

    def __iter__(self):
        return self._wire.ask("iter", self)

    def __instancecheck__(self, value):
        return type(value) is Remote and bool(self._wire.ask("isinstance", value, self))

    def __enter__(self):
        return self._wire.ask("getattr", self, "__enter__")()

    def __exit__(self, kind, error, trace):
        return self._wire.ask("getattr", self, "__exit__")(None, None, None)


ON_ITEMS = ("getitem", "setitem", "delitem", "contains")
ON_BITS = ("and", "or", "xor", "lshift", "rshift")
ON_NUMBERS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", *ON_BITS)
ON_ORDER = ("lt", "le", "gt", "ge", "neg", "pos", "invert")
ON_ONE = {name: getattr(builtins, name) for name in ("len", "str", "repr", "bool", "int", "float", "next", "abs")}
OPERATIONS = {name: getattr(operator, f"__{name}__") for name in (*ON_ITEMS, *ON_NUMBERS, *ON_ORDER, "eq")} | ON_ONE


def _forwarded(name, *, swapped=False):
    def forwarded(self, *others):
        given = (*others, self) if swapped else (self, *others)
        return self._wire.ask(name, *given)

    return forwarded


for _name in (*ON_ITEMS, *ON_NUMBERS, *ON_ORDER, *ON_ONE):
    setattr(Remote, f"__{_name}__", _forwarded(_name))
for _name in ON_NUMBERS:
    setattr(Remote, f"__r{_name}__", _forwarded(_name, swapped=True))
