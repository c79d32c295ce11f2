"""Access control: rules per model, and the callers that they apply to.

A rule is `MODEL=WHO[,WHO]...`. WHO is user:NAME or user:UID, group:NAME or group:GID (of this machine, over the Unix
socket), or tls:NAME (a subject alternative name of the client's certificate, or its common name where it has none).
MODEL is a name, or `*` for all models that no other rule names. Several rules of one model add up.

A model without an --allow rule may be read by all who can connect. Over the Unix socket these are the daemon's user and
group, because of the socket's mode. Over TCP the certificates decide who can. Root and the daemon's own user may do
everything over the Unix socket. Without an --allow-publish rule, Unix-socket callers that may read the model may also
publish.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightd.errors import ForbiddenError, UsageError
from weightd_proto.tables import model_of

ANY_MODEL = "*"
ID_MAX = (1 << 32) - 2  # -1 means "no one" to the kernel


@dataclass(frozen=True)
class Rule:
    """One value of --allow: these users, groups and certificates may access `model`."""

    model: str
    user_ids: frozenset[int] = frozenset()
    group_ids: frozenset[int] = frozenset()
    tls_names: frozenset[str] = frozenset()


Rules = tuple[Rule, ...]


@dataclass(frozen=True)
class Caller:
    """Who makes a call: only what the kernel or TLS has proven."""

    local: bool  # over a Unix socket
    user_id: int | None = None  # None: the call came without an identity
    group_ids: frozenset[int] = frozenset()
    tls_names: frozenset[str] = frozenset()

    @property
    def trusted(self) -> bool:
        return self.user_id is not None and self.user_id in (0, os.geteuid())

    def __str__(self) -> str:
        if self.user_id is not None:
            return f"user {self.user_id}"
        if self.tls_names:
            return f"tls:{', '.join(sorted(self.tls_names))}"
        return "a caller without an identity"


def parse_rules(texts: Sequence[str], flag: str) -> Rules:
    """The rules of `flag`; raises UsageError, naming the rule and the part that is wrong."""
    return tuple(_parse_rule(text, flag) for text in texts)


def may_read(caller: Caller, model: str, allow: Rules) -> bool:
    """Whether `caller` may see and read `model`, which is also the name of a table: the rules are its model's."""
    rules = _rules_of(model_of(model), allow)
    return caller.trusted or not rules or any(_fits(caller, rule) for rule in rules)


def require_read(caller: Caller, model: str, allow: Rules) -> None:
    """Raises ForbiddenError unless `caller` may read `model`."""
    if not may_read(caller, model, allow):
        raise ForbiddenError(
            f"{caller} may not read model {model!r}: ask for a rule, --allow {model_of(model)}={_wanted(caller)}"
        )


def require_trusted(caller: Caller, wanted: str) -> None:
    """Raises ForbiddenError unless `caller` is root or the daemon's own user. `wanted`: what it asked for."""
    if not caller.trusted:
        raise ForbiddenError(f"{caller} may not {wanted}: only root and weightd's own user may, over the Unix socket")


def require_publish(caller: Caller, model: str, allow: Rules, allow_publish: Rules) -> None:
    """Raises ForbiddenError unless `caller` may read `model` and publish calibrations of it."""
    require_read(caller, model, allow)
    rules = _rules_of(model, allow_publish)
    if caller.trusted or (any(_fits(caller, rule) for rule in rules) if rules else caller.local):
        return
    raise ForbiddenError(
        f"{caller} may not publish calibrations of model {model!r}: publish through the Unix socket, or ask for a "
        f"rule, --allow-publish {model}={_wanted(caller)}"
    )


def _wanted(caller: Caller) -> str:
    if caller.tls_names:
        return f"tls:{min(caller.tls_names)}"
    return "tls:NAME" if not caller.local else f"user:{'NAME' if caller.user_id is None else caller.user_id}"


def _rules_of(model: str, rules: Rules) -> list[Rule]:
    own = [rule for rule in rules if rule.model == model]
    return own or [rule for rule in rules if rule.model == ANY_MODEL]


def _fits(caller: Caller, rule: Rule) -> bool:
    return (
        caller.user_id in rule.user_ids
        or not caller.group_ids.isdisjoint(rule.group_ids)
        or not caller.tls_names.isdisjoint(rule.tls_names)
    )


def _parse_rule(text: str, flag: str) -> Rule:
    model, separator, whole = text.partition("=")
    if not separator or not model or not whole:
        raise UsageError(f"{flag} {text!r}: want MODEL=WHO[,WHO]..., such as opt-1.3b=group:research,user:1000")
    found: dict[str, set[str]] = {"user": set(), "group": set(), "tls": set()}
    for who in whole.split(","):
        kind, _, name = who.strip().partition(":")
        if kind not in found or not name:
            raise UsageError(f"{flag} {text!r}: {who.strip()!r} is not user:NAME, group:NAME or tls:NAME")
        found[kind].add(name)
    return Rule(
        model,
        frozenset(_number(name, _user_id, f"{flag} {text!r}: no user") for name in found["user"]),
        frozenset(_number(name, _group_id, f"{flag} {text!r}: no group") for name in found["group"]),
        frozenset(found["tls"]),
    )


def _user_id(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _group_id(name: str) -> int:
    return grp.getgrnam(name).gr_gid


def _number(name: str, look_up: Callable[[str], int], unknown: str) -> int:
    try:
        number = int(name) if name.isdecimal() else look_up(name)
    except KeyError:
        raise UsageError(f"{unknown} {name!r} on this machine; give its number if it is elsewhere") from None
    if number > ID_MAX:
        raise UsageError(f"{unknown} {name!r}: numbers end at {ID_MAX}")
    return number
