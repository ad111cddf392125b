"""`python -m diffusers_turbo`, the same as the command `diffusers-turbo`.

Exit status: 0 done; 1 measured, and the promise is broken or nothing could be measured; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .errors import MissingPackageError, TurboError, explain_failure

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; every refusal is one line on standard error."""
    try:
        _require_extra()
        from .cli.app import run

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except TurboError as error:
        print(f"diffusers-turbo: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("diffusers-turbo: interrupted", file=sys.stderr)
        return INTERRUPTED


def _require_extra() -> None:
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        do = 'pip install "diffusers-turbo[cli]"'
        found = f"no {' and no '.join(missing)}"
        raise MissingPackageError(explain_failure("the command line", found, "the packages of the extra cli", do))


if __name__ == "__main__":
    sys.exit(main())
