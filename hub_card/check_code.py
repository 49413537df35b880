"""Whether the code in a repository is that of a release of this package, told without running it.

python -m hub_card.check_code user/name --revision 0123abc
python -m hub_card.check_code --add-release 0.1.0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .code_files import add_release, verify
from .errors import one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Print what `verify` finds, and exit with status 1 where it is not the code of a release."""
    parser = argparse.ArgumentParser(
        prog="python -m hub_card.check_code",
        description="Whether the code in a repository is that of a release of modeling-prm; nothing of it is run.",
    )
    parser.add_argument("source", nargs="?", help="a Hub id or a folder")
    parser.add_argument("--revision", help="branch, tag or commit hash")
    parser.add_argument("--add-release", metavar="VERSION", help="add this package's code to its table of releases")
    options = parser.parse_args(argv)
    if (options.source is None) == (options.add_release is None):
        parser.error("give a Hub id or a folder, or --add-release VERSION")
    with one_line_errors():
        if options.add_release is not None:
            add_release(options.add_release)
            return
        check = verify(options.source, options.revision)
    print(check)
    sys.exit(0 if check.ok else 1)


if __name__ == "__main__":
    main()
