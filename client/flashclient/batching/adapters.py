"""LoRA adapters of a model that requests share: a step runs with one of them, or with none."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from flashclient.batching.adapter_folder import require_adapter, require_peft
from flashclient.batching.ffn_adapter import FfnAdapter, standing_in, taken_out
from flashclient.errors import AbsentWeightError, OptionError
from flashclient.kernels.resident_linear import use_fast_linears_again
from flashclient.model.ffn import ExactFFN
from flashclient.model.loaded import LoadedModel
from flashclient.torch_state import on_cpu


class Adapters:
    """The adapters of a loaded model, by PEFT. Code that runs the model switches to the one that it wants first.

    Layers that have an adapter are computed by their modules, whose matrices, those of adapters too, are native: the
    bits of a row depend on that row alone. Layers without one are as native as before. What adapts FFNs is taken out of
    PEFT's hands, because the FFN is computed as a whole (ffn_adapter.py).
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._names: dict[str, str] = {}  # PEFT's own: it allows no points
        self._ffns: dict[str, dict[int, FfnAdapter]] = {}  # by layer
        self._used: str | None = None

    def load(self, name: str, folder: Path) -> None:
        """Reads an adapter that PEFT's save_pretrained() has written.

        Raises:
            OptionError: the folder holds none, or one that does not fit the model.
            FlashClientError: PEFT is not installed.
        """
        require_peft()
        import_module("torch.distributed.tensor")  # PEFT leaves this to transformers, of which commands import less

        require_adapter(name, folder)
        own_name = f"adapter_{len(self._names)}"
        record = self._loaded.record
        try:
            with self._loaded.turns.taken(), on_cpu(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with standing_in(self._model, record) as places:
                    info = self._model.load_adapter(str(folder), adapter_name=own_name)
                    use_fast_linears_again(self._model)
                    ffns = taken_out(places, record, name, own_name, self._loaded.placement)
        except OptionError:
            raise
        except AbsentWeightError as error:
            raise OptionError(f"adapter '{name}' adapts weights that weightd holds: {error}") from error
        except Exception as error:  # whatever peft raises for files of unknown origin
            why = " ".join(str(error).split())
            raise OptionError(f"adapter '{name}' does not fit {record.name}: {why}") from error
        lost = sorted(key for key in getattr(info, "missing_keys", ()) if f".{own_name}." in key)
        if lost:
            raise OptionError(f"adapter '{name}' lacks weights that its configuration names, such as {lost[0]}")
        if ffns and not isinstance(self._loaded.built.ffn, ExactFFN):
            raise OptionError(
                f"adapter '{name}' adapts FFNs, of which mode {self._loaded.mode} does not compute all neurons: serve "
                "with --mode exact, or merge the adapter into the checkpoint and import that"
            )
        self._names[name] = own_name
        self._ffns[name] = ffns
        self._used = name
        self.use(None)

    def use(self, name: str | None) -> None:
        """Switches to an adapter; None: to the model without any. The caller has the model's turn."""
        if name == self._used:
            return
        if isinstance(ffn := self._loaded.built.ffn, ExactFFN):
            ffn.adapters = {} if name is None else self._ffns[name]
        if self._has_layers():
            if name is None:
                self._model.disable_adapters()
            else:
                self._model.enable_adapters()
                self._model.set_adapter(self._names[name])
        self._used = name

    def _has_layers(self) -> bool:
        """Whether PEFT has any: not where all adapters are of FFNs."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return any(isinstance(module, BaseTunerLayer) for module in self._model.modules())
