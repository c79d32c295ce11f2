"""SIGHUP: reads the configuration again and applies the settings that can change without a restart."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields

from weightd import log
from weightd.errors import WeightdError
from weightd.gateway.tls import TlsCredentials
from weightd.serving.config import ServeConfig, load_config
from weightd.serving.control_plane import ControlPlane
from weightd.serving.systemd import notify, notify_reloading

logger = logging.getLogger(__name__)

RELOADED = ("allow", "allow_publish", "log_level", "log_format")
NOT_SETTINGS = ("service_manager",)  # set by systemd, not by the operator


class Reloader:
    """Applies rules, certificates, log level and log format. Other changes are logged and need a restart."""

    def __init__(
        self, config: ServeConfig, arguments: Sequence[str], control: ControlPlane, tls: TlsCredentials | None
    ) -> None:
        """`config` was made from `arguments` at the start."""
        self._config = config
        self._arguments = arguments
        self._control = control
        self._tls = tls

    def reload(self) -> None:
        """Never raises. A mistake in the configuration is logged, and nothing changes."""
        notify_reloading(self._config.service_manager)
        try:
            fresh = load_config(self._arguments)
        except WeightdError as error:
            logger.error("the configuration stays as it was: %s", error)
        else:
            self._take(fresh)
        notify(self._config.service_manager, "READY=1")

    def _take(self, fresh: ServeConfig) -> None:
        self._control.set_rules(fresh.allow, fresh.allow_publish)
        log.configure(fresh.log_level, fresh.log_format)
        if self._tls is not None:
            self._tls.reload()
        names = [field.name for field in fields(ServeConfig) if field.name not in (*RELOADED, *NOT_SETTINGS)]
        for name in names:
            if getattr(fresh, name) != getattr(self._config, name):
                logger.warning("%s was changed: that takes effect at the next start", name.replace("_", "-"))
        logger.info("the configuration was read again: rules, certificates and log are as it says")
