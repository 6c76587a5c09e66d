import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import compile_run, compile_time, programs, subjects
from experiments.benchmarks.measure import Program

HLO = """
%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b), metadata={op_name="add"}
}

%region_9.1 (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  ROOT %add.7 = f32[] add(%c, %d), metadata={op_name="other"}
}

%fused (p: f32[4]) -> f32[] {
  %p = f32[4]{0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%region_0.1
}

%fused.1 (q: f32[4]) -> f32[] {
  %q = f32[4]{0} parameter(0)
  %nothing = f32[] constant(0)
  ROOT %s = f32[] reduce(%q, %nothing), dimensions={0}, to_apply=%region_9.1
}

%fused.2 (q: f32[4]) -> f32[] {
  %q.1 = f32[4]{0} parameter(0)
  %one = f32[] constant(1)
  ROOT %s.1 = f32[] reduce(%q.1, %one), dimensions={0}, to_apply=%region_9.1
}

ENTRY %main (x: f32[4]) -> (f32[], f32[], f32[]) {
  %x = f32[4]{0} parameter(0)
  %f = f32[] fusion(%x), kind=kLoop, calls=%fused
  %g = f32[] fusion(%x), kind=kLoop, calls=%fused.1
  %h = f32[] fusion(%x), kind=kLoop, calls=%fused.2
  ROOT %t = (f32[], f32[], f32[]) tuple(%f, %g, %h)
}
"""


def test_equal_kernels_are_counted_once():
    # The first two differ in names and metadata only, the third in a constant.
    assert compile_time.distinct_kernels(HLO) == 2
    assert compile_time.distinct_kernels(HLO.replace("constant(1)", "constant(0)")) == 1


@pytest.mark.optimized
def test_equal_layers_share_their_kernels():
    def run(x, w, layers):
        for _ in range(layers):
            x = jnp.sin(x @ w) * 2
        return x

    x = jnp.ones((4, 4))

    def kernels(layers):
        program = Program(lambda x, w: run(x, w, layers), x, x)
        program.compile()
        return compile_time.distinct_kernels(program.text())

    assert kernels(2) == kernels(5) > 0


@pytest.mark.optimized
def test_the_kernels_of_a_step_do_not_grow_with_equal_blocks():
    def kernels(depth):
        # Weights of 40 x 40 are large enough to be perturbed where they are used.
        program = programs.forward_step(
            subjects.problem(subjects.stack(40, depth), 2, "float32")
        )
        program.compile()
        text = program.text()
        return compile_time.distinct_kernels(text), text.count(" fusion(")

    (few, fusions), (many, more_fusions) = kernels(3), kernels(6)
    assert more_fusions >= fusions + 3 * 5
    # A sum over all leaves takes another round where there are more than 32 of them.
    assert many <= few + 1


def test_every_phase_is_timed_from_empty_caches():
    problem = subjects.problem(subjects.stack(4, 1), 2)
    found = [
        compile_time.measured(lambda: programs.forward_step(problem), optimize=False)
        for _ in range(2)
    ]
    for record in found:
        assert set(record) == {*compile_time.PHASES, "kernels"}
        assert all(record[phase] > 0 for phase in compile_time.PHASES)
    # The second time nothing is remembered: a cached trace takes less than a tenth.
    assert found[1]["trace"] > 0.1 * found[0]["trace"]


def test_the_scanned_network_does_not_grow():
    counts = []
    for depth in (2, 3):
        problem = compile_time.scanned(depth, "float32", False)
        jaxpr = jax.make_jaxpr(problem.loss_fn)(problem.params, **problem.data)
        counts.append(len(jaxpr.eqns))
    assert counts[0] == counts[1]
    assert compile_time.scanned(2, "16w8a", True) is None


def test_a_further_block_is_the_slope_between_depths():
    records = [
        {
            "network": f"{depth} blocks",
            "arithmetic": "float32",
            "program": "backprop",
            "trace": 1.0 + depth,
            "lowering": 2.0,
            "compilation": 3.0 * depth,
            "kernels": 7,
        }
        for depth in (4, 12)
    ]
    (row,) = compile_time._growth(records).rows
    assert row[2:] == ["4 to 12", "1.00", "0.00", "3.00", "0.00"]
    twice = {**records[0], "program": "fgrad, m=1", "compilation": 24.0}
    assert compile_time._row(twice, records)[-3:] == ["1.00", "2.00", "7"]


def test_a_measurement_in_parts_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_time, "_smallest", _few)
    monkeypatch.setattr(compile_time, "measured", _without_compiling)
    workdir = tmp_path / "compile"
    assert not compile_run.run(str(workdir), seconds=0, smoke=True)
    (first,) = json.loads((workdir / "records.json").read_text())
    assert compile_run.run(str(workdir), smoke=True)
    records = json.loads((workdir / "records.json").read_text())
    assert records[0] == first
    names = [(record["network"], record["program"]) for record in records]
    assert len(set(names)) == len(names) > 3
    assert "backprop" in (workdir / "tables.md").read_text()
    assert "<svg" in (workdir / "compile_time.svg").read_text()


def _few():
    makers = {}
    for depth in (1, 2):
        problem = subjects.problem(subjects.stack(2, depth), 2)
        makers[f"{depth} blocks"] = lambda arithmetic, simulated, p=problem: p
    return makers


def _without_compiling(make, *, optimize=True):
    del make, optimize
    return {**dict.fromkeys(compile_time.PHASES, 1.0), "kernels": 1}
