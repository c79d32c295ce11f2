"""LoRA adapters of a model that requests share: a step runs with one of them, or with none."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashclient.errors import AbsentWeightError, FlashClientError, OptionError
from flashclient.kernels.resident_linear import use_fast_linears_again
from flashclient.model.loaded import LoadedModel
from flashclient.torch_state import on_cpu

CONFIG_FILE = "adapter_config.json"


class Adapters:
    """The adapters of a loaded model, by PEFT. Code that runs the model switches to the one that it wants first.

    Layers that have an adapter are computed by their modules, whose matrices, those of adapters too, are native: the
    bits of a row depend on that row alone. Layers without one are as native as before.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._names: dict[str, str] = {}  # PEFT's own: it allows no points
        self._used: str | None = None

    def load(self, name: str, folder: Path) -> None:
        """Reads an adapter that PEFT's save_pretrained() has written.

        Raises:
            OptionError: the folder holds none, or one that does not fit the model.
            FlashClientError: PEFT is not installed.
        """
        if find_spec("peft") is None:
            raise FlashClientError("this needs peft: pip install 'weightd[adapters]'")
        if not (folder / CONFIG_FILE).is_file():
            raise OptionError(f"adapter '{name}': {folder} has no {CONFIG_FILE}: give the folder of an adapter of PEFT")
        own_name = f"adapter_{len(self._names)}"
        try:
            with self._loaded.turns.taken(), on_cpu(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                info = self._model.load_adapter(str(folder), adapter_name=own_name)
                use_fast_linears_again(self._model)
        except AbsentWeightError as error:
            raise OptionError(f"adapter '{name}' adapts FFNs, whose weights weightd holds: {error}") from error
        except Exception as error:  # whatever peft raises for files of unknown origin
            why = " ".join(str(error).split())
            raise OptionError(f"adapter '{name}' does not fit {self._loaded.record.name}: {why}") from error
        lost = sorted(key for key in getattr(info, "missing_keys", ()) if f".{own_name}." in key)
        if lost:
            raise OptionError(f"adapter '{name}' lacks weights that its configuration names, such as {lost[0]}")
        self._names[name] = own_name
        self._used = name
        self.use(None)

    def use(self, name: str | None) -> None:
        """Switches to an adapter; None: to the model without any. The caller has the model's turn."""
        if name == self._used:
            return
        if name is None:
            self._model.disable_adapters()
        else:
            self._model.enable_adapters()
            self._model.set_adapter(self._names[name])
        self._used = name
