"""The option that runs other vectors than the repository's: `pytest tests/algos --vectors DIR`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vectors", default=None, help="folder with `objectives` and `reweighting` vectors")
