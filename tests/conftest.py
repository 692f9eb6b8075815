"""Options: other vectors than the repository's (`pytest tests/algos tests/rewards --vectors DIR`), more examples."""

import pytest
from hypothesis import settings

settings.register_profile("orders", max_examples=100_000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vectors", default=None, help="folder with `objectives`, `reweighting` and `rewards` vectors")
