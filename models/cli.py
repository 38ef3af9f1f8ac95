"""The command line: sigjax demo | doctor | train | embed | evaluate | inspect | manifest.

Nothing but the standard library is imported until a command asks for it, so
that sigjax doctor works wherever sigjax is installed.
"""

import sys
from collections.abc import Sequence

USAGE = """\
usage: sigjax COMMAND [OPTIONS]; sigjax COMMAND --help says more

  demo      train on real blood cells for a few minutes, score and draw the result
  doctor    say what runs here, and why not what does not
  train     train a model on .h5ad files and zarr stores
  embed     write a file with an embedding of each cell
  evaluate  loss of a model on a file, and silhouette of its cell types
  inspect   say what is in files: genes, lengths, shapes, padding, cell types
  manifest  write digests of files, by which the other commands notice damage
"""
COMMANDS = ("demo", "train", "embed", "evaluate", "inspect", "manifest")
USER_ERROR = 2
# Top-level modules of the cells extra.
EXTRA = frozenset(
    (
        "anndata",
        "grain",
        "h5py",
        "matplotlib",
        "pandas",
        "rich",
        "scanpy",
        "scipy",
        "sklearn",
        "tyro",
        "umap",
        "zarr",
    )
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; the process's own where None.

    Returns:
        0 on success, 2 for an error of the user, who reads one line about it on stderr.

    Raises:
        SystemExit: with 0 after a command's --help, with 2 where its options do not parse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if name == "doctor":
        from sigjax import doctor

        return doctor.main(rest)
    if name not in COMMANDS:
        sys.stderr.write(f"sigjax: no command {name!r}\n\n{USAGE}" if name else USAGE)
        return USER_ERROR
    try:
        return _run(name, rest)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        return _user_error(f'{error.name} is not installed; pip install "sigjax[cells]"')


def _run(name: str, arguments: list[str]) -> int:
    """Runs a command; an error that the user can mend becomes one line."""
    from sigjax.models.commands import parse
    from sigjax.models.config import InputError
    from sigjax.models.train import NonFiniteLossError

    try:
        parse(name, arguments).run()
    except (InputError, NonFiniteLossError, NotImplementedError, OSError) as error:
        return _user_error(str(error))
    return 0


def _user_error(text: str) -> int:
    sys.stderr.write(f"sigjax: {' '.join(text.split())}\n")
    return USER_ERROR
