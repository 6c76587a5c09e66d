"""What the launcher says: of bad commands, of interrupts, and without a terminal."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags
from ml_collections import ConfigDict

from experiments import main, registry, usage
from experiments.configs import fewshot_vision, memory, quickstart
from experiments.drivers import few_shot, layouts, memory_table, training
from experiments.drivers.progress import Progress, StoppedError, show_progress
from experiments.workdir import report

ROOT = pathlib.Path(__file__).parents[1]


_PATIENCE = 400  # seconds, on a machine with much other work


def launch(*arguments, **kwargs):
    command = [sys.executable, "-m", "experiments.main", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


CONFIG = f"--config={ROOT}/experiments/configs/quickstart.py"
QUICKSTART = f"{CONFIG}:smoke"


def test_the_names_that_there_are_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.parse(["main.py", "--list"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for name in (*registry.NETWORKS, *registry.DATASETS, "quickstart.py", "rotated_30"):
        assert f"  {name}" in said or f" {name}," in said


def test_a_bad_command_gets_one_line_before_any_work(tmp_path):
    workdir = tmp_path / "workdir"
    process = launch(QUICKSTART, "--config.dataset=digitz", f"--workdir={workdir}")
    out, error = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 1
    assert error.startswith("error: there is no dataset 'digitz', did you mean 'digi")
    assert len(error.strip().splitlines()) == 1
    assert out == ""
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.py"], "the configuration file cannot be read: [Errno 2]"),
        ([f"--config={ROOT}"], "the configuration file cannot be read: "),
        ([f"{CONFIG}:fast"], "variant must be one of"),
        ([QUICKSTART, "--config.netwrk=cnn"], 'Did you mean "network" instead of'),
        ([QUICKSTART, "--config.num_evals=many"], "--config.num_evals=many: invalid"),
        ([QUICKSTART, "--resume=perhaps"], "--resume=perhaps"),
        ([QUICKSTART, "--workdirr=x"], "workdirr"),
        ([], "Flag --config must have a value"),
    ],
)
def test_a_bad_flag_gets_one_line(arguments, words, monkeypatch):
    command = ["main", "--workdir=w", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # where overrides are looked for
    try:
        with pytest.raises(SystemExit) as raised:
            main.parse(command)
    finally:
        flags.FLAGS.unparse_flags()
    text = str(raised.value)
    assert text.startswith("error: ")
    assert words in text
    assert len(text.splitlines()) == 1


def cell(**changes):
    config = fewshot_vision.get_config("digits,vit_small,smoke")
    config.update(changes)
    return config


def quick(**changes):
    config = quickstart.base("smoke")
    with config.ignore_type():
        config.update(changes)
    return config


def with_method(**changes):
    config = quickstart.base("smoke")
    changed = quickstart.changed(config.methods.forward_16w8a, changes)
    config.methods.forward_16w8a = changed
    return config


def two_parts():
    config = ConfigDict({"parts": {"a": quick(), "b": quick()}})
    config.parts.b.run = ("backprop",)
    return config


TRAINING = {
    "no network 'cnnn'": lambda: quick(network="cnnn"),
    "no dataset 'digitz'": lambda: quick(dataset="digitz"),
    "no domain of digits 'rotated_31'": lambda: quick(target="rotated_31"),
    "no published weights 'imagnet'": lambda: quick(
        weights="imagnet", network="vit_28"
    ),
    "reads no published weights": lambda: quick(weights="imagenet"),
    "no backbone 'efficientnet'": lambda: quick(backbone="efficientnet"),
    "no metric 'acc'": lambda: quick(metrics=("acc",)),
    "metrics must have at least one entry": lambda: quick(metrics=()),
    "no figure 'lines'": lambda: quick(figure="lines"),
    "no method 'backpropp'": lambda: quick(run=("backpropp",)),
    "seeds must have at least one entry": lambda: quick(seeds=()),
    "seeds must be whole numbers": lambda: quick(seeds="abc"),
    "tuning_seeds must have at least": lambda: quick(tuning_seeds=()),
    "learning_rates must have": lambda: with_method(learning_rates=()),
    "no optimizer 'sdg'": lambda: with_method(optimizer="sdg"),
    "no estimator 'sign'": lambda: with_method(estimator="sign"),
    "no perturbation 'gauss'": lambda: with_method(perturbation="gauss"),
    "no unit of epsilon 'steps'": lambda: with_method(epsilon_unit="steps"),
    "no enhancement 'sparse'": lambda: with_method(enhancements={"sparse": {}}),
    "no way to adapt 'probe'": lambda: with_method(adaptation={"probe": {}}),
    "gradient must be": lambda: with_method(gradient="sideways"),
    "must run the same methods": two_parts,
}
FEW_SHOT = {
    "no dataset 'digitz'": {"dataset": "digitz"},
    "no network 'vit'": {"network": "vit"},
    "no domain of digit_classes 'upright'": {"domain": "upright"},
    "head must be": {"head": "matching"},
    "no transform 'L2'": {"transform": "L2"},
    "tasks must be at least 2": {"tasks": 1},
    "tuning_tasks must be at least 1": {"tuning_tasks": 0},
}


@pytest.mark.parametrize("words", TRAINING)
def test_names_are_checked_before_training(words, tmp_path):
    with pytest.raises(usage.UsageError, match=words):
        training.run(TRAINING[words](), str(tmp_path / "workdir"))
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize("words", FEW_SHOT)
def test_names_are_checked_before_few_shot_learning(words, tmp_path):
    with pytest.raises(usage.UsageError, match=words):
        few_shot.run(cell(**FEW_SHOT[words]), str(tmp_path / "workdir"))
    assert not (tmp_path / "workdir").exists()


def test_names_are_checked_before_memory_is_counted(tmp_path):
    config = memory.get_config("smoke")
    config.networks["ViT-tiny"].name = "vit_tinny"
    with pytest.raises(usage.UsageError, match="no network 'vit_tinny', did you mean"):
        memory_table.run(config, str(tmp_path / "workdir"))
    assert not (tmp_path / "workdir").exists()


def test_the_nearest_name_is_proposed_and_all_are_listed():
    with pytest.raises(usage.UsageError) as raised:
        usage.check_names("network", ["resnet_12"], registry.NETWORKS)
    text = str(raised.value)
    assert "did you mean 'resnet12'?" in text
    assert all(name in text for name in registry.NETWORKS)
    with pytest.raises(usage.UsageError, match=r"no network 'qqq'\. Choose from"):
        usage.check_names("network", ["qqq"], registry.NETWORKS)


# ------------------------------------------------------------- interrupts, progress


def read_until(process, words):
    """Lines of a process up to one that has some words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"it ended without saying {words!r}: {lines}")


def test_an_interrupt_is_told_and_plain_lines_are_printed(tmp_path):
    # Two methods train at a time, in threads; one that compiles stops behind that.
    process = launch(
        QUICKSTART,
        f"--workdir={tmp_path}",
        "--config.run=('backprop', 'forward_fp32')",
        "--config.methods.backprop.steps=10000000",
        "--config.methods.forward_fp32.steps=10000000",
    )
    lines = read_until(process, "the pre-training is finished")
    assert "begins" in lines[0]
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=_PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert f"The same command goes on from what {tmp_path} holds" in error


def test_lines_come_while_nothing_advances(capsys):
    with show_progress(every_seconds=0.01) as progress:
        progress.expect(1234)
        progress.advance(5)
        progress.say("something is finished")
        out, deadline = "", time.monotonic() + 60
        while out.count("training steps: 5 of 1,234") < 2:
            assert time.monotonic() < deadline
            out += capsys.readouterr().out
    assert "something is finished" in out


def test_told_to_stop_a_thread_ends_at_its_next_steps():
    shown = []
    progress = Progress(lambda *counts: shown.append(counts), lambda text: None)
    progress.expect(3)
    progress.advance(1)
    progress.stop()
    with pytest.raises(StoppedError):
        progress.advance(1)
    assert shown == [(0, 3), (1, 3), (2, 3)]


def test_when_one_method_fails_the_others_stop(monkeypatch, tmp_path):
    config = quick(run=("backprop", "forward_fp32"), parallel_runs=2)
    progress = Progress(lambda done, total: None, lambda text: None)
    ended, begun = [], threading.Event()

    def adapt(config, name, task, progress, directory, layout):
        if name == "backprop":
            begun.wait()
            raise ZeroDivisionError
        begun.set()
        try:
            while True:
                progress.advance(1)
        finally:
            ended.append(name)

    monkeypatch.setattr(training, "_adapt", adapt)
    given = config, None, progress, tmp_path, layouts.ALONE
    with pytest.raises(ZeroDivisionError):
        list(training._side_by_side(*given))
    assert ended == ["forward_fp32"]


# ------------------------------------------------------------------------ one seed


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strict(path):
    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("figure", ["curves", "dots"])
def test_one_seed_has_no_spread(figure, tmp_path):
    ran = {
        **training._summary([{"accuracy": 0.75}]),
        "early_stopping": training._summary([{"accuracy": 0.5}]),
        "forward_passes": 30,
        "learning_rate": 0.1,
        "seconds": 1.0,
        "steps": 10,
        "temporaries_mib": 0.5,
        "curves": [[0.25, 0.5, 0.75]],
    }
    results = {"zero_shot": training._summary([{"accuracy": 0.25}]), "backprop": ran}
    config = quick(seeds=(3,), early_stopping=True, figure=figure)
    report.write(results, config, tmp_path)
    assert strict(tmp_path / "results.json") == results
    assert ran["accuracy_std"] is None
    assert ran["scores"] == {"accuracy": [0.75]}
    table = (tmp_path / "table.md").read_text()
    assert "nan" not in table
    assert "| backprop | 75.0 | 30 | 0.1 | 1.0 | 0.50 | 50.0 |" in table
    assert "test accuracy in % of one seed; a backward pass" in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_spread_beside_other_parts(tmp_path):
    result = {"accuracy": 0.75, "accuracy_std": None, "forward_passes": 3}
    part = {**quick(seeds=(3,)), "figure": "dots"}
    config = ConfigDict({"parts": {"a": part, "b": part}})
    report.write_parts({"a": {"bp": result}, "b": {"bp": result}}, config, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| bp | 75.0 | 75.0 |" in table
    assert "Test accuracy in % of one seed." in table


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_become_null(number, tmp_path):
    value = float(number)
    results = {"a": [1.5, {"cosine": (value, 2)}], "b": value}
    report.write_json(results, tmp_path)
    found = strict(tmp_path / "results.json")
    assert found == {"a": [1.5, {"cosine": [None, 2]}], "b": None}
