"""`weightd --store DIR`: starts the daemon from its configuration, and ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress

import uvloop

from weightd import log
from weightd._native import EngineOptions, EngineThread
from weightd.errors import DeviceError, UsageError, WeightdError, described
from weightd.gateway import listening
from weightd.gateway.addresses import MetricsAddress
from weightd.gateway.identity import Identities
from weightd.gateway.tls import TlsCredentials
from weightd.machine import pressure
from weightd.machine.budget import GrowingDram, chosen_dram_bytes, chosen_floor_bytes
from weightd.machine.heap import bound_heap
from weightd.serving.config import ServeConfig, load_config
from weightd.serving.control_plane import ControlPlane
from weightd.serving.endpoints import Endpoints, prepare_addresses, remove_sockets
from weightd.serving.fetch import Fetcher
from weightd.serving.reload import Reloader
from weightd.serving.served_models import ANSWER_WITHIN_S, ServedModels, demand_of
from weightd.serving.systemd import feed_watchdog, notify
from weightd.sizes import format_size
from weightd.store.device_profile import sequential_gb_per_s
from weightd.store.store import Store
from weightd.watching.statistics import Statistics

logger = logging.getLogger("weightd")

# Hotness is saved at the end, and at intervals in case the daemon is killed. The intervals are long, to spare the
# device, but short after the start, when hotness changes fastest.
REMEMBER_FIRST_S = 4.0
REMEMBER_EVERY_S = 256.0
CLOSE_UNUSED_EVERY_S = 1.0  # imports that were replaced while in use hold memory and disk until they are closed


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT, or until its terminal or its owner ends. Returns the exit status.

    Errors are logged. Only UsageError for wrong flags is raised, because the log is not configured yet.
    """
    config = load_config(arguments)
    log.configure(config.log_level, config.log_format)
    try:
        uvloop.run(serve(config, arguments))
    except WeightdError as error:
        logger.error("%s", error)
        return error.exit_status
    except OSError as error:
        logger.error("%s", described(error))
        return 1
    except Exception:
        logger.exception("a fault of weightd")
        return 1
    finally:
        log.finish()
    return 0


async def serve(config: ServeConfig, arguments: Sequence[str]) -> None:
    """Claims the store, starts the engine, listens, and waits for the end. SIGHUP reads the configuration again."""
    had_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # as nohup sets it
    _raise_descriptor_limit()
    bound_heap()
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(config.store, readonly=True))
        demands = [demand_of(model) for model in store.models()]
        dram_bytes = chosen_dram_bytes(config.dram, demands)
        store.claim(min(config.listen, key=lambda address: address.socket_path is None).target)
        tls = None if config.tls is None else TlsCredentials(config.tls)
        prepare_addresses(config, tls)
        data_socket = str(stack.enter_context(listening.data_socket(config.listen)))
        triggers = _pressure_triggers()
        engine = _engine(config, dram_bytes, data_socket, triggers)
        stack.callback(engine.close)
        dram = GrowingDram(config.dram, config.dram_floor, dram_bytes, demands)
        models = ServedModels(store, engine, dram, config.cold_start)
        models.open_all(ANSWER_WITHIN_S)
        identities = Identities(config.store)
        statistics = Statistics(engine, sequential_gb_per_s(store), triggers.watched)
        fetcher = Fetcher(store, models, engine)
        control = ControlPlane(models, fetcher, engine, identities, data_socket, dram, statistics)
        stack.callback(control.close)
        control.set_rules(config.allow, config.allow_publish)
        if config.metrics is not None:
            stack.enter_context(_metrics(config.metrics, statistics))
        if not config.cold_start:
            stack.callback(models.remember)
        stack.callback(remove_sockets, config)
        endpoints = Endpoints(config, control, tls)
        stack.callback(endpoints.close)
        told = _told_to_stop(config, engine)
        loop = asyncio.get_running_loop()
        reloader = Reloader(config, arguments, control, tls)
        loop.add_signal_handler(signal.SIGHUP, _on_hangup(had_terminal, told, reloader))
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)  # the handler would keep the engine's memory alive
        watchdog = feed_watchdog(config.service_manager, engine)
        for task in (watchdog, _remember_now_and_then(config, models), _close_unused_soon(models)):
            stack.callback(asyncio.create_task(task).cancel)
        await endpoints.start(identities)
        _say_started(config, models, engine, dram_bytes)
        await told.wait()
        _say_stopping(config)
        await endpoints.stop()
        if engine.failure:
            raise DeviceError(f"the engine ended by a fault: {engine.failure}; clients attach again to a new weightd")


def _raise_descriptor_limit() -> None:
    """Each session takes four descriptors and each segment of the pool two. Many systems have a soft limit of 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _pressure_triggers() -> pressure.Triggers:
    triggers = pressure.set_triggers()
    for line in triggers.refused:
        logger.debug("memory pressure is not watched in %s", line)
    return triggers


def _metrics(address: MetricsAddress, statistics: Statistics) -> AbstractContextManager[None]:
    from weightd.watching import metrics  # imported on demand, because prometheus_client takes memory

    if not address.loopback:
        logger.warning("everybody who can connect to %s:%d can read the metrics", address.host, address.port)
    return metrics.serving(address, statistics.now)


def _engine(config: ServeConfig, dram_bytes: int, data_socket: str, triggers: pressure.Triggers) -> EngineThread:
    try:
        with listening.private_sockets():
            options = EngineOptions(
                dram_bytes=dram_bytes,
                io_engine=config.io_engine,
                io_threads=config.io_threads,
                io_depth=config.io_depth,
                allow_buffered=config.allow_buffered,
                data_socket=data_socket,
                warms=not config.cold_start,
                dram_floor_bytes=chosen_floor_bytes(config.dram_floor, dram_bytes),
                machine_pressure_fd=triggers.machine_fd,
                cgroup_pressure_fd=triggers.cgroup_fd,
                answer_within_s=ANSWER_WITHIN_S,
            )
            engine = EngineThread(options)
    except OSError as error:
        if error.filename:  # a socket
            raise
        raise DeviceError(f"cannot start the engine: {error}; `weightd doctor` tells what the system allows") from error
    if engine.io_engine_note:
        logger.info("%s", engine.io_engine_note)
    return engine


def _say_started(config: ServeConfig, models: ServedModels, engine: EngineThread, dram_bytes: int) -> None:
    names = models.names()
    addresses = [address.target for address in config.listen]
    logger.info(
        "serving %s (%s) with --dram %s, %s, at %s",
        config.store,
        ", ".join(names) or "no models yet",
        format_size(dram_bytes),
        engine.io_engine,
        ", ".join(addresses),
        extra={"fields": {"models": names, "dram_bytes": dram_bytes, "listen": addresses}},
    )
    notify(config.service_manager, "READY=1")


def _say_stopping(config: ServeConfig) -> None:
    logger.info("stopping")
    notify(config.service_manager, "STOPPING=1")


async def _remember_now_and_then(config: ServeConfig, models: ServedModels) -> None:
    pause_s = REMEMBER_FIRST_S
    while True:
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(models.close_all_replaced if config.cold_start else models.remember)
        pause_s = min(2 * pause_s, REMEMBER_EVERY_S)


async def _close_unused_soon(models: ServedModels) -> None:
    while True:
        await asyncio.sleep(CLOSE_UNUSED_EVERY_S)
        if models.has_replaced:
            await asyncio.to_thread(models.close_unused)


def _told_to_stop(config: ServeConfig, engine: EngineThread) -> asyncio.Event:
    """An event that is set by SIGTERM, SIGINT, the end of the owner, and a fault of the engine."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    if config.owner_fd is not None:
        _watch_owner(loop, config.owner_fd, told)
    _watch_engine(loop, engine, told)
    return told


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _on_hangup(had_terminal: bool, told: asyncio.Event, reloader: Reloader) -> Callable[[], None]:
    """SIGHUP's handler: stops the daemon if its terminal has closed, otherwise reads the configuration again."""

    def hangup() -> None:
        if had_terminal and not _has_terminal():
            told.set()
        else:
            reloader.reload()

    return hangup


def _watch_engine(loop: asyncio.AbstractEventLoop, engine: EngineThread, told: asyncio.Event) -> None:
    def has_failed() -> None:
        loop.remove_reader(engine.failed_fd)
        told.set()

    loop.add_reader(engine.failed_fd, has_failed)


def _watch_owner(loop: asyncio.AbstractEventLoop, descriptor: int, told: asyncio.Event) -> None:
    def read() -> None:
        with suppress(BlockingIOError):  # another process has opened the FIFO since the owner's end
            if not os.read(descriptor, 1):  # the owner writes nothing; it only closes its end
                loop.remove_reader(descriptor)
                os.close(descriptor)  # from now on, opening the FIFO for writing fails
                told.set()

    try:
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        loop.add_reader(descriptor, read)
    except OSError as error:
        raise UsageError(f"--owner-fd {descriptor}: {error.strerror}; want the read end of a pipe") from error
