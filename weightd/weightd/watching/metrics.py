"""`--metrics HOST:PORT`: the daemon's metrics for Prometheus, over HTTP.

prometheus_client formats the text; metric_table.py names the metrics. Concurrent requests and the time of each are
bounded: connections above the bound, and silent ones, are closed.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from weightd import _native
from weightd.errors import UsageError
from weightd.gateway.addresses import MetricsAddress
from weightd.watching.metric_table import COUNTER, GAUGE, METRICS, Buckets, Metric
from weightd_proto.weightd_pb2 import StatsResponse

SCRAPES_MAX = 4  # at once; one Prometheus makes one
SILENCE_S = 5.0  # after which a silent connection is closed

Answer = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class StatisticsCollector(Collector):
    """Makes all METRICS of a scrape from one StatsResponse."""

    def __init__(self, statistics: Callable[[], StatsResponse]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Family]:
        stats = self._statistics()
        for metric in METRICS:
            yield family_of(metric, stats)


def family_of(metric: Metric, stats: StatsResponse) -> Family:
    """One metric with all its samples, in the form that prometheus_client prints."""
    if metric.kind in (COUNTER, GAUGE):
        kind = CounterMetricFamily if metric.kind == COUNTER else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=metric.labels)
        for labels, value in metric.samples(stats):
            assert not isinstance(value, Buckets)
            family.add_metric(labels, value)
        return family
    histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in metric.samples(stats):
        assert isinstance(value, Buckets)
        bounds = [*map(str, value.bounds_s), "+Inf"]
        histogram.add_metric(labels, list(zip(bounds, accumulate(value.counts), strict=True)), value.sum_s)
    return histogram


@contextmanager
def serving(address: MetricsAddress, statistics: Callable[[], StatsResponse]) -> Iterator[None]:
    """Answers GET /metrics at `address` in its own threads. Raises UsageError if the address cannot be used."""
    registry = CollectorRegistry()
    registry.register(StatisticsCollector(statistics))
    ProcessCollector(registry=registry)
    server_class = _Server if ":" not in address.host else _ServerV6
    try:
        server = server_class((address.host, address.port), _Handler)
    except OSError as error:
        raise UsageError(
            f"cannot serve metrics at {address.host}:{address.port}: {(error.strerror or str(error)).lower()}; "
            "choose another --metrics"
        ) from error
    server.set_app(_until_stopping(make_wsgi_app(registry)))
    thread = threading.Thread(target=server.serve_forever, name="weightd-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _until_stopping(app: Any) -> Answer:
    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environment["PATH_INFO"] not in ("/metrics", "/"):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"the metrics are at /metrics\n"]
        try:
            return list(app(environment, start_response))
        except _native.Stopping:
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"weightd is stopping\n"]

    return answer


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing, because Prometheus asks every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a silent peer does not delay the daemon's end

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(SCRAPES_MAX)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Like HTTPServer's, but without a lookup of this host's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs nothing: a peer that disconnects or stays silent is not an error of the daemon."""


class _ServerV6(_Server):
    address_family = socket.AF_INET6
