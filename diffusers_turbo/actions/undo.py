"""The undo model: a journal of small reversible changes to objects we do not own.

An action never assigns to a foreign object directly. It asks a `Journal` to, and the journal remembers what was there
before, absence included. Reverting runs backwards. Whatever the user replaced meanwhile is left alone and named.

Changes are plain data (targets and values, no closures), so that `copy.deepcopy` and `pickle` of a pipeline carry
its journals along, bound to the copied modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

LEDGER_ATTRIBUTE = "_turbo_ledger"
"""The one name this package sets on a pipeline (see `actions.ledger`)."""


class _Absent:
    """Marks an attribute that the object did not own; survives copying and pickling as itself."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


class Change(Protocol):
    """One reversible change."""

    def revert(self) -> str | None:
        """Put back what was there; return a sentence when something had to be left alone."""


class CallScope(Protocol):
    """Something in force during the pipeline's calls only."""

    def around_call(self, pipe: Any) -> AbstractContextManager[None]:
        """Return the context in which one call runs."""


def owned(target: object, name: str) -> Any:
    """Return what `target` itself holds under `name`, or `ABSENT` when it is inherited or missing."""
    holder = vars(target)
    for table in ("_parameters", "_buffers", "_modules"):
        if name in holder.get(table, ()):
            return holder[table][name]
    return holder.get(name, ABSENT)


def put(target: object, name: str, value: Any) -> None:
    """Set `name` on `target`, or delete it when `value` is `ABSENT`."""
    if value is not ABSENT:
        setattr(target, name, value)
    elif owned(target, name) is not ABSENT:
        delattr(target, name)


@dataclass
class AttributeChange:
    """An attribute that was set on an object; compared by identity, then by equality of plain values."""

    target: object
    name: str
    before: Any
    after: Any

    def revert(self) -> str | None:
        now = owned(self.target, self.name)
        if not same(now, self.after):
            if same(now, self.before):
                return None
            return f"{type(self.target).__name__}.{self.name} was set to {now!r} meanwhile"
        put(self.target, self.name, self.before)
        return None


def same(left: Any, right: Any) -> bool:
    """Whether two attribute values are one object, or equal plain numbers, strings or None."""
    plain = (bool, int, float, str, type(None))
    return left is right or (isinstance(left, plain) and type(left) is type(right) and bool(left == right))


@dataclass
class Journal:
    """The changes one action made, in order, with what its report says about them."""

    changes: list[Change] = field(default_factory=list)
    scopes: list[CallScope] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Set `target.name = value`, remembering what `target` itself held under that name."""
        before = owned(target, name)
        put(target, name, value)
        self.changes.append(AttributeChange(target, name, before, value))

    @contextmanager
    def watching(self, target: object, *names: str) -> Iterator[None]:
        """Record what a host method, called inside the block, does to the named attributes of `target`."""
        before = {name: owned(target, name) for name in names}
        try:
            yield
        finally:
            for name, old in before.items():
                new = owned(target, name)
                if not same(new, old):
                    self.changes.append(AttributeChange(target, name, old, new))

    def told(self) -> list[str]:
        """Return the notes, and what changes that go on working (captured graphs) say of themselves by now."""
        return [*self.notes, *(text for change in self.changes if hasattr(change, "tell") for text in change.tell())]

    def add(self, change: Change) -> None:
        """Remember a change that was just made."""
        self.changes.append(change)

    def note(self, sentence: str) -> None:
        """Add a sentence to what the report says of this action."""
        self.notes.append(sentence)

    def revert(self) -> list[str]:
        """Undo every change, last first, and return what was left alone.

        A change that raises does not keep the others from being undone; the first error is raised at the end.
        """
        left_alone: list[str] = []
        first_error: Exception | None = None
        while self.changes:
            try:
                sentence = self.changes.pop().revert()
            except Exception as error:
                first_error = first_error or error
            else:
                if sentence:
                    left_alone.append(sentence)
        self.scopes.clear()
        if first_error is not None:
            raise first_error
        return left_alone


@contextmanager
def journaling() -> Iterator[Journal]:
    """Give a fresh journal; when the block raises, everything it recorded is undone before the error goes on."""
    journal = Journal()
    try:
        yield journal
    except BaseException:
        journal.revert()
        raise
