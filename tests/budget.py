"""A pytest plugin, `-p tests.budget --budget-s N`: tests that would begin after N seconds are skipped."""

import time

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption("--budget-s", type=float, default=None, help="seconds after which tests are skipped")


class _Budget:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self.deadline:
            pytest.skip(f"the time budget of {self.seconds:.0f} s is spent")


def pytest_configure(config: pytest.Config) -> None:
    """Starts the clock, if there is a budget."""
    seconds = config.getoption("--budget-s")
    if seconds is not None:
        config.pluginmanager.register(_Budget(seconds))
