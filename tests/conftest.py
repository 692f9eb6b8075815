"""The option that runs other vectors than the repository's: `pytest tests/algos tests/rewards --vectors DIR`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vectors", default=None, help="folder with `objectives`, `reweighting` and `rewards` vectors")
