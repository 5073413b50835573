"""What every test starts from: one thread, a fixed seed, and a failure when a test leaves global state behind."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import conditions, counts, expected_warnings, record

# A busy machine is slow, and that is no property of what is tested. The gate tries the same examples each time; you
# look for new ones when you run the tests yourself.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("busy machine")
# Also for fixtures of a module, which come before those of a test: two threads round otherwise than one.
torch.set_num_threads(1)


# Where the suite runs in a shell's background, Ctrl-C is ignored, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="write what was run and how it ended to this JSON file")


def pytest_configure(config):
    for line in expected_warnings.filters():
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    for item in items:
        if "fsdp2" in item.nodeid.lower():
            item.add_marker(conditions.fsdp2_on_cpu)


@pytest.fixture(autouse=True)
def _clean_world():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    left = {key for key in set(os.environ) | set(before) if os.environ.get(key) != before.get(key)}
    for key in left:  # Lightning and torch.distributed leave variables such as MASTER_PORT
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    leaked = torch.distributed.is_available() and torch.distributed.is_initialized()
    if leaked:
        torch.distributed.destroy_process_group()
    assert not leaked, "the test left a process group behind"


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def namespace(request):
    """Lightning under either of its names."""
    return __import__(request.param, fromlist=["Trainer"])


def pytest_terminal_summary(terminalreporter):
    """Say what was tried how often: the tests that kill runs and damage files count."""
    if path := terminalreporter.config.getoption("record"):
        record.write(path, terminalreporter.stats)
    found = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    lines = counts.summary(found)
    if lines:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.write_line(line)
