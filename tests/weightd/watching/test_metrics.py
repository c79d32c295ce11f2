"""`--metrics`: the text that Prometheus reads, and the refusals."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, refused, serving
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from tiny_store import TinyModel, write_model

from weightd.watching import metrics
from weightd.watching.metric_table import COUNTER, HISTOGRAM, METRICS
from weightd_proto import weightd_pb2 as pb

ODD_NAME = 'a "quoted"\n\\ name'


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def model(store: Path) -> TinyModel:
    return write_model(store, neurons=4000)


@pytest.fixture
def daemon(store: Path, model: TinyModel, port: int) -> Iterator[Daemon]:
    with serving(store, "--dram", "64MiB", "--metrics", f"127.0.0.1:{port}") as started:
        yield started


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def fetch(daemon: Daemon, layer: int, begin: int, end: int) -> None:
    wanted = pb.NeuronSet(layer=layer, positions=[pb.Range(begin=begin, end=end)])
    list(daemon.stub.Fetch(pb.FetchRequest(model="tiny", bundles=wanted)))


def test_they_are_what_stats_says(daemon: Daemon, port: int) -> None:
    daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny"))
    fetch(daemon, 0, 0, 100)
    fetch(daemon, 0, 50, 150)
    stats = daemon.stub.Stats(pb.StatsRequest())
    (model,) = stats.models
    assert model.hits > 0
    assert model.misses > 0
    found = samples(scrape(port))

    def value(name: str, **labels: str) -> float:
        (sample,) = [sample for sample in found[name] if sample.labels == labels]
        return sample.value

    assert value("weightd_cell_hits_total", model="tiny") == model.hits
    assert value("weightd_cell_misses_total", model="tiny") == model.misses
    assert value("weightd_reads_total", model="tiny") == model.reads
    assert value("weightd_read_bytes_total", model="tiny") == model.read_bytes
    assert value("weightd_reading_seconds_total", model="tiny") == model.reading_s > 0
    assert value("weightd_sessions", model="tiny") == 1
    assert value("weightd_dram_limit_bytes") == 64 << 20
    assert value("weightd_dram_bytes", kind="pool") == stats.dram_pool_bytes > 0
    assert value("weightd_dram_bytes", kind="resident") == stats.dram_resident_bytes > 0
    assert value("weightd_dram_bytes", kind="tables") == stats.dram_tables_bytes > 0
    assert value("weightd_reads_in_flight_max") == stats.read_queue.in_flight_max > 0
    assert value("process_open_fds") > 10


def test_each_metric_of_the_table_is_there_with_its_help_and_unit(daemon: Daemon, port: int) -> None:
    fetch(daemon, 0, 0, 10)
    text = scrape(port)
    for metric in METRICS:
        assert f"# HELP {metric.name} " in text, metric.name
        assert f"# TYPE {metric.name} {metric.kind}" in text, metric.name
        assert metric.name.startswith("weightd_")
        assert metric.name.endswith("_total") == (metric.kind == COUNTER), metric.name
        assert metric.help.endswith("."), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)


# Fields without a metric of their own: texts, parts of a metric that metric_table.py makes, and what other fields say.
NO_METRIC = {
    "name", "io_engine", "sessions", "uptime_s", "watched", "models", "attached", "read_queue", "memory_pressure",
    "dram_pool_bytes", "dram_resident_bytes", "dram_tables_bytes", "device_sequential_gb_per_s",
    "read_latency_bounds_s", "read_latency_counts", "read_latency_sum_s", "region_reads",
}  # fmt: skip


@pytest.mark.parametrize("message", [pb.StatsResponse, pb.ReadQueue, pb.MemoryPressure, pb.ModelStats])
def test_every_number_of_stats_is_a_metric(message: type[Message]) -> None:
    served = {metric.name for metric in METRICS}
    for field in message.DESCRIPTOR.fields:
        option: pb.Metric = field.GetOptions().Extensions[pb.metric]  # type: ignore[index]
        assert option.name in served or field.name in NO_METRIC, field.full_name


def test_the_latency_histogram_and_the_regions_sum_up_to_the_reads(daemon: Daemon, port: int, model: TinyModel) -> None:
    for begin in range(0, 4000, 400):
        fetch(daemon, 1, begin, begin + 8)
    (stats,) = daemon.stub.Stats(pb.StatsRequest()).models
    found = samples(scrape(port))
    buckets = found["weightd_read_latency_seconds_bucket"]
    assert [float(bucket.labels["le"]) for bucket in buckets][:3] == [8e-6, 16e-6, 32e-6]
    counts = [bucket.value for bucket in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == stats.reads
    assert 0 < found["weightd_read_latency_seconds_sum"][0].value <= stats.reading_s
    regions = {int(sample.labels["region"]): sample.value for sample in found["weightd_region_reads_total"]}
    assert len(regions) == 64
    assert sum(regions.values()) == stats.reads
    assert not any(regions[region] for region in range(32)), "layer 0 fills the first half of the file"
    assert sum(count > 0 for region, count in regions.items()) >= 10


def test_a_latency_lies_between_zero_and_the_time_of_the_test(daemon: Daemon) -> None:
    fetch(daemon, 0, 0, 4)
    stats = daemon.stub.Stats(pb.StatsRequest())
    (model,) = stats.models
    assert sum(model.read_latency_counts) == model.reads == 1
    assert 0 < model.read_latency_sum_s <= stats.uptime_s
    (bucket,) = [index for index, count in enumerate(model.read_latency_counts) if count]
    bounds_s = [0.0, *stats.read_latency_bounds_s, float("inf")]
    assert bounds_s[bucket] < model.read_latency_sum_s <= bounds_s[bucket + 1]


def test_corruption_is_counted(daemon: Daemon, store: Path, port: int) -> None:
    with (store / "tiny" / "bundles.bin").open("r+b") as file:
        file.write(b"\xff\x00\xff")
    with pytest.raises(Exception, match="neuron 0"):
        fetch(daemon, 0, 0, 1)
    assert samples(scrape(port))["weightd_verify_errors_total"][0].value == 1


def test_names_never_break_lines() -> None:
    registry = CollectorRegistry()
    stats = pb.StatsResponse(models=[pb.ModelStats(name=ODD_NAME, read_latency_counts=[1])])
    registry.register(metrics.StatisticsCollector(lambda: stats))
    found = samples(generate_latest(registry).decode())
    assert found["weightd_slots"][0].labels["model"] == ODD_NAME


def test_other_paths_and_methods(daemon: Daemon, port: int) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scrape(port, "/secrets")
    posted = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(posted, timeout=30)


def test_a_taken_port_is_one_line_and_nothing_is_left(store: Path, model: TinyModel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "127.0.0.1:" + str(taken.getsockname()[1])
        status, message = refused(store, "--listen", f"unix:{store}.sock", "--metrics", address, "--dram", "64MiB")
    assert (status, message.count("\n")) == (2, 1), message
    assert all(word in message for word in (address, "in use", "--metrics")), message
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_silent_peers_are_bounded_and_do_not_delay_the_end(daemon: Daemon, port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(metrics.SCRAPES_MAX)]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one_more:
        assert one_more.recv(1) == b"", "hung up on"
    threads = Path(f"/proc/{daemon.process.pid}/task")
    names = [(task / "comm").read_text() for task in threads.iterdir()]
    assert len(names) < 64
    for peer in silent:
        peer.close()
    silent = [socket.create_connection(("127.0.0.1", port))]
    status, log = daemon.stop()
    assert (status, "Traceback" in log) == (0, False), log
    silent[0].close()


def test_a_word_of_warning_beyond_this_machine(store: Path, model: TinyModel, port: int) -> None:
    with serving(store, "--dram", "64MiB", "--metrics", f"0.0.0.0:{port}") as daemon:
        assert "weightd_info" in scrape(port)
        _, log = daemon.stop()
    assert re.search(r"warning: everybody who can connect to 0\.0\.0\.0:\d+ can read the metrics", log), log


def test_the_loopback_of_ipv6(store: Path, model: TinyModel, port: int) -> None:
    with (
        serving(store, "--dram", "64MiB", "--metrics", f"[::1]:{port}"),
        urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=30) as answer,
    ):
        assert b"weightd_info" in answer.read()


def test_histograms_are_named_for_their_unit() -> None:
    assert [metric.name for metric in METRICS if metric.kind == HISTOGRAM] == ["weightd_read_latency_seconds"]
