#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Runs tasks of lm-evaluation-harness on a stored model. The harness takes client.model as a pretrained model.

    scripts/evaluate_with_harness.py opt-1.3b --store ./store --mode predict --tasks hellaswag,arc_easy --limit 200

Needs `pip install -c constraints.txt '.[eval]'`. The harness's own tasks load their data sets from the network. With
--include-path it runs task files (YAML) with local data.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from flags import FlagParser

from flashclient import FlashClient
from flashclient.commands.arguments import add_tls_flags


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("model", help="the model's name in the store")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--address", help="address of a weightd")
    where.add_argument("--store", metavar="DIR")
    add_tls_flags(parser)
    parser.add_argument("--mode", default="auto", help="auto, exact or predict")
    parser.add_argument("--tasks", required=True, type=lambda text: text.split(","), metavar="T,T")
    parser.add_argument("--include-path", metavar="DIR", help="folder of task files")
    parser.add_argument("--limit", type=int, metavar="N", help="number of examples of each task")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one object instead of a table")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """What the harness returns."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("address", "store", "tls_ca", "tls_cert", "tls_key")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    with FlashClient(options.model, mode=options.mode, **given) as client:
        model = HFLM(pretrained=client.model, tokenizer=client.tokenizer, batch_size=options.batch_size)
        tasks = TaskManager(include_path=options.include_path)
        found: dict[str, Any] = simple_evaluate(model, tasks=options.tasks, task_manager=tasks, limit=options.limit)
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    found = evaluate(options)
    if options.json:
        print(json.dumps(found["results"]))
    else:
        from lm_eval.utils import make_table

        print(make_table(found))


if __name__ == "__main__":
    main()
