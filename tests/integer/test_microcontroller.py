"""The benchmark of the microcontroller, in its smallest settings."""

import pytest

from experiments.benchmarks import emulation

microcontroller = pytest.importorskip(
    "experiments.benchmarks.microcontroller", reason="needs the extra [experiments]"
)


@pytest.mark.slow
@pytest.mark.skipif(not emulation.has_host_compiler(), reason="needs gcc or cc")
def test_the_tables_are_printed(tmp_path, capsys):
    microcontroller.run(str(tmp_path), True, microcontroller.SMOKE)
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("| 0 |")]
    assert row.endswith("| yes |")
    if emulation.has_emulator():
        assert "Bits of JAX after 1 steps: True" in printed
    else:
        assert "pip install 'fgrad[integer]'" in printed
