"""With ``pytest --ptx ARCH``, tests run the compiled kernels in the machine of tools/ptx."""

import os
from collections import Counter
from collections.abc import Generator

import pytest

MOST_REPORTS = 20  # of one test that are shown


def start(arch: int, mode: str, seed: int) -> "PtxPlugin":
    """Send all launches of this process to the machine; call it before Triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from ptx import driver

    session = driver.install(arch, mode, seed)
    os.environ["MMFUSED_PTX_ARCH"] = str(arch)
    import mmfused.kernels.tiles
    import mmfused.library  # noqa: F401

    # The modules have read the variable. Child processes have no such driver: there, the kernels
    # run in Triton's interpreter, as they do without --ptx.
    del os.environ["MMFUSED_PTX_ARCH"]
    os.environ["TRITON_INTERPRET"] = "1"
    return PtxPlugin(session)


class PtxPlugin:
    """Fails each test in which the machine found a fault.

    Args:
        session: the ``ptx.driver.Session`` of this process.
    """

    def __init__(self, session) -> None:
        self.session = session
        self.counts, self.seconds = session.counts, session.seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("not_on_ptx")
            if marker:
                item.add_marker(pytest.mark.skip(reason=f"not on PTX: {marker.args[0]}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator:
        yield from self._checked(item, "setup")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator:
        yield from self._checked(item, "call")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator:
        yield from self._checked(item, "teardown")

    def _checked(self, item: pytest.Item, phase: str) -> Generator:
        """Run a phase of a test; if it fails by itself, the reports are added to its output."""
        try:
            yield
        except BaseException:
            item.add_report_section(phase, "PTX machine", self._reports())
            raise
        if text := self._reports():
            pytest.fail(text, pytrace=False)

    def _reports(self) -> str:
        reports = self.session.take_reports()
        more = [f"and {len(reports) - MOST_REPORTS} more"] if len(reports) > MOST_REPORTS else []
        return "\n".join(reports[:MOST_REPORTS] + more)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # a worker of pytest-xdist
            output["ptx"] = dict(self.counts), dict(self.seconds)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        counts, seconds = getattr(node, "workeroutput", {}).get("ptx", ({}, {}))
        self.counts += Counter(counts)
        self.seconds += Counter(seconds)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        seconds = ", ".join(f"{what} {taken:.1f} s" for what, taken in self.seconds.items())
        terminalreporter.section("PTX machine")
        terminalreporter.write_line(
            f"sm_{self.session.arch}, {self.session.mode} schedules: "
            f"{self.counts['launches']} launches, {self.counts['kernels']} kernels; {seconds}"
        )
