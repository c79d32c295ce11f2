"""A weightd that gives up a silent device after a second: `impatient_weightd.py python -m weightd ARGUMENT...`"""

from __future__ import annotations

import sys

from weightd import cli, serve, server

ANSWER_WITHIN_S = 1.0


def main() -> int:
    serve.ANSWER_WITHIN_S = server.ANSWER_WITHIN_S = ANSWER_WITHIN_S  # type: ignore[attr-defined]
    return cli.main(sys.argv[sys.argv.index("weightd") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
