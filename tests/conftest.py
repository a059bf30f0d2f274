"""Fixtures that several modules share: what takes seconds to start is started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_server import Servers


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A real Prometheus with a real Alertmanager; a test says itself what they scrape, evaluate and notify."""
    with Servers(tmp_path_factory.mktemp("prometheus")) as servers:
        yield servers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs of several processes share two cores with other tests: one that fails is run once more, and told (R)."""
    for item in items:
        if item.get_closest_marker("torchrun") is not None or "distributed" in item.path.parts:
            item.add_marker(pytest.mark.flaky(reruns=1))
