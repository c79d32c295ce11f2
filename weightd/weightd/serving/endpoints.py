"""All that clients connect to: the front, the gRPC server and health service behind it, and the identity sockets."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weightd.errors import UsageError
from weightd.gateway import listening
from weightd.gateway.addresses import ListenAddress
from weightd.gateway.front import Front, Listener
from weightd.gateway.identity import Identities, IdentityProtocol
from weightd.gateway.tls import TlsCredentials, names_of
from weightd.serving.call_bounds import CHANNEL_OPTIONS, SERVICE_NAME, CallBounds
from weightd.serving.config import ServeConfig
from weightd.serving.control_plane import ControlPlane
from weightd.serving.fetch import REQUEST_BYTES_MAX
from weightd_proto import weightd_pb2_grpc

logger = logging.getLogger("weightd")

GRACE_S = 5.0  # for running calls, when the daemon stops


class Endpoints:
    """Listens at every address from the start, and answers between start() and stop()."""

    def __init__(self, config: ServeConfig, control: ControlPlane, tls: TlsCredentials | None) -> None:
        """Raises UsageError if an address is taken or does not belong to this machine."""
        self._config = config
        self._identity_servers: list[asyncio.AbstractServer] = []  # they stop listening when they are freed
        options = CHANNEL_OPTIONS
        bounds = CallBounds(control.peer_of, control.hang_up)
        self._server = grpc.aio.server(interceptors=[bounds], options=options)
        weightd_pb2_grpc.add_WeightdServicer_to_server(control, self._server)  # type: ignore[no-untyped-call]
        self._health: Any = health.aio.HealthServicer()  # which types-grpcio lacks
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        self._inner = listening.Unnamed()
        self._server.add_insecure_port(self._inner.target)
        self._inner.hide()
        self._front = Front(self._inner.fd, REQUEST_BYTES_MAX)
        self._listeners = [listener for address in config.listen for listener in _listeners(address, tls)]

    async def start(self, identities: Identities) -> None:
        """Begins to answer."""
        await self._identify(identities)
        await self._server.start()
        identities.origins = self._front.origins
        self._front.start(self._listeners)
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Accepts no more calls, and ends those that still run after GRACE_S."""
        self._front.stop_accepting()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE_S)
        self._front.close()

    def close(self) -> None:
        """Closes the sockets."""
        for server in self._identity_servers:
            server.close()
        for listener in self._listeners:
            listener.socket.close()
        self._inner.close()

    async def _identify(self, identities: Identities) -> None:
        """Opens an identity socket beside every Unix socket."""
        loop = asyncio.get_running_loop()
        for address in self._config.listen:
            if (path := listening.identity_socket(address)) is not None:
                with listening.private_sockets():
                    server = await loop.create_unix_server(lambda: IdentityProtocol(identities), path)
                self._identity_servers.append(server)


def remove_sockets(config: ServeConfig) -> None:
    """Removes the files of the sockets."""
    for address in config.listen:
        for path in (address.socket_path, listening.identity_socket(address)):
            if path is not None:
                path.unlink(missing_ok=True)


def prepare_addresses(config: ServeConfig, tls: TlsCredentials | None) -> None:
    """Makes room for the sockets; raises UsageError or DeviceError as listening.prepare() does."""
    for address in config.listen:
        listening.prepare(address)
        if address.socket_path is None and tls is None:
            logger.warning("every user of this machine can read the models through %s", address.target)


def _listeners(address: ListenAddress, tls: TlsCredentials | None) -> list[Listener]:
    try:
        if address.socket_path is not None:
            with listening.private_sockets():
                return [Listener(listening.listen_at_path(str(address.socket_path)), None)]
        sockets = listening.listen_at_port(address.host.strip("[]"), address.port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"cannot listen at {address.target}: {reason}; choose another --listen") from error
    if tls is None:
        return [Listener(each, None) for each in sockets]
    return [Listener(each, tls.context, names_of) for each in sockets]
