"""Cases: named configurations, as values and as TOML. They say what to switch on; nothing here touches a pipeline.

[fp16-channels-last]
description = "half precision, SDPA, channels-last convolutions"
dtype = "float16"
switches = [{ action = "enable_sdpa", backend = "flash" }, { action = "enable_channels_last" }]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ..errors import InvalidOptionError
from ..planning.options import HALF_DTYPES, Options, dtype_name, make_options
from ..planning.request import Request
from .peers import PEERS
from .reading import check_keys, check_table, did_you_mean, read_toml, refuse

LOADING_DTYPES = ("float32", *HALF_DTYPES)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One switch to throw: a method of TurboMixin by name, and its arguments as plain data.

    Raises:
        InvalidOptionError: no such action or argument, a value outside what the action accepts, or a value that a
            results file could not hold.
    """

    action: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # A copy nobody else holds, and lists for tuples: equal before and after a journey through JSON.
        object.__setattr__(self, "options", _plain(self.options, self.action))
        self.make_options()

    def make_options(self) -> Options:
        """Return the checked options value of this switch."""
        return make_options(self.action, **self.options)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named configuration. With no switch, plan, autocast or peer it is the untouched pipeline.

    Attributes:
        name: how tables and the command line call it.
        description: one line for people.
        dtype: what the pipeline is loaded in; None takes the job's.
        switches: thrown one after the other.
        auto: keyword arguments of `auto_optimize`; None does not call it, {} calls it with its defaults.
        autocast: dtype of a `torch.autocast` around each call.
        peer: name of another accelerator, of `diffusers_turbo.bench.peers.PEERS`; applied after the switches.

    Raises:
        InvalidOptionError: a value that does not fit, or `auto` beside switches or a peer.
    """

    name: str
    description: str = ""
    dtype: str | None = None
    switches: tuple[Switch, ...] = ()
    auto: Mapping[str, Any] | None = field(default=None, hash=False)
    autocast: str | None = None
    peer: str | None = None

    def __post_init__(self) -> None:
        here = f"case {self.name!r}"
        if not isinstance(self.name, str) or not self.name or self.name != self.name.strip() or "," in self.name:
            # the command line takes names separated by commas
            raise refuse(here, f"name = {self.name!r}", "a name without commas or outer spaces", "choose another name")
        if not isinstance(self.description, str):
            raise refuse(here, f"description = {self.description!r}", "text", "put it in quotes")
        object.__setattr__(self, "dtype", _checked_dtype(self.dtype, "dtype", LOADING_DTYPES, here))
        object.__setattr__(self, "autocast", _checked_dtype(self.autocast, "autocast", HALF_DTYPES, here))
        object.__setattr__(self, "switches", tuple(self.switches))
        if self.auto is not None:
            object.__setattr__(self, "auto", _checked_auto(self.auto, here))
        if self.peer is not None and self.peer not in PEERS:
            found = f"no peer {self.peer!r}{did_you_mean(str(self.peer), PEERS)}"
            raise refuse(here, found, f"one of {', '.join(PEERS)}", "correct the name")
        if self.auto is not None and (self.switches or self.peer is not None):
            # a plan counts on being alone: what else is switched on would be a hidden part of it
            found = "auto beside switches or a peer"
            raise refuse(here, found, "auto alone", "make one case of each")


def parse_cases(tables: Mapping[str, Any], source: str) -> dict[str, Case]:
    """Make the cases of a mapping from names to tables, as TOML gives them.

    Args:
        tables: name of the case -> its keys.
        source: the file, named in errors.

    Raises:
        InvalidOptionError: an unknown key or action, or a value that does not fit; the text names file, case and key.
    """
    known = [part.name for part in fields(Case) if part.name != "name"]
    made = {}
    for name, value in tables.items():
        where = f"{source}, [{name}]"
        table = check_table(value, where)
        check_keys(table, known, where)
        given = {**table, "switches": _parse_switches(table.get("switches", []), where)}
        try:
            made[name] = Case(name=name, **given)
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{where}: {error}") from error
    return made


def read_cases(path: str | Path | Traversable) -> dict[str, Case]:
    """Read the cases of a TOML file, by name.

    Raises:
        InvalidOptionError: no such file, no TOML, an unknown key or action, or a value that does not fit.
    """
    return parse_cases(read_toml(path), str(path))


@cache
def _builtin_cases() -> dict[str, Case]:
    return read_cases(files(__package__) / "configs.toml")


def builtin_cases() -> dict[str, Case]:
    """Return the cases of configs.toml, by name, in its order."""
    return dict(_builtin_cases())


def find_cases(names: Iterable[str], extra_file: str | Path | None = None) -> tuple[Case, ...]:
    """Return the named cases in the order given, from `extra_file` first and then from the built-in ones.

    Raises:
        InvalidOptionError: no case of that name, a name given twice, or a fault in `extra_file`.
    """
    known = builtin_cases()
    if extra_file is not None:
        known |= read_cases(extra_file)
    return pick_cases(names, known, "find_cases()")


def pick_cases(names: Iterable[str], known: Mapping[str, Case], where: str) -> tuple[Case, ...]:
    """Return the named cases out of the known ones, in the order given.

    Raises:
        InvalidOptionError: no case of that name (with the closest ones), or a name given twice.
    """
    picked: dict[str, Case] = {}
    for name in names:
        if name not in known:
            found = f"no case {name!r}{did_you_mean(str(name), known)}"
            raise refuse(where, found, f"cases among {', '.join(known)}", "correct the name, or add it to a file")
        if name in picked:
            raise refuse(where, f"{name!r} twice", "each case once", "remove one of them")
        picked[name] = known[name]
    return tuple(picked.values())


def _parse_switches(value: object, where: str) -> tuple[Switch, ...]:
    if not isinstance(value, list):
        needed = 'a list such as [{ action = "enable_sdpa" }]'
        raise refuse(where, f"switches = {value!r}", needed, "write a list of tables")
    made = []
    for number, item in enumerate(value, start=1):
        here = f"{where}, switch {number}"
        table = check_table(item, here)
        if not isinstance(table.get("action"), str):
            raise refuse(here, f"{table!r}", 'a key action, such as "enable_sdpa"', "name the method to call")
        try:
            options = {key: option for key, option in table.items() if key != "action"}
            made.append(Switch(action=table["action"], options=options))
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{here}: {error}") from error
    return tuple(made)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    needed = "text, numbers, True, False, None or lists of them"
    raise refuse(f"{where} in a case", f"{value!r}", needed, "write it as text, a dtype or device by its name")


def _checked_dtype(value: object, name: str, choices: tuple[str, ...], where: str) -> str | None:
    if value is None:
        return None
    if dtype_name(value) not in choices:
        raise refuse(where, f"{name} = {value!r}", f"one of {', '.join(choices)}", f"correct {name}, or leave it out")
    return dtype_name(value)


def _checked_auto(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise refuse(where, f"auto = {value!r}", "a table of arguments", "write auto = {} for all defaults")
    auto: dict[str, Any] = _plain(value, "auto_optimize()")
    check_keys(auto, [part.name for part in fields(Request)], f"{where}, auto")
    Request(**auto)
    return auto
