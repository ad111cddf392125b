"""What every option is: a frozen value that names its method and its concern, and checks itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..errors import InvalidOptionError, explain_failure


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one action was asked to do. Subclasses add fields and check them in `__post_init__`."""

    action: ClassVar[str]
    slot: ClassVar[str]
    exact: ClassVar[bool] = True
    lossy_reason: ClassVar[str | None] = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, in the order of the method's arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _refuse(self, name: str, needed: str, do: str) -> InvalidOptionError:
        tried = f"{self.action}({name}={getattr(self, name)!r})"
        return InvalidOptionError(explain_failure(tried, f"{name} = {getattr(self, name)!r}", needed, do))

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        if getattr(self, name) not in choices:
            raise self._refuse(name, f"one of {', '.join(map(repr, choices))}", f"choose one of these for {name}")

    def _check_positive(self, name: str, *, multiple_of: int = 1) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not is_int(value) or value <= 0 or value % multiple_of:
            kind = "a positive integer" if multiple_of == 1 else f"a positive multiple of {multiple_of}"
            raise self._refuse(name, kind, f"give {kind}, or leave {name} out")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise self._refuse(name, "True or False", f"give True or False for {name}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
