"""`weightd --store DIR`: from the configuration to a serving process, and back to nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weightd import budget, listening
from weightd._native import Engine
from weightd.call_bounds import CALLS_MAX, SERVICE_NAME, CallBounds
from weightd.config import ServeConfig, load_config
from weightd.errors import DeviceError, StoreError, UsageError, WeightdError
from weightd.fetch import REQUEST_BYTES_MAX, Fetcher
from weightd.profile import sequential_gb_per_s
from weightd.served_models import ServedModels, demand_of
from weightd.server import WeightdService
from weightd.sizes import format_size
from weightd.store import Store
from weightd_proto import weightd_pb2_grpc

logger = logging.getLogger("weightd")

GRACE_S = 5.0  # for running calls, when we are told to stop


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM, SIGINT or the owner's end. Raises WeightdError for bad input; the command prints it."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="weightd: %(message)s")
    uvloop.run(serve(load_config(arguments)))
    return 0


async def serve(config: ServeConfig) -> None:
    """Claims the store, opens the engine, listens, and waits for the end."""
    _raise_descriptor_limit()
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(config.store, readonly=True))
        dram_bytes = _dram_bytes(config, store)
        store.claim(config.listen[0].target)
        for address in config.listen:
            listening.prepare(address)
            if address.socket_path is None:
                logger.warning("every user of this machine can read the models through %s", address.target)
        data_socket = str(stack.enter_context(listening.data_socket(config.listen)))
        engine = _engine(config, dram_bytes, data_socket)
        stack.callback(engine.close)
        models = ServedModels(store, engine, config.unbundled_reads)
        _open_models(models)
        fetcher = Fetcher(store, models, engine)
        service = WeightdService(models, fetcher, engine, data_socket, dram_bytes, sequential_gb_per_s(store))
        stack.callback(service.close)
        frontend = _frontend(config, service)
        stack.callback(_remove_sockets, config)
        told = asyncio.Event()
        _watch_engine(asyncio.get_running_loop(), engine, told)
        await _serve_until_told(config, frontend, _startup_line(config, models, engine, dram_bytes), told)
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


def _engine(config: ServeConfig, dram_bytes: int, data_socket: str) -> Engine:
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
            )
    except OSError as error:
        raise DeviceError(f"cannot start the engine: {error}; `weightd doctor` tells what the system allows") from error
    if engine.io_engine_note:
        logger.info("%s", engine.io_engine_note)
    return engine


def _open_models(models: ServedModels) -> None:
    """Opens those that can be: a damaged one takes none of the others with it. Raises if there is none."""
    failed: list[WeightdError] = []
    names = models.names()
    for name in names:
        try:
            models.find(name)
        except (StoreError, DeviceError) as error:
            failed.append(error)
    if failed and len(failed) == len(names):
        raise failed[0]
    for refusal in failed:
        logger.error("%s", refusal)


def _frontend(config: ServeConfig, service: WeightdService) -> Frontend:
    """The server, listening at every address but not yet answering."""
    # Without so_reuseport=0 two daemons could share a TCP port, each getting some of the calls.
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", REQUEST_BYTES_MAX)]
    server = grpc.aio.server(interceptors=[CallBounds()], maximum_concurrent_rpcs=CALLS_MAX, options=options)
    weightd_pb2_grpc.add_WeightdServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    for address in config.listen:
        try:
            with listening.private_sockets():
                server.add_insecure_port(address.target)
        except RuntimeError as error:
            raise UsageError(f"cannot listen at {address.target}: {error}; choose another --listen") from error
    return Frontend(server, health_service)


def _remove_sockets(config: ServeConfig) -> None:
    for address in config.listen:
        if address.socket_path is not None:
            address.socket_path.unlink(missing_ok=True)


def _startup_line(config: ServeConfig, models: ServedModels, engine: Engine, dram_bytes: int) -> str:
    names = ", ".join(models.names()) or "no models yet"
    addresses = ", ".join(address.target for address in config.listen)
    return f"serving {config.store} ({names}) with --dram {format_size(dram_bytes)}, {engine.io_engine}, at {addresses}"


async def _serve_until_told(config: ServeConfig, frontend: Frontend, startup_line: str, told: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    if config.owner_fd is not None:
        _watch_owner(loop, config.owner_fd, told)
    await frontend.server.start()
    for name in ("", SERVICE_NAME):
        await frontend.health.set(name, health_pb2.HealthCheckResponse.SERVING)
    logger.info("%s", startup_line)
    await told.wait()
    logger.info("stopping")
    await frontend.health.enter_graceful_shutdown()
    await frontend.server.stop(GRACE_S)


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
