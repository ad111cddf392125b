"""The commands: bench, verify, probe, plan, generate."""

from __future__ import annotations

import typer

from .arguments import spread_lists
from .bench import app as bench_app
from .generate import generate
from .look import plan, probe
from .output import hush_libraries
from .verify import verify

app = typer.Typer(
    name="diffusers-turbo",
    help="Any diffusers pipeline as fast as its GPU allows, or as small as its VRAM needs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
for command in (verify, probe, plan, generate):
    app.command()(command)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status.

    Raises:
        TurboError: bad input, or something that cannot be done here.
    """
    hush_libraries()
    try:
        app(args=spread_lists(arguments), prog_name="diffusers-turbo")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0
