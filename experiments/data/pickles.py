"""Pickles read as data: a program of which only the part is run that makes values.

A pickle tells its reader to import things, to call them and to set their attributes.
This reader makes numbers, texts, lists, tuples and mappings by itself; what a pickle
imports is looked up in a vocabulary, whose words are plain functions and names of ours.
Everything else is refused, and so is what would fill the memory: Python's own reader
reserves as much as a file says that is to come, and here no more is held than came.
"""

from __future__ import annotations

import codecs
import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

_BLOCK = 1 << 20  # bytes asked for at once
# How many bytes may be made of each that was read, such as the pointers of an array of
# objects: 8 for None, which is one byte. Without it a few bytes could ask for copies of
# one long text again and again.
_MADE = 16


class Source:
    """Where the bytes of a pickle come from.

    Attributes:
      taken: bytes that were read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.taken = 0
        self._made = 0

    def take(self, count: int) -> bytes:
        """The next bytes, exactly so many.

        Memory grows with what comes, not with what a file says that is to come.
        """
        parts, left = [], count
        while left > 0:
            part = self._file.read(min(left, _BLOCK))
            if not part:
                raise ValueError(f"it ends where {count} bytes are to come.")
            parts.append(part)
            left -= len(part)
        if count < 0:
            raise ValueError(f"it has a length of {count} bytes.")
        self.taken += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def line(self) -> bytes:
        """The next line, without its end."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ValueError("it ends within a line.")
        self.taken += len(line)
        return line[:-1]

    def spend(self, count: int) -> None:
        """Accounts for bytes that are made of others.

        Raises:
          ValueError: if more is made than a file of what was read can be about.
        """
        self._made += count
        if self._made > _MADE * self.taken:
            raise ValueError("it asks for much more memory than it has data.")


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A word that stands for itself, such as a type that is only named."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    """A word that a pickle may call."""

    call: Callable[..., Any]


class Unfinished:
    """What a pickle makes in two steps; at first it may only wait for the second.

    A pickle names an object before it tells the object's state. The value is made of
    the state, and takes this one's place; before that it cannot be part of anything.
    """

    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys: list[int] = []  # by which the pickle remembers it

    def finish(self, state: Any) -> Any:
        """The value of a state."""
        raise NotImplementedError


def read(
    source: Source,
    vocabulary: Mapping[str, Name | Function],
    *,
    refusal: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The next pickle of a source, of protocol 0 to 5. Nothing of it is run.

    Args:
      source: which may have more than the pickle.
      vocabulary: what the globals that it may ask for stand for, by "module.name".
      refusal: says why any other is refused, after "its pickle asks for module.name, ".
      persistent: makes what a persistent id stands for; None if none is allowed.

    Returns:
      What it holds. Texts of Python 2 are decoded as Latin-1.

    Raises:
      ValueError: if the pickle is damaged, asks for a word that is not in the
        vocabulary, or does anything that data does not need.

    Example:
      >>> import io, pickle
      >>> source = Source(io.BytesIO(pickle.dumps({"epoch": (1, 2.5)})))
      >>> read(source, {}, refusal="which is not read.")
      {'epoch': (1, 2.5)}
    """
    machine = _Machine(source, vocabulary, refusal, persistent)
    try:
        return machine.run()
    except RefusedError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a damaged one leads to anything
        raise ValueError(f"its pickle is broken or truncated: {error}") from error


class RefusedError(ValueError):
    """A pickle asks for what is not allowed; no damage need be the cause."""


def ordered(source: Source) -> Function:
    """A word that stands for ``collections.OrderedDict``: a plain dictionary."""

    def call(pairs: Any = ()) -> dict[Any, Any]:
        source.spend(8 * len(pairs))
        found = {}
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise ValueError("a mapping is made of what is no pair.")
            found[_key(pair[0])] = _whole(pair[1])
        return found

    return Function(call)


def shown(value: Any) -> str:
    """A short text of any value: a pickle can make some whose repr fills the memory."""
    if isinstance(value, (str, bytes)):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int) and value.bit_length() < 200:
        return repr(value)
    if isinstance(value, Name):
        return value.name
    if isinstance(value, (list, tuple)) and len(value) < 8:
        plain = (str, bytes, int, float, bool, type(None), Name)
        if all(isinstance(part, plain) for part in value):
            return f"{type(value).__name__}({', '.join(map(shown, value))})"
    return f"a {type(value).__name__}"


def _whole(value: Any) -> Any:
    if isinstance(value, Unfinished):
        raise ValueError("it uses an object before it tells its state.")
    return value


def _key(value: Any) -> Any:
    """A key of a mapping, of those whose hashes are quick and not made to collide."""
    if isinstance(value, (str, bytes, bool, float, type(None))) or (
        isinstance(value, int) and value.bit_length() < 61
    ):
        return value
    raise ValueError(f"a key of a mapping is {shown(value)}.")


class _Machine:
    """Runs one pickle: a stack, marks on it, and a memo of what was made."""

    def __init__(
        self,
        source: Source,
        vocabulary: Mapping[str, Name | Function],
        refusal: str,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        # A dictionary, since a pickle may number what it remembers as it likes.
        self.memo: dict[int, Any] = {}
        self._vocabulary = vocabulary
        self._refusal = refusal
        self._persistent = persistent

    def run(self) -> Any:
        """What the pickle leaves on the stack."""
        while True:
            code = self.source.take(1)
            if code == b".":
                return _whole(self.stack.pop())
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise RefusedError(
                    f"its pickle has the opcode {code!r}, which no data needs."
                )
            operation(self)

    def number(self, layout: str) -> int:
        """A number of the pickle's own, such as a length."""
        (found,) = struct.unpack(layout, self.source.take(struct.calcsize(layout)))
        return int(found)

    def sized(self, layout: str) -> bytes:
        """Bytes behind their length."""
        return self.source.take(self.number(layout))

    def to_mark(self) -> list[Any]:
        """What is above the last mark, which is taken away."""
        found, self.stack = self.stack, self.marked.pop()
        return found

    def remember(self, key: int) -> None:
        """Puts the top of the stack into the memo."""
        top = self.stack[-1]
        if isinstance(top, Unfinished):
            top.keys.append(key)
        self.memo[key] = top

    def word(self, module: Any, name: Any) -> None:
        """Pushes what a global stands for."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global's name is no text.")
        found = self._vocabulary.get(f"{module}.{name}")
        if found is None:
            asked = shown(f"{module}.{name}")[1:].replace("'", "")
            raise RefusedError(f"its pickle asks for {asked}, {self._refusal}")
        self.stack.append(found)

    def call(self) -> None:
        """Replaces a function and its arguments by the result."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls {shown(function)}.")
        self.stack.append(function.call(*arguments))

    def build(self) -> None:
        """Gives the object below a state that state."""
        state, top = self.stack.pop(), self.stack[-1]
        if isinstance(top, Unfinished):
            value = top.finish(state)
            self.stack[-1] = value
            for key in top.keys:
                if self.memo.get(key) is top:
                    self.memo[key] = value
        elif type(top) is not dict or type(state) is not dict:
            # Attributes of a mapping are left out; nothing else has any.
            raise ValueError(f"it gives a state to {shown(top)}.")

    def append(self, values: list[Any]) -> None:
        """Appends to the list on top."""
        top = self.stack[-1]
        if type(top) is not list:
            raise ValueError(f"it appends to {shown(top)}.")
        top.extend(map(_whole, values))

    def insert(self, values: list[Any]) -> None:
        """Inserts keys and values, in turn, into the mapping on top."""
        top = self.stack[-1]
        if type(top) is not dict or len(values) % 2:
            raise ValueError(f"it inserts {len(values)} keys and values.")
        for key, value in zip(values[::2], values[1::2], strict=True):
            top[_key(key)] = _whole(value)

    def group(self, values: list[Any]) -> None:
        """Pushes a tuple."""
        self.stack.append(tuple(map(_whole, values)))

    def last(self, count: int) -> list[Any]:
        """Takes values from the top."""
        if len(self.stack) < count:
            raise ValueError("it takes a value that is not there.")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def mark(self) -> None:
        """Marks the stack."""
        self.marked.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        """Drops the top, or the mark if that is on top."""
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.marked.pop()

    def drop(self) -> None:
        """Drops what is above the mark."""
        self.to_mark()

    def frame(self) -> None:
        """Skips how many bytes come; they are read one by one."""
        self.number("<Q")

    def dictionary(self) -> None:
        """Pushes a mapping of what is above the mark."""
        values = self.to_mark()
        self.stack.append({})
        self.insert(values)

    def sequence(self) -> None:
        """Pushes a list of what is above the mark."""
        values = self.to_mark()
        self.stack.append([])
        self.append(values)

    def of_identity(self) -> None:
        """Replaces a persistent id by what it stands for."""
        if self._persistent is None:
            raise RefusedError("its pickle has a persistent id, which no array needs.")
        self.stack.append(self._persistent(_whole(self.stack.pop())))

    def protocol(self) -> None:
        """Checks the protocol."""
        if (version := self.number("<B")) > 5:
            raise ValueError(f"it is of protocol {version}, and 0 to 5 are known.")


def _whole_number(line: bytes) -> int | bool:
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def _quoted(line: bytes) -> str:
    """A text of Python 2 between quotes, with escapes."""
    line = line.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a text is not between quotes.")
    content, _ = codecs.escape_decode(line[1:-1])
    return content.decode("latin1")


def _long(content: bytes) -> int:
    return int.from_bytes(content, "little", signed=True)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _pushes(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


# Opcode to what it does; the names are those of ``pickle``.
_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,  # PROTO
    b"\x95": _Machine.frame,  # FRAME
    # Numbers.
    b"N": _pushes(lambda m: None),  # NONE
    b"\x88": _pushes(lambda m: True),  # NEWTRUE
    b"\x89": _pushes(lambda m: False),  # NEWFALSE
    b"I": _pushes(lambda m: _whole_number(m.source.line())),  # INT
    b"L": _pushes(lambda m: int(m.source.line().removesuffix(b"L"))),  # LONG
    b"J": _pushes(lambda m: m.number("<i")),  # BININT
    b"K": _pushes(lambda m: m.number("<B")),  # BININT1
    b"M": _pushes(lambda m: m.number("<H")),  # BININT2
    b"\x8a": _pushes(lambda m: _long(m.sized("<B"))),  # LONG1
    b"\x8b": _pushes(lambda m: _long(m.sized("<i"))),  # LONG4
    b"F": _pushes(lambda m: float(m.source.line())),  # FLOAT
    b"G": _pushes(lambda m: struct.unpack(">d", m.source.take(8))[0]),  # BINFLOAT
    # Texts and bytes.
    b"S": _pushes(lambda m: _quoted(m.source.line())),  # STRING
    b"T": _pushes(lambda m: m.sized("<i").decode("latin1")),  # BINSTRING
    b"U": _pushes(lambda m: m.sized("<B").decode("latin1")),  # SHORT_BINSTRING
    b"V": _pushes(lambda m: m.source.line().decode("raw-unicode-escape")),  # UNICODE
    b"X": _pushes(lambda m: _text(m.sized("<I"))),  # BINUNICODE
    b"\x8c": _pushes(lambda m: _text(m.sized("<B"))),  # SHORT_BINUNICODE
    b"\x8d": _pushes(lambda m: _text(m.sized("<Q"))),  # BINUNICODE8
    b"B": _pushes(lambda m: m.sized("<I")),  # BINBYTES
    b"C": _pushes(lambda m: m.sized("<B")),  # SHORT_BINBYTES
    b"\x8e": _pushes(lambda m: m.sized("<Q")),  # BINBYTES8
    b"\x96": _pushes(lambda m: m.sized("<Q")),  # BYTEARRAY8
    # Containers.
    b"(": _Machine.mark,  # MARK
    b")": lambda m: m.group([]),  # EMPTY_TUPLE
    b"\x85": lambda m: m.group(m.last(1)),  # TUPLE1
    b"\x86": lambda m: m.group(m.last(2)),  # TUPLE2
    b"\x87": lambda m: m.group(m.last(3)),  # TUPLE3
    b"t": lambda m: m.group(m.to_mark()),  # TUPLE
    b"]": _pushes(lambda m: []),  # EMPTY_LIST
    b"l": _Machine.sequence,  # LIST
    b"a": lambda m: m.append(m.last(1)),  # APPEND
    b"e": lambda m: m.append(m.to_mark()),  # APPENDS
    b"}": _pushes(lambda m: {}),  # EMPTY_DICT
    b"d": _Machine.dictionary,  # DICT
    b"s": lambda m: m.insert(m.last(2)),  # SETITEM
    b"u": lambda m: m.insert(m.to_mark()),  # SETITEMS
    # The stack and the memo.
    b"0": _Machine.pop,  # POP
    b"1": _Machine.drop,  # POP_MARK
    b"2": _pushes(lambda m: m.stack[-1]),  # DUP
    b"g": _pushes(lambda m: m.memo[int(m.source.line())]),  # GET
    b"h": _pushes(lambda m: m.memo[m.number("<B")]),  # BINGET
    b"j": _pushes(lambda m: m.memo[m.number("<I")]),  # LONG_BINGET
    b"p": lambda m: m.remember(int(m.source.line())),  # PUT
    b"q": lambda m: m.remember(m.number("<B")),  # BINPUT
    b"r": lambda m: m.remember(m.number("<I")),  # LONG_BINPUT
    b"\x94": lambda m: m.remember(len(m.memo)),  # MEMOIZE
    # Words.
    b"c": lambda m: m.word(
        m.source.line().decode(), m.source.line().decode()
    ),  # GLOBAL
    b"\x93": lambda m: m.word(*m.last(2)),  # STACK_GLOBAL
    b"R": _Machine.call,  # REDUCE
    b"b": _Machine.build,  # BUILD
    b"Q": _Machine.of_identity,  # BINPERSID
}
