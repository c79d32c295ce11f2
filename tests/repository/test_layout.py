"""Which package may import which: those named in its line of the table, and nothing else.

A package is named after everything that it may import, so the table has no circle. A name without a dot is a module
directly in the top package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

TABLE = {
    "weightd": """
        errors:
        sizes: errors
        closing:
        flags: errors
        log:
        disk: errors sizes closing
        store: errors sizes closing disk
        checkpoint: errors sizes disk
        importing: errors sizes disk store checkpoint
        machine: errors sizes flags store
        gateway: errors
        watching: errors sizes flags log gateway
        serving: errors sizes flags log disk store machine gateway watching
        cli: errors sizes flags log store checkpoint importing machine watching serving
        __main__: cli
    """,
    "flashclient": """
        errors:
        memory_limits:
        standard_streams:
        torch_state:
        turns: errors
        daemon: errors
        source: errors daemon
        model: errors torch_state turns daemon source
