"""What every test shares: gloo tests one after another, GPU tests where there is one."""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class OneWorkerForGloo(LoadScopeScheduling):
    """Gives all of ``tests/distributed`` to one worker, so that two never share the cores."""

    # `--dist loadgroup` with marks would say the same, but pytest-xdist 3.8 loses the group's name
    # under pytest 9.2
    def _split_scope(self, nodeid: str) -> str:
        return "distributed" if nodeid.startswith("tests/distributed/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneWorkerForGloo:
    return OneWorkerForGloo(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files, then review the diff",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda = has_cuda() if any(item.get_closest_marker("gpu") for item in items) else False
    for item in items:
        if item.nodeid.startswith("tests/distributed/"):
            item.add_marker("distributed")
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
