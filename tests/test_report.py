"""Tables of results, from results written by hand."""

import numpy as np
from matplotlib import figure
from ml_collections import ConfigDict

from experiments.workdir import report


def result(accuracy, **fields):
    return {"accuracy": accuracy, "accuracy_std": 0.01, **fields}


RUN = {
    "steps": 10,
    "forward_passes": 1200,
    "learning_rate": 0.03,
    "seconds": 1.25,
    "temporaries_mib": 0.5,
    "curves": [[0.5, 0.75], [0.5, 0.7]],
}
CONFIG = {
    "source": "clean",
    "target": "noisy",
    "metrics": ("accuracy",),
    "seeds": (0, 1),
    "parallel_runs": 1,
    "gradient_estimates": 16,
    "early_stopping": True,
    "figure": "dots",
}


def rows(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_row_has_what_a_method_costs_and_its_cosines(tmp_path):
    cosines = {"head": (1.0, 0.0), "adapter": (0.316, 0.037)}
    results = {
        "zero_shot": result(0.5),
        "fp32": result(0.725, **RUN, cosine=cosines, early_stopping=result(0.74)),
    }
    report.write(results, ConfigDict(CONFIG), tmp_path)
    _, _, zero_shot, fp32 = rows(tmp_path / "table.md")
    assert zero_shot == ["zero_shot", "50.0 ± 1.0", "0", *[""] * 5]
    assert fp32[:2] == ["fp32", "72.5 ± 1.0"]
    assert fp32[2:6] == ["1,200", "0.03", "1.2", "0.50"]
    assert fp32[6] == "head 1.00 ± 0.00, adapter 0.32 ± 0.04"
    assert fp32[7] == "74.0 ± 1.0"
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_price_of_a_score_is_where_the_mean_of_the_seeds_first_has_it(tmp_path):
    # Of four points behind the start the third is the first with a mean of 0.8.
    late = {**RUN, "curves": [[0.5, 0.9, 0.9, 0.9, 0.7], [0.5, 0.6, 0.6, 0.7, 0.7]]}
    results = {
        "zero_shot": result(0.5),
        "late": result(0.7, **late),
        "never": result(0.725, **RUN),
    }
    config = {**CONFIG, "gradient_estimates": 0, "early_stopping": False}
    config |= {"reach": 0.8, "num_evals": 4}
    report.write(results, ConfigDict(config), tmp_path)
    head, _, *found = rows(tmp_path / "table.md")
    assert head[-2:] == ["passes to 80%", "seconds to 80%"]
    assert [row[-2:] for row in found] == [["", ""], ["900", "0.9"], ["–", "–"]]


def test_parts_stand_side_by_side_with_the_most_passes_of_each(tmp_path):
    fewer = {**RUN, "forward_passes": 900}
    results = {
        "easy": {"bp": result(0.9, **fewer), "fp32": result(0.8, **RUN)},
        "hard": {"bp": result(0.7, **fewer), "fp32": result(0.6, **fewer)},
    }
    parts = {name: {**CONFIG, "target": name} for name in results}
    report.write_parts(results, ConfigDict({"parts": parts}), tmp_path)
    header, _, *methods = rows(tmp_path / "table.md")
    assert header == ["method", "easy", "hard"]
    assert methods == [
        ["bp", "90.0 ± 1.0", "70.0 ± 1.0"],
        ["fp32", "80.0 ± 1.0", "60.0 ± 1.0"],
    ]
    note = (tmp_path / "table.md").read_text()
    assert "over 2 seeds" in note
    assert "easy: clean to easy, at most 1,200 forward passes" in note
    assert "hard: clean to hard, at most 900 forward passes" in note


def test_each_part_shows_its_own_metric(tmp_path):
    results = {
        "digits": {"fp32": result(0.8, **RUN)},
        "solar": {"fp32": result(0.6, **RUN, auc=0.9, auc_std=0.02)},
    }
    parts = {name: {**CONFIG, "target": name} for name in results}
    parts["solar"]["metrics"] = ("auc", "accuracy")
    report.write_parts(results, ConfigDict({"parts": parts}), tmp_path)
    *_, fp32 = rows(tmp_path / "table.md")
    assert fp32 == ["fp32", "80.0 ± 1.0", "90.0 ± 2.0"]
    assert "Test accuracy, of solar auc in %" in (tmp_path / "table.md").read_text()


def test_a_picture_of_memory_has_a_dot_for_each_method(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, path, dpi: saved.append(self)
    )
    small = {**RUN, "forward_passes": 4800, "temporaries_mib": 0.25}
    results = {
        "zero_shot": result(0.5),
        "bp": result(0.9, **RUN),
        "fp32": result(0.8, **small),
    }
    config = {**CONFIG, "figure": "memory"}
    report.write(results, ConfigDict(config), tmp_path)
    (axes,) = saved[0].axes
    dots = {tuple(c.get_offsets()[0]): c.get_sizes()[0] for c in axes.collections[1::2]}
    np.testing.assert_allclose(sorted(dots), [(0.25, 80.0), (0.5, 90.0)])
    # Four times the passes, four times the area.
    np.testing.assert_allclose(dots[min(dots)], 4 * dots[max(dots)])
