"""Notifications over a real socket: in order, retried within bounds, never twice, never the whole URL in a log."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from webhook_server import HANG_UP, WebhookServer

from sosa_stream.daemon import webhook
from sosa_stream.daemon.notify import Happening, Notification
from sosa_stream.daemon.webhook import Outcome, Webhook
from sosa_stream.plain import WebhookUrl
from sosa_stream.testing import incident

SLOW = 5.0


class Memory:
    """A store that forgets with the test."""

    def __init__(self) -> None:
        self.settled: dict[tuple[str, str, str], str] = {}

    async def was_notified(self, notification: Notification, target: str) -> bool:
        return (notification.incident.id, str(notification.event), target) in self.settled

    async def note_notified(self, notification: Notification, target: str, outcome: str) -> None:
        self.settled[notification.incident.id, str(notification.event), target] = outcome


@pytest.fixture(autouse=True)
def _quick_and_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "FIRST_PAUSE_SECONDS", 0.01)
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


def notification(number: int = 1, *, age_seconds: float = 0.0) -> Notification:
    return Notification(event=Happening.OPENED, incident=incident(id=f"i{number}"), at=time.time() - age_seconds)


def posting(
    url: str,
    act: Callable[[Webhook], Awaitable[None] | None],
    memory: Memory | None = None,
    on_lost: Callable[[str], None] = lambda text: None,
) -> dict[Outcome, int]:
    """Run a webhook, ``act`` on it, close it; its counts."""

    async def run() -> dict[Outcome, int]:
        hook = Webhook(WebhookUrl(url), memory or Memory(), on_lost)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hook.run())
            await asyncio.sleep(0)
            done = act(hook)
            if done is not None:
                await done
            hook.close()
        return dict(hook.counts)

    return asyncio.run(run())


def offer(hook: Webhook, *numbers: int) -> None:
    for number in numbers:
        hook.offer(notification(number))


async def settled(hook: Webhook, number: int) -> None:
    deadline = time.monotonic() + SLOW
    while hook.counts.total() < number:
        assert time.monotonic() < deadline, hook.counts
        await asyncio.sleep(0.005)


def test_what_is_offered_is_posted_as_json_in_order_before_the_end() -> None:
    with WebhookServer() as server:
        counts = posting(server.url, lambda hook: offer(hook, 0, 1, 2, 3, 4))
    assert counts == {Outcome.SENT: 5}
    assert [value["incident"]["id"] for value in server.accepted] == ["i0", "i1", "i2", "i3", "i4"]
    assert set(server.paths) == {"/services/T0/B0/secret"}
    assert set(server.content_types) == {"application/json"}


@pytest.mark.parametrize("answer", [500, 503, 429, HANG_UP])
def test_what_may_pass_is_tried_again(answer: int, caplog: pytest.LogCaptureFixture) -> None:
    async def act(hook: Webhook) -> None:
        hook.offer(notification())
        await settled(hook, 1)

    with WebhookServer([answer, answer]) as server:
        assert posting(server.url, act) == {Outcome.SENT: 1}
    assert len(server.posted) == 3
    assert sum("tried again" in record.message for record in caplog.records) == 1


def test_a_server_that_is_not_there_yet_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebhookServer() as gone:
        url = gone.url
    monkeypatch.setattr(webhook, "DEADLINE_SECONDS", 0.3)

    async def act(hook: Webhook) -> None:
        hook.offer(notification())
        await settled(hook, 1)

    assert posting(url, act) == {Outcome.FAILED: 1}


@pytest.mark.parametrize("answer", [400, 403, 404, 410, 302, 307])
def test_what_will_not_pass_is_given_up_at_once(answer: int, caplog: pytest.LogCaptureFixture) -> None:
    async def act(hook: Webhook) -> None:
        hook.offer(notification(1))
        hook.offer(notification(2))
        await settled(hook, 2)

    with WebhookServer([answer], {"Location": "/elsewhere"}) as server:
        assert posting(server.url, act) == {Outcome.FAILED: 1, Outcome.SENT: 1}
    assert server.paths == ["/services/T0/B0/secret"] * 2, "a redirect was followed"
    assert f"status {answer}" in caplog.text


def test_a_server_may_ask_for_time() -> None:
    async def act(hook: Webhook) -> None:
        hook.offer(notification())
        await settled(hook, 1)

    began = time.monotonic()
    with WebhookServer([429], {"Retry-After": "1"}) as server:
        posting(server.url, act)
    assert time.monotonic() - began > 0.9


def test_the_queue_is_bounded_and_counts_what_it_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "MAX_WAITING", 3)

    async def act(hook: Webhook) -> None:
        server.hold.clear()
        hook.offer(notification(0))
        await asyncio.sleep(0.05)  # under way
        for number in range(1, 8):
            hook.offer(notification(number))
        server.hold.set()
        await settled(hook, 8)

    with WebhookServer() as server:
        assert posting(server.url, act) == {Outcome.SENT: 4, Outcome.DROPPED: 4}
    assert [value["incident"]["id"] for value in server.accepted] == ["i0", "i5", "i6", "i7"]


def test_the_loop_goes_on_while_a_server_does_not_answer_and_the_end_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 0.3)
    ticks = 0

    async def act(hook: Webhook) -> None:
        nonlocal ticks
        server.hold.clear()
        for number in range(3):
            hook.offer(notification(number))
        for _ in range(10):
            await asyncio.sleep(0.01)
            ticks += 1

    with WebhookServer() as server:
        began = time.monotonic()
        counts = posting(server.url, act)
        took = time.monotonic() - began
    assert ticks == 10
    assert took < 2.0
    assert counts == {Outcome.DROPPED: 3}
    assert "not all notifications" in caplog.text


def test_what_was_settled_is_not_posted_again_to_the_same_address() -> None:
    memory = Memory()
    with WebhookServer([404]) as server, WebhookServer() as other:
        for _ in range(2):
            posting(server.url, lambda hook: offer(hook, 1, 2), memory)
        assert list(memory.settled.values()) == ["failed", "sent"]
        assert len(server.posted) == 2
        posting(other.url, lambda hook: hook.offer(notification(1)), memory)
        assert len(other.accepted) == 1


def test_whoever_started_the_daemon_is_told_once_what_a_webhook_did_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with WebhookServer([404, 404]) as server:
        posting(server.url, lambda hook: offer(hook, 1, 2, 3), on_lost=told.append)
    assert told == [
        f"http://127.0.0.1:{server.url.split(':')[2].split('/')[0]}/… was not told of a critical incident: status 404"
    ]
    monkeypatch.setattr(webhook, "CLOSE_SECONDS", 0.1)  # no longer there, and the end comes before it is given up
    posting(server.url, lambda hook: offer(hook, 1, 2), on_lost=told.append)
    assert len(told) == 2
    assert "refused" in told[1]


def test_old_news_is_no_news() -> None:
    with WebhookServer() as server:
        assert posting(server.url, lambda hook: hook.offer(notification(age_seconds=601.0))) == {}
    assert server.posted == []


def test_no_log_line_holds_the_secret(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(webhook, "DEADLINE_SECONDS", 0.1)

    async def act(hook: Webhook) -> None:
        hook.offer(notification())
        await settled(hook, 1)

    with WebhookServer([500, 404]) as server:
        posting(server.url, act)
    for url in (server.url, "http://127.0.0.1:99999999/secret", "http://" + "a" * 300 + ".example/secret"):
        assert posting(url, act) == {Outcome.FAILED: 1}
    assert "127.0.0.1" in caplog.text
    assert "secret" not in caplog.text


def test_what_cannot_be_put_into_words_does_not_end_the_daemon(caplog: pytest.LogCaptureFixture) -> None:
    async def act(hook: Webhook) -> None:
        hook.offer(replace(notification(1), incident=incident(evidence={"value": object()})))
        hook.offer(notification(2))
        await settled(hook, 2)

    with WebhookServer() as server:
        assert posting(server.url, act) == {Outcome.FAILED: 1, Outcome.SENT: 1}
    assert "TypeError" in caplog.text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_that_nobody_vouches_for_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pem = tmp_path / "own.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=127.0.0.1 -days 1"
    subprocess.run([*command.split(), "-keyout", pem, "-out", tmp_path / "cert"], check=True, capture_output=True)
    pem.write_text(pem.read_text() + (tmp_path / "cert").read_text())
    monkeypatch.setattr(webhook, "DEADLINE_SECONDS", 0.2)

    async def act(hook: Webhook) -> None:
        hook.offer(notification())
        await settled(hook, 1)

    with WebhookServer(certificate=pem) as server:
        assert posting(server.url, act) == {Outcome.FAILED: 1}
    assert server.posted == []
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
