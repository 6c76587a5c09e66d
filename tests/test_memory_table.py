import pytest

from experiments import main
from experiments.configs import memory as memory_config
from experiments.drivers import memory_table


@pytest.mark.slow
def test_it_writes_every_method_of_a_network(tmp_path):
    config = memory_config.get_config("smoke")
    results = memory_table.run(config, str(tmp_path))
    (methods,) = results.values()
    assert set(methods) == set(config.methods)
    full, probe = methods["FT, BP"], methods["LP, BP"]
    assert full["weights"] == probe["weights"] == 2 * 5_525_381
    assert probe["gradients"] == 2 * (192 * 5 + 5)
    assert full["activations"] > 10 * probe["activations"]
    table = (tmp_path / "table.md").read_text()
    # ViT-tiny's scratch is within 20% of the paper's.
    for title, said in config.networks["ViT-tiny"].paper.items():
        assert methods[title]["scratch"] / 1e6 == pytest.approx(said, rel=0.2)
        assert f"| {said:.2f} |" in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_least_device_that_holds_it_is_named(tmp_path):
    config = memory_config.get_config("smoke")
    config.devices = (10**6, 10**8, 10**9)
    memory_table.run(config, str(tmp_path))
    rows = [
        line
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| ViT-tiny")
    ]
    assert all(row.endswith("| 100,000,000 |") for row in rows)


def test_the_launcher_finds_it():
    assert main._DRIVERS[memory_config.get_config().driver] is memory_table.run
    with pytest.raises(ValueError, match="'tiny'"):
        memory_config.get_config("tiny")
