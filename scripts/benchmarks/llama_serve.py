"""llama-cpp-python's server with its file mapped into memory.

llama_server.py runs it as a process, with an interpreter that has llama-cpp-python. It takes the server's flags, and
imports nothing of this project but llama_decode.py.
"""

from __future__ import annotations

from benchmarks.llama_decode import map_weights

from llama_cpp.server.__main__ import main  # type: ignore[import-not-found]  # isort: skip

if __name__ == "__main__":
    map_weights()
    main()
