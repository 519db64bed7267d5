"""The `qcompile` command: finds the subcommand, and turns errors into exit codes."""

import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from qcompiler.cli.processes import silence_followers
from qcompiler.errors import QCompilerError, printable

_COMMANDS = {
    "compile": ("qcompiler.cli.compile", "Compile a model (what `qcompile MODEL` does)."),
    "build": ("qcompiler.cli.build", "Build the engine of a bundle on this machine."),
    "inspect": ("qcompiler.cli.inspect", "List a model's ops, quantizable sites and blocks."),
    "explain": ("qcompiler.cli.explain", "Say what a node became: why, at which cost."),
    "diff": ("qcompiler.cli.diff", "Say how two compiled models differ, node by node."),
    "report": ("qcompiler.cli.report", "Write a report as a page for a browser."),
    "check": ("qcompiler.cli.check", "Hold a compiled model against bounds: a step for CI."),
    "bench": ("qcompiler.cli.bench", "Time models and engines next to each other."),
    "export": ("qcompiler.cli.export", "Write a PyTorch module or checkpoint as ONNX."),
    "sensitivity": ("qcompiler.cli.sensitivity", "Rank ops by what quantizing them costs."),
    "islands": ("qcompiler.cli.islands", "Show which weights a task depends on."),
    "reproduce": ("qcompiler.cli.reproduce", "Compile again from a manifest, compare bytes."),
    "run-pass": ("qcompiler.cli.run_pass", "Run one pass alone over a model."),
    "doctor": ("qcompiler.cli.doctor", "Show versions, providers, and what is missing."),
}

_INTERRUPTED = 130


class CommandGroup(click.Group):
    """A group whose default command is `compile`, and which imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of `--help`."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(_COMMANDS[cmd_name][0]).command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `compile` in front of anything that is not a command or an option of the group."""
        own = (*_COMMANDS, "--help", "-h", "--version", "--list")
        if args and args[0].partition("=")[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage line of both forms."""
        formatter.write_usage("qcompile", "MODEL [-o OUT] [OPTIONS] | COMMAND ...")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of `compile`, the commands and the lists."""
        compile_command = self.get_command(ctx, "compile")
        if compile_command is not None:
            with formatter.section("Options of qcompile MODEL"):
                records = [p.get_help_record(ctx) for p in compile_command.get_params(ctx)]
                formatter.write_dl([record for record in records if record is not None])
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in _COMMANDS.items()])
        with formatter.section("Lists"):
            formatter.write_dl(
                [("--list passes|targets|schemes", "What exists."), ("--version", "The version.")]
            )


def _print_list(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    from qcompiler.cli.listing import lines_of

    for line in lines_of(value):
        click.echo(line)
    ctx.exit()


@click.group(
    cls=CommandGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--list",
    type=click.Choice(["passes", "targets", "schemes"]),
    is_eager=True,
    expose_value=False,
    callback=_print_list,
)
@click.version_option(package_name="qcompiler", prog_name="qcompile")
def cli() -> None:
    """Compile an exported ONNX model so that it runs on integer weights.

    With no options: weight-only int8 for ONNX Runtime, which needs no data.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    silence_followers(show_traceback=show_traceback)
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(_run(arguments, show_traceback))


def _run(arguments: list[str], show_traceback: bool) -> int:
    try:
        status: Any = cli.main(arguments, prog_name="qcompile", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: no model was written", err=True)
        return _INTERRUPTED
    except QCompilerError as error:
        _show(error, show_traceback)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing may be left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        click.echo("error: out of memory", err=True)
        return QCompilerError.exit_code
    except Exception as error:  # the last line of defence: one sentence, never a traceback
        _show(error, show_traceback)
        return QCompilerError.exit_code
    return status if isinstance(status, int) else 0


def _show(error: Exception, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, QCompilerError):
        place = f"{error.where}: " if error.where else ""
        click.echo(printable(f"error: {place}{error.message}"), err=True)
        if error.hint:
            click.echo(printable(f"  hint: {error.hint}"), err=True)
        if error.reason:
            where = f"docs/refusals.md#{error.reason}"
            click.echo(f"  more: {where}, qcompile explain --reason {error.reason}", err=True)
        return
    click.echo(printable(f"internal error: {type(error).__name__}: {error}"), err=True)
    click.echo("  hint: a defect in qcompiler; --traceback shows where, please report it", err=True)
