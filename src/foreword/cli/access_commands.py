"""The commands over who may call what, and what was done: tenant, key, grant, withdraw, audit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foreword.cli.options import Home, Json
from foreword.cli.output import print_json, print_table
from foreword.cli.registry_commands import Who, open_registry, say
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.registry.access_records import Key, Limits

_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent", "max_prompt_tokens", "max_new_tokens")


def _limit(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", help=f"{what}; none: no limit.", metavar="N", show_default=False)


PerMinute = Annotated[str | None, _limit("requests-per-minute", "Requests per minute")]
TokensPerMinute = Annotated[str | None, _limit("tokens-per-minute", "Tokens per minute, those of prompts included")]
Concurrent = Annotated[str | None, _limit("concurrent", "Requests at once")]
MaxPrompt = Annotated[str | None, _limit("max-prompt-tokens", "Tokens of a prompt")]
MaxNew = Annotated[str | None, _limit("max-new-tokens", "Tokens of an answer")]
TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's name.", show_default=False)]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's first part: fw_….", show_default=False)]
RightName = Annotated[Literal["call", "manage"], typer.Option("--right", help="What the tenant may do.")]
GrantTask = Annotated[str, typer.Argument(metavar="TASK", help="A task's name; '*' for all.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`: two groups, the others at its top level."""
    groups = {
        "tenant": ("Tenants and their limits.", tenant_create, tenant_list, tenant_show, tenant_limits),
        "key": ("API keys.", key_create, key_list, key_rotate, key_revoke),
    }
    for name, (help_, *commands) in groups.items():
        group = typer.Typer(name=name, help=help_, no_args_is_help=True, rich_markup_mode=None)
        for command in (*commands, *((tenant_disable, tenant_enable, tenant_delete) if name == "tenant" else ())):
            group.command(command.__name__.partition("_")[2])(command)
        app.add_typer(group)
    for command in (grant, withdraw, audit):
        app.command(command.__name__)(command)


def tenant_create(
    name: TenantName,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    max_prompt_tokens: MaxPrompt = None,
    max_new_tokens: MaxNew = None,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Create a tenant, which may do nothing until `foreword grant` lets it.

    Example: foreword tenant create shop --requests-per-minute 600 --concurrent 8
    """
    given = (requests_per_minute, tokens_per_minute, concurrent, max_prompt_tokens, max_new_tokens)
    limits = _changed_limits(None, given)
    with open_registry(home) as registry:
        tenant = registry.access.create_tenant(name, limits=limits, who=who)
    _print(tenant.to_json(), as_json, f"created the tenant {name}: {_limits(limits)}")


def tenant_list(home: Home = None, as_json: Json = False) -> None:
    """List the tenants.

    Example: foreword tenant list
    """
    with open_registry(home) as registry:
        tenants = registry.access.tenants()
    if as_json:
        print_json([tenant.to_json() for tenant in tenants])
    elif not tenants:
        say("no tenants yet; `foreword tenant create NAME` makes the first")
    else:
        rows = [(t.name, "disabled" if t.disabled else None, _limits(t.limits), _minute(t.created)) for t in tenants]
        print_table(("tenant", "", "limits", "created (UTC)"), rows, whole=["tenant", "created (UTC)"])


def tenant_show(name: TenantName, home: Home = None, as_json: Json = False) -> None:
    """Show a tenant: its limits, its keys, what it may call and manage.

    Example: foreword tenant show shop
    """
    with open_registry(home) as registry:
        keys, snapshot = registry.access.keys(name), registry.access.snapshot()
    tenant, grants = snapshot.tenants[name], snapshot.grants.get(name, ())
    if as_json:
        data = {"keys": [key.to_json() for key in keys], "grants": [grant.to_json() for grant in grants]}
        print_json(tenant.to_json() | data)
        return
    say(f"{name}{' (disabled)' if tenant.disabled else ''}: {_limits(tenant.limits)}")
    say("may " + (", ".join(f"{grant.right} {grant.task}" for grant in grants) or "do nothing"))
    _print_keys(keys, snapshot.now)


def tenant_limits(
    name: TenantName,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    max_prompt_tokens: MaxPrompt = None,
    max_new_tokens: MaxNew = None,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Change those of a tenant's limits that are given.

    Example: foreword tenant limits shop --concurrent 16 --tokens-per-minute none
    """
    given = (requests_per_minute, tokens_per_minute, concurrent, max_prompt_tokens, max_new_tokens)
    with open_registry(home) as registry:
        old = next((tenant.limits for tenant in registry.access.tenants() if tenant.name == name), None)
        tenant = registry.access.set_limits(name, _changed_limits(old, given), who=who)
    _print(tenant.to_json(), as_json, f"{name}: {_limits(tenant.limits)}")


def tenant_disable(name: TenantName, who: Who = None, home: Home = None, as_json: Json = False) -> None:
    """Refuse a tenant's keys until it is enabled again.

    Example: foreword tenant disable shop
    """
    with open_registry(home) as registry:
        _print(registry.access.set_disabled(name, True, who=who).to_json(), as_json, f"disabled {name}")


def tenant_enable(name: TenantName, who: Who = None, home: Home = None, as_json: Json = False) -> None:
    """Take a tenant's keys again.

    Example: foreword tenant enable shop
    """
    with open_registry(home) as registry:
        _print(registry.access.set_disabled(name, False, who=who).to_json(), as_json, f"enabled {name}")


def tenant_delete(name: TenantName, who: Who = None, home: Home = None, as_json: Json = False) -> None:
    """Delete a tenant with its grants, and revoke its keys for good.

    Example: foreword tenant delete shop
    """
    with open_registry(home) as registry:
        registry.access.delete_tenant(name, who=who)
    _print({"deleted": name}, as_json, f"deleted {name}; its keys are revoked")


def key_create(
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Whose it is.", show_default=False)] = None,
    admin: Annotated[bool, typer.Option("--admin", help="A platform admin's, of no tenant.")] = False,
    name: Annotated[str, typer.Option("--name", help="What it is for.", show_default=False)] = "",
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="90d", help="Its time to live: s, m, h or d.", show_default=False)
    ] = None,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it, this once, alone on standard output.

    Example: foreword key create shop --name ci --expires 90d
    """
    if (tenant is None) != admin:
        raise ConfigError(
            "whose key is it?" if tenant is None else f"a key of {tenant} is no admin's", hint="Give TENANT or --admin."
        )
    ends = None if expires is None else datetime.now(UTC) + _duration(expires)
    with open_registry(home) as registry:
        key, plaintext = registry.access.create_key(tenant, name=name, expires=ends, who=who)
    _print_secret(key, plaintext, as_json)


def key_list(
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Only its keys.", show_default=False)] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Only the platform admins' keys.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the keys, without their secrets.

    Example: foreword key list shop
    """
    with open_registry(home) as registry:
        keys = registry.access.keys(tenant if tenant is not None else None if admin else ...)
    if as_json:
        print_json([key.to_json() for key in keys])
    else:
        _print_keys(keys, datetime.now(UTC))


def key_rotate(
    id: KeyId,
    grace: Annotated[str | None, typer.Option("--grace", metavar="1h", help="How long the old one stays good.")] = None,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Create a key's successor and print it, this once; the old key ends now, or after --grace.

    Example: foreword key rotate fw_abcdefghij --grace 24h
    """
    grace_s = _duration(grace).total_seconds() if grace else 0.0
    with open_registry(home) as registry:
        key, plaintext = registry.access.rotate_key(id, grace_s=grace_s, who=who)
    _print_secret(key, plaintext, as_json)


def key_revoke(id: KeyId, who: Who = None, home: Home = None, as_json: Json = False) -> None:
    """End a key now, for good.

    Example: foreword key revoke fw_abcdefghij
    """
    with open_registry(home) as registry:
        key = registry.access.revoke_key(id, who=who)
    _print(key.to_json(), as_json, f"revoked {id}; gateways refuse it within a second")


def grant(
    tenant: TenantName,
    task: GrantTask,
    right: RightName = "call",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let a tenant call a task, or manage it; the task need not be published yet.

    Example: foreword grant shop triage --right call
    """
    with open_registry(home) as registry:
        given = registry.access.grant(tenant, task, right, who=who)
    _print(given.to_json(), as_json, f"{tenant} may {right} {task}")


def withdraw(
    tenant: TenantName,
    task: GrantTask,
    right: RightName = "call",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take back what was granted.

    Example: foreword withdraw shop triage --right call
    """
    with open_registry(home) as registry:
        registry.access.withdraw(tenant, task, right, who=who)
    _print({"withdrawn": {"tenant": tenant, "task": task, "right": right}}, as_json, f"{tenant} may not {right} {task}")


def audit(
    limit: Annotated[int, typer.Option("--limit", help="How many.")] = 100,
    action: Annotated[str | None, typer.Option("--action", help="As key.revoke.", show_default=False)] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="As shop or triage@prod.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show who did what, newest first.

    Example: foreword audit --limit 20
    """
    with open_registry(home) as registry:
        entries = registry.access.audit(limit=limit, action=action, subject=subject)
    if as_json:
        print_json([entry.to_json() for entry in entries])
        return
    rows = [
        (f"{entry.when:%Y-%m-%d %H:%M:%S}", entry.who, entry.action, entry.subject, _details(entry.details.items()))
        for entry in entries
    ]
    print_table(("when (UTC)", "who", "action", "on", "details"), rows, whole=["when (UTC)"])


def _print_secret(key: Key, plaintext: str, as_json: bool) -> None:
    if as_json:
        print_json({"key": key.to_json(), "plaintext": plaintext})
        return
    print(plaintext)
    whose = f"of {key.tenant}" if key.tenant else "of a platform admin"
    until = f", good until {_minute(key.expires)} UTC" if key.expires else ""
    print(f"The key {key.id} {whose}{until}. Store it now: it is shown this once.", file=sys.stderr)


def _print_keys(keys: list[Key], now: datetime) -> None:
    if not keys:
        say("no keys")
        return
    rows = []
    for key in keys:
        state = "live" if key.is_live(now) else "revoked" if key.revoked else "expired"
        ends = key.revoked or key.expires
        rows.append((key.id, key.tenant or "(admin)", key.name, state, _minute(key.created), ends and _minute(ends)))
    print_table(("key", "tenant", "name", "state", "created (UTC)", "ends (UTC)"), rows, whole=["key", "created (UTC)"])


def _print(data: Any, as_json: bool, text: str) -> None:
    if as_json:
        print_json(data)
    else:
        say(text)


def _changed_limits(old: Limits | None, given: Iterable[str | None]) -> Limits:
    from foreword.registry.access_records import Limits

    fields: dict[str, int | None] = {} if old is None else dict(old.to_json())
    for name, text in zip(_LIMITS, given, strict=True):
        if text is not None:
            if text != "none" and not (text.isascii() and text.isdigit()):
                raise ConfigError(f"{name} is {text!r}", hint="Give a whole number, or none for no limit.")
            fields[name] = None if text == "none" else int(text)
    return Limits(**fields)


def _limits(limits: Limits) -> str:
    return _details((name, value) for name, value in limits.to_json().items() if value is not None) or "no limits"


def _details(items: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in items if value not in (None, "", False))


def _duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no duration", hint="Give a number and s, m, h or d, as 90d.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _minute(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"
