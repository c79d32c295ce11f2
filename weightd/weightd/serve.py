"""`weightd --store DIR`: from the configuration to a serving process, and back to nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weightd import budget, listening, log, pressure
from weightd._native import Engine
from weightd.call_bounds import CALLS_MAX, CHANNEL_OPTIONS, SERVICE_NAME, CallBounds
from weightd.config import ListenAddress, MetricsAddress, ServeConfig, load_config
from weightd.errors import DeviceError, UsageError, WeightdError
from weightd.fetch import Fetcher
from weightd.identity import Identities, IdentityProtocol
from weightd.profile import sequential_gb_per_s
from weightd.reload import Reloader
from weightd.served_models import ServedModels, demand_of
from weightd.server import WeightdService
from weightd.sizes import format_size
from weightd.statistics import Statistics
from weightd.store import Store
from weightd.systemd import feed_watchdog, notify
from weightd.tls import TlsCredentials
from weightd_proto import weightd_pb2_grpc

logger = logging.getLogger("weightd")

GRACE_S = 5.0  # for running calls, when we are told to stop
# What is hot is written down at the end, and now and then for when there is no end: seldom, for the sake of the device,
# but sooner after the start, when it is learned fastest.
REMEMBER_FIRST_S = 4.0
REMEMBER_EVERY_S = 256.0


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM, SIGINT or the owner's end. What goes wrong then is a line of the log, and the exit status.

    Raises UsageError for wrong flags, before there is a log; the command prints it.
    """
    config = load_config(arguments)
    log.configure(config.log_level, config.log_format)
    try:
        uvloop.run(serve(config, arguments))
    except WeightdError as error:
        logger.error("%s", error)
        return error.exit_status
    return 0


async def serve(config: ServeConfig, arguments: Sequence[str]) -> None:
    """Claims the store, opens the engine, listens, and waits for the end. SIGHUP reads `arguments` and files again."""
    _raise_descriptor_limit()
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(config.store, readonly=True))
        dram_bytes = _dram_bytes(config, store)
        store.claim(min(config.listen, key=lambda address: address.socket_path is None).target)
        tls = None if config.tls is None else TlsCredentials(config.tls)
        for address in config.listen:
            listening.prepare(address)
            if address.socket_path is None and tls is None:
                logger.warning("every user of this machine can read the models through %s", address.target)
        data_socket = str(stack.enter_context(listening.data_socket(config.listen)))
        triggers = _pressure_triggers()
        engine = _engine(config, dram_bytes, data_socket, triggers)
        stack.callback(engine.close)
        models = ServedModels(store, engine, config.unbundled_reads)
        models.open_all()
        fetcher = Fetcher(store, models, engine)
        identities = Identities(config.store)
        statistics = Statistics(engine, sequential_gb_per_s(store), triggers.watched)
        service = WeightdService(models, fetcher, engine, identities, data_socket, dram_bytes, statistics)
        stack.callback(service.close)
        service.set_rules(config.allow, config.allow_publish)
        if config.metrics is not None:
            stack.enter_context(_metrics(config.metrics, statistics))
        if not config.cold_start:
            stack.callback(models.remember)
        stack.callback(_remove_sockets, config)
        frontend = _frontend(config, service, tls)
        identity_servers = await _identity_servers(config, identities)  # they listen for as long as they are held
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        _watch_engine(loop, engine, told)
        loop.add_signal_handler(signal.SIGHUP, Reloader(config, arguments, service, tls).reload)
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)  # it would keep the engine's memory
        for task in (feed_watchdog(config.service_manager, engine), _remember_now_and_then(config, models)):
            stack.callback(asyncio.create_task(task).cancel)
        for server in identity_servers:
            stack.callback(server.close)
        await _serve_until_told(config, frontend, lambda: _say_started(config, models, engine, dram_bytes), told)
        if engine.failure:
            raise DeviceError(f"the engine ended by a fault: {engine.failure}; clients attach again to a new weightd")


@dataclass(frozen=True)
class Frontend:
    """The gRPC server with its health service."""

    server: grpc.aio.Server
    health: Any  # health.aio.HealthServicer, which types-grpcio lacks


def _raise_descriptor_limit() -> None:
    """Each session takes four descriptors and each segment of the pool two; the soft limit is 1024 on many systems."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _dram_bytes(config: ServeConfig, store: Store) -> int:
    """What --dram is in bytes, checked against the machine and the store's models."""
    limits = budget.memory_limits()
    demands = [demand_of(model) for model in store.models()]
    if config.dram_bytes is not None:
        dram_bytes = config.dram_bytes
    elif config.dram_percent is not None:
        dram_bytes = budget.percent_of_memory(config.dram_percent, limits)
    else:
        dram_bytes = budget.default_dram_bytes(limits, demands)
    budget.check_dram(dram_bytes, limits, demands)
    for demand in budget.unservable(dram_bytes, demands):
        logger.warning("%s cannot be served: it needs --dram %s", demand.name, format_size(demand.minimum_bytes))
    free_bytes = min(limit.free_bytes for limit in limits)
    if dram_bytes > free_bytes:
        logger.warning("--dram %s is more than the %s free now", format_size(dram_bytes), format_size(free_bytes))
    return dram_bytes


def _pressure_triggers() -> pressure.Triggers:
    triggers = pressure.set_triggers()
    for line in triggers.refused:
        logger.debug("memory pressure is not watched in %s", line)
    return triggers


def _floor_bytes(config: ServeConfig, dram_bytes: int) -> int:
    """What --dram-floor is in bytes."""
    if config.dram_floor_bytes is None:
        return int(dram_bytes * config.dram_floor_percent / 100)
    if config.dram_floor_bytes > dram_bytes:
        floor, dram = format_size(config.dram_floor_bytes), format_size(dram_bytes)
        raise UsageError(f"--dram-floor {floor} is above --dram {dram}; give a smaller one, or a percentage")
    return config.dram_floor_bytes


def _metrics(address: MetricsAddress, statistics: Statistics) -> AbstractContextManager[None]:
    from weightd import metrics  # prometheus_client takes memory that only those pay who want it

    if not address.loopback:
        logger.warning("whoever reaches %s:%d can read the metrics", address.host, address.port)
    return metrics.serving(address, statistics.now)


def _engine(config: ServeConfig, dram_bytes: int, data_socket: str, triggers: pressure.Triggers) -> Engine:
    try:
        with listening.private_sockets():
            engine = Engine(
                dram_bytes=dram_bytes,
                io_engine=config.io_engine,
                io_threads=config.io_threads,
                io_depth=config.io_depth,
                allow_buffered=config.allow_buffered,
                unbundled_reads=config.unbundled_reads,
                data_socket=data_socket,
                warms=not config.cold_start,
                dram_floor_bytes=_floor_bytes(config, dram_bytes),
                machine_pressure_fd=triggers.machine_fd,
                cgroup_pressure_fd=triggers.cgroup_fd,
            )
    except OSError as error:
        raise DeviceError(f"cannot start the engine: {error}; `weightd doctor` tells what the system allows") from error
    if engine.io_engine_note:
        logger.info("%s", engine.io_engine_note)
    return engine


def _frontend(config: ServeConfig, service: WeightdService, tls: TlsCredentials | None) -> Frontend:
    """The server, listening at every address but not yet answering."""
    server = grpc.aio.server(interceptors=[CallBounds()], maximum_concurrent_rpcs=CALLS_MAX, options=CHANNEL_OPTIONS)
    weightd_pb2_grpc.add_WeightdServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    for address in config.listen:
        try:
            _listen(server, address, tls)
        except RuntimeError as error:
            raise UsageError(f"cannot listen at {address.target}: {error}; choose another --listen") from error
    return Frontend(server, health_service)


def _listen(server: grpc.aio.Server, address: ListenAddress, tls: TlsCredentials | None) -> None:
    if address.socket_path is None and tls is not None:
        server.add_secure_port(address.target, tls.for_port())
        return
    with listening.private_sockets():
        server.add_insecure_port(address.target)


async def _identity_servers(config: ServeConfig, identities: Identities) -> list[asyncio.AbstractServer]:
    """Beside every Unix socket, one that tells who connects to it who it is."""
    loop = asyncio.get_running_loop()
    servers: list[asyncio.AbstractServer] = []
    for address in config.listen:
        if (path := listening.identity_socket(address)) is not None:
            with listening.private_sockets():
                servers.append(await loop.create_unix_server(lambda: IdentityProtocol(identities), path))
    return servers


def _remove_sockets(config: ServeConfig) -> None:
    for address in config.listen:
        for path in (address.socket_path, listening.identity_socket(address)):
            if path is not None:
                path.unlink(missing_ok=True)


def _say_started(config: ServeConfig, models: ServedModels, engine: Engine, dram_bytes: int) -> None:
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


async def _serve_until_told(
    config: ServeConfig, frontend: Frontend, started: Callable[[], None], told: asyncio.Event
) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    if config.owner_fd is not None:
        _watch_owner(loop, config.owner_fd, told)
    await frontend.server.start()
    for name in ("", SERVICE_NAME):
        await frontend.health.set(name, health_pb2.HealthCheckResponse.SERVING)
    started()
    notify(config.service_manager, "READY=1")
    await told.wait()
    logger.info("stopping")
    notify(config.service_manager, "STOPPING=1")
    await frontend.health.enter_graceful_shutdown()
    await frontend.server.stop(GRACE_S)


async def _remember_now_and_then(config: ServeConfig, models: ServedModels) -> None:
    pause_s = REMEMBER_FIRST_S
    while not config.cold_start:
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(models.remember)
        pause_s = min(2 * pause_s, REMEMBER_EVERY_S)


def _watch_engine(loop: asyncio.AbstractEventLoop, engine: Engine, told: asyncio.Event) -> None:
    def has_failed() -> None:
        loop.remove_reader(engine.failed_fd)
        told.set()

    loop.add_reader(engine.failed_fd, has_failed)


def _watch_owner(loop: asyncio.AbstractEventLoop, descriptor: int, told: asyncio.Event) -> None:
    def read() -> None:
        if not os.read(descriptor, 1):  # nothing but its end is expected
            loop.remove_reader(descriptor)
            told.set()

    try:
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        loop.add_reader(descriptor, read)
    except OSError as error:
        raise UsageError(f"--owner-fd {descriptor}: {error.strerror}; want the read end of a pipe") from error
