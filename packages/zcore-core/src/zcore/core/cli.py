"""The `zcore` command: what the core offers itself, and the sub-commands of every installed wheel.

A wheel adds one with an entry point in `zcore.commands`: a Typer application becomes a group of commands, a function
becomes one command. One that fails to load stays in the list with its cause, and takes no other down. Command modules
are imported at each start of `zcore`, so they import torch and the like inside their functions.
"""

import io
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from zcore.core.errors import ZcoreError
from zcore.core.extensions import WHEELS, BrokenExtensionError, Offer, installed, offered

if TYPE_CHECKING:
    import typer

__all__ = ["build_app", "main"]


def main() -> None:
    """Run `zcore`. Exits 0, with 1 for an error that zcore explains, with 2 for wrong usage or a missing extra."""
    try:
        import rich  # noqa: F401 - here only to learn whether it is there
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(_say(f"The zcore command needs {error.name}: pip install 'zcore-core[cli]'", code=2))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of the ellipsis of a narrow table Latin-1 knows nothing
    try:
        build_app()()
    except ZcoreError as error:
        sys.exit(_say(f"Error: {error}", code=1))


def build_app() -> "typer.Typer":
    """The whole command, as it stands in this environment."""
    import typer

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(asked: bool) -> None:
        if asked:
            for wheel in WHEELS:
                if version := installed(wheel):
                    print(f"{wheel} {version}")
            raise typer.Exit

    @app.callback()
    def zcore(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show every installed wheel.")
        ] = False,
    ) -> None:
        """Train what does not fit, keep every device busy, serve what was trained."""

    @app.command()
    def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
        """Show what is installed, who serves which contract, and what you would gain by installing what."""
        from rich.console import Console

        from zcore.core.doctor import draw, examine

        report = examine()
        if as_json:
            print(json.dumps(asdict(report), indent=2))
        else:
            Console().print(draw(report))
        raise typer.Exit(1 if report.problems else 0)

    for offer in offered("zcore.commands"):
        _add(app, offer)
    return app


def _add(app: "typer.Typer", offer: Offer) -> None:
    """Add what a wheel offers, or a command of its name that tells why there is none."""
    import typer
    from rich.markup import escape

    try:
        command = offer.load()
        if not callable(command):
            raise BrokenExtensionError(
                f"{offer.wheel} offers `{offer.name}` in zcore.commands, which is a {type(command).__name__}; "
                "expected a function or a typer.Typer."
            )
    except BrokenExtensionError as error:
        cause = error

        def broken() -> None:
            raise cause

        takes_anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(offer.name, help=escape(f"Broken: {cause}"), context_settings=takes_anything)(broken)
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=offer.name)
    else:
        app.command(offer.name)(command)


def _say(message: str, *, code: int) -> int:
    print(message, file=sys.stderr)
    return code
