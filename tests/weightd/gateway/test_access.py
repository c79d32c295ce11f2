"""Access control: rules, identities, and how a real daemon treats users and certificates."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from daemon import Daemon, free_port, refused, serving
from repository import FIXTURES
from tiny_store import write_model

from flashclient.daemon.address import TlsOptions
from flashclient.daemon.channel import Connection
from weightd.errors import ForbiddenError, StoreError, UsageError
from weightd.gateway.access import Caller, may_read, parse_rules, require_publish
from weightd.gateway.identity import KEY_FILE, VALID_S, Identities, seconds_since_boot
from weightd_proto import weightd_pb2 as pb

NOBODY, OTHER, TEAM = 65534, 65533, 4242
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as another user")


def rules(*texts: str) -> Any:
    return parse_rules(texts, "--allow")


def user(number: int, *groups: int) -> Caller:
    return Caller(local=True, user_id=number, group_ids=frozenset(groups))


@pytest.mark.parametrize(
    ("caller", "model", "given", "expected"),
    [
        (user(7), "m", [], True),
        (Caller(local=True), "m", [], True),
        (user(7), "m", ["m=user:7"], True),
        (user(8), "m", ["m=user:7"], False),
        (user(8, 5), "m", ["m=user:7,group:5"], True),
        (user(8), "m", ["m=user:7", "m=user:8"], True),
        (user(8), "other", ["m=user:7"], True),
        (user(8), "other", ["m=user:7", "*=user:9"], False),
        (user(9), "m", ["m=user:7", "*=user:9"], False),  # `*` is for the models that no other rule names
        (Caller(local=True), "m", ["m=user:7"], False),
        (user(0), "m", ["m=user:7"], True),
        (user(os.geteuid()), "m", ["m=user:7"], True),
        (Caller(local=False, tls_names=frozenset({"a"})), "m", ["m=tls:a"], True),
        (Caller(local=False, tls_names=frozenset({"b"})), "m", ["m=tls:a"], False),
        (Caller(local=False), "m", ["m=user:0"], False),
    ],
)
def test_who_may_read(caller: Caller, model: str, given: list[str], expected: bool) -> None:
    assert may_read(caller, model, rules(*given)) == expected


def test_who_may_publish() -> None:
    remote = Caller(local=False, tls_names=frozenset({"trainer"}))
    require_publish(user(7), "m", (), ())
    require_publish(remote, "m", (), rules("m=tls:trainer"))
    with pytest.raises(ForbiddenError, match="Unix socket"):
        require_publish(remote, "m", (), ())
    with pytest.raises(ForbiddenError, match="allow-publish"):
        require_publish(user(7), "m", (), rules("m=user:8"))
    with pytest.raises(ForbiddenError, match="may not read"):
        require_publish(user(7), "m", rules("m=user:8"), rules("m=user:7"))


def test_names_are_looked_up() -> None:
    assert rules("m=user:nobody,group:root,user:5")[0].user_ids == {NOBODY, 5}
    assert rules("m=user:nobody,group:root")[0].group_ids == {0}


@pytest.mark.parametrize(
    "text",
    ["m", "m=", "=user:1", "m=user:", "m=robot:1", "m=1", "m=user:1,", "m=user:no-such-user", "m=group:99999999999"],
)
def test_a_wrong_rule_is_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        rules(text)
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


def test_an_identity_is_ours_and_fresh(tmp_path: Path) -> None:
    identities = Identities(tmp_path)
    shown = identities.issue(7, [5, 6])
    claim = Identities(tmp_path).check(shown)  # after a restart too
    assert claim is not None
    assert (claim.user_id, list(claim.group_ids)) == (7, [5, 6])
    assert identities.check(identities.issue(7, [], seconds_since_boot() - VALID_S - 1)) is None
    assert identities.check(b"nonsense") is None
    forged = pb.Identity.FromString(shown)
    forged.claim = pb.IdentityClaim(user_id=0, issued_boot_s=int(seconds_since_boot())).SerializeToString()
    assert identities.check(forged.SerializeToString()) is None
    (tmp_path / "other").mkdir()
    assert Identities(tmp_path / "other").check(shown) is None


def test_the_key_is_for_the_daemon_alone(tmp_path: Path) -> None:
    Identities(tmp_path)
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(StoreError, match=KEY_FILE):
        Identities(tmp_path)


@pytest.fixture
def store() -> Iterator[Path]:
    """A store in a folder that other users can reach, unlike pytest's folders."""
    folder = Path(tempfile.mkdtemp(prefix="weightd-access-"))
    folder.chmod(0o755)
    write_model(folder / "store", "secret")
    write_model(folder / "store", "shared")
    yield folder / "store"
    shutil.rmtree(folder)


def as_user(
    number: int, groups: list[int], *arguments: str, group: int = 0, prefix: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Runs stranger.py as that user. The daemon's group is 0 here; a user outside of it cannot connect."""
    who = [str(number), ",".join(map(str, [group, *groups]))]
    command = [*prefix, sys.executable, str(FIXTURES / "stranger.py"), *who, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def answers(answer: dict[str, Any]) -> dict[str, Any]:
    """The statuses of the four calls about one model."""
    return {name: answer[name] for name in ("describe", "fetch", "open", "publish")}


ALL_REFUSED = dict.fromkeys(("describe", "fetch", "open", "publish"), "PERMISSION_DENIED")
ALL_ALLOWED = {"describe": "OK", "fetch": "OK", "open": "OK", "publish": "FAILED_PRECONDITION"}  # an import of no one


@AS_ROOT
def test_a_user_without_a_rule_reads_all_that_has_none(store: Path) -> None:
    with serving(store, "--dram", "64MiB", "--allow", f"secret=user:{OTHER}") as daemon:
        answer = as_user(NOBODY, [], "calls", daemon.address, "secret")
        assert answer == {"listed": ["shared"], "counted": ["shared"]} | ALL_REFUSED
        assert answers(as_user(NOBODY, [], "calls", daemon.address, "shared")) == ALL_ALLOWED
        assert answers(as_user(OTHER, [], "calls", daemon.address, "secret")) == ALL_ALLOWED
        names = Connection(daemon.address, 10.0).stub.ListModels(pb.ListModelsRequest()).names
        assert list(names) == ["secret", "shared"]  # root


@AS_ROOT
def test_a_rule_by_supplementary_group(store: Path) -> None:
    with serving(store, "--dram", "64MiB", "--allow", f"secret=group:{TEAM}") as daemon:
        assert answers(as_user(NOBODY, [], "calls", daemon.address, "secret")) == ALL_REFUSED
        assert answers(as_user(NOBODY, [TEAM], "calls", daemon.address, "secret")) == ALL_ALLOWED


@AS_ROOT
def test_publishing_has_rules_of_its_own(store: Path) -> None:
    with serving(store, "--dram", "64MiB", "--allow-publish", f"*=user:{OTHER}") as daemon:
        denied = ALL_ALLOWED | {"publish": "PERMISSION_DENIED"}
        assert answers(as_user(NOBODY, [], "calls", daemon.address, "shared")) == denied
        assert answers(as_user(OTHER, [], "calls", daemon.address, "shared")) == ALL_ALLOWED


@AS_ROOT
def test_a_caller_that_shows_no_identity_reads_nothing_that_has_a_rule(store: Path) -> None:
    with serving(store, "--dram", "64MiB", "--allow", "secret=user:0") as daemon:
        assert list(daemon.stub.ListModels(pb.ListModelsRequest()).names) == ["shared"]
        with pytest.raises(grpc.RpcError) as caught:
            daemon.stub.DescribeModel(pb.DescribeModelRequest(name="secret"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@AS_ROOT
def test_a_session_token_is_of_no_use_to_another_user(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        connection = Connection(daemon.address, 10.0)
        stolen = connection.open_session(pb.Model(name="secret"), 4)
        answer = as_user(NOBODY, [], "attach", stolen.data_socket, stolen.token.hex())
        assert os.strerror(errno.EPERM) in answer["refused"]
        own = as_user(0, [], "attach", stolen.data_socket, stolen.token.hex())
        assert own == {"refused": ""}


@AS_ROOT
def test_a_client_of_another_container_attaches(store: Path) -> None:
    """The process number that it has there means nothing to the daemon."""
    with serving(store, "--dram", "64MiB") as daemon:
        connection = Connection(daemon.address, 10.0)
        opened = connection.open_session(pb.Model(name="shared"), 4)
        container = ("unshare", "--pid", "--fork")
        answer = as_user(0, [], "attach", opened.data_socket, opened.token.hex(), prefix=container)
        assert answer == {"refused": ""}
        assert as_user(0, [], "calls", daemon.address, "shared", prefix=container)["open"] == "OK"


@AS_ROOT
def test_a_user_outside_the_group_cannot_connect(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        for suffix in ("", ".data", ".peer"):
            answer = as_user(NOBODY, [], "connect", daemon.address, suffix, group=NOBODY)
            assert answer == {"errno": errno.EACCES}, suffix


@AS_ROOT
def test_no_client_can_change_what_others_read(store: Path) -> None:
    with serving(store, "--dram", "64MiB") as daemon:
        answer = as_user(NOBODY, [], "write", daemon.address, "shared")
        assert (answer["resident"], answer["segment"]) == ([], [])
        assert len(answer["own"]) >= 6, "the ways tried change nothing at all"


def test_a_certificate_reads_what_rules_name_it_for(store: Path, tmp_path: Path) -> None:
    authority, address = Authority(tmp_path), f"127.0.0.1:{free_port()}"
    server, known, other = authority.sign("server"), authority.sign("a", names=("a",)), authority.sign("b")
    tls = ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(authority.ca)]
    with serving(store, "--dram", "64MiB", "--listen", address, *tls, "--allow", "secret=tls:a"):
        for pair, expected in ((known, ["secret", "shared"]), (other, ["shared"])):
            connection = Connection(address, 10.0, TlsOptions(authority.ca, pair.cert, pair.key))
            assert list(connection.stub.ListModels(pb.ListModelsRequest()).names) == expected
            connection.close()


def listed(daemon: Daemon) -> list[str]:
    """The caller has no identity."""
    return list(daemon.stub.ListModels(pb.ListModelsRequest()).names)


def await_line(daemon: Daemon, words: str) -> str:
    assert daemon.process.stderr is not None
    for line in daemon.process.stderr:
        if words in line:
            return line
    raise AssertionError(f"weightd ended without saying {words!r}")


def test_rules_are_read_again_on_sighup_and_the_rest_is_named(store: Path) -> None:
    file = store.parent / "weightd.toml"
    file.write_text("io-threads = 8\n")
    with serving(store, "--dram", "64MiB", "--config", str(file)) as daemon:
        assert listed(daemon) == ["secret", "shared"]
        file.write_text('io-threads = 9\nallow = ["secret=user:5"]\n')
        daemon.process.send_signal(signal.SIGHUP)
        assert "next start" in await_line(daemon, "io-threads")
        await_line(daemon, "read again")
        assert listed(daemon) == ["shared"]


def test_a_mistake_in_the_file_changes_nothing(store: Path) -> None:
    file = store.parent / "weightd.toml"
    file.write_text('allow = ["secret=user:5"]\n')
    with serving(store, "--dram", "64MiB", "--config", str(file)) as daemon:
        file.write_text('allow = ["secret"]\n')
        daemon.process.send_signal(signal.SIGHUP)
        assert "'secret'" in await_line(daemon, "stays as it was")
        assert listed(daemon) == ["shared"]


def test_a_wrong_rule_is_refused_at_start(store: Path) -> None:
    status, message = refused(store, "--allow", "secret=user:no-such-user")
    assert (status, message.count("\n")) == (2, 1)
    assert "no-such-user" in message
