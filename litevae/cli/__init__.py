"""The `litevae` command. A user's mistake ends it with one line on stderr and exit status 2."""

import errno
import io
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from litevae.cli.complexity import complexity
from litevae.cli.config import config
from litevae.cli.distill import distill
from litevae.cli.encode import EncodeCommand, encode
from litevae.cli.eval import evaluate
from litevae.cli.experiment import experiment
from litevae.cli.export import export
from litevae.cli.features import features
from litevae.cli.gradients import gradients
from litevae.cli.info import info
from litevae.cli.latents import latents
from litevae.cli.push import push
from litevae.cli.reconstruct import reconstruct
from litevae.cli.resolution import resolution
from litevae.cli.scale import scale
from litevae.cli.train import train
from litevae.cli.train_diffusion import train_diffusion
from litevae.errors import LONGEST_MESSAGE, NonFiniteError, UserError, WorkerDied, describe_os_error, one_line
from litevae.memory import explain_out_of_memory

# Without Rich, whose boxes break long lines: an error is one line.
app = typer.Typer(rich_markup_mode=None, add_completion=False)
# A setting written as an option reaches the command, whose message explains settings.
app.command(context_settings={"ignore_unknown_options": True})(train)
app.command(context_settings={"ignore_unknown_options": True})(distill)
app.command("train-diffusion", context_settings={"ignore_unknown_options": True})(train_diffusion)
app.command(context_settings={"ignore_unknown_options": True})(config)
app.command()(reconstruct)
app.command()(info)
app.command()(scale)
app.command(cls=EncodeCommand)(encode)
app.command("eval")(evaluate)
app.command()(export)
app.command()(push)
app.command()(complexity)
app.command()(latents)
app.command()(experiment)
app.command()(resolution)
app.command()(features)
app.command()(gradients)


def print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"litevae {version('litevae')}")
        except PackageNotFoundError:  # it runs from a source tree
            print("litevae, not installed")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def callback(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """LiteVAE: lightweight autoencoders for latent diffusion.

    \b
    Example: litevae train demo
             litevae distill path/to/sd-vae data.train=path/to/images
             litevae config demo
             litevae reconstruct runs/demo photo.jpg -o reconstructed
             litevae info litevae-b
             litevae scale runs/demo path/to/images
             litevae encode runs/demo path/to/images latents
             litevae eval runs/demo path/to/images
             litevae export runs/demo exported
             litevae push runs/demo user/name
             litevae complexity
             litevae latents runs/demo path/to/images -o latents
             litevae train-diffusion small model=runs/demo data.latents=latents
             litevae resolution runs/demo runs/sd-vae path/to/images -o resolution
             litevae features runs/group runs/smc path/to/images -o features
             litevae gradients runs/constant runs/adaptive -o gradients.png
             litevae experiment table09
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit

    from litevae_kernels.allocator import keep_freed_memory

    keep_freed_memory()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    Args:
        arguments: command-line arguments; None takes `sys.argv`.

    Returns:
        0 after success, and after training or encoding that Ctrl-C or SIGTERM stopped and that can continue; 1 if
        a training run diverged, a process that reads data died, or the disk failed; 2 for a user's mistake; 130 if
        the command was interrupted before there was anything to save.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no valid text
    try:
        status = app(args=arguments, prog_name="litevae", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except UserError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(describe_os_error(error), 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 1)
    except (NonFiniteError, WorkerDied) as error:
        return fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", 130)
    except Exception as error:
        if message := explain_out_of_memory(error):
            return fail(message, 2)
        if isinstance(error, ValueError) and str(error).startswith(
            "LITEVAE_"
        ):  # a variable of litevae_kernels
            return fail(str(error), 2)
        # Typer's usage errors. Newer versions bundle a copy of Click, so the class is not always the same.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        message = one_line(error.format_message(), LONGEST_MESSAGE // 2)
        message += "" if message.endswith((".", "?")) else "."
        hint = f" See {context.command_path} --help." if context else ""
        return fail(message + hint, getattr(error, "exit_code", 2))


def fail(message: str, status: int) -> int:
    print(f"litevae: error: {one_line(message)}", file=sys.stderr)
    return status
