"""A stranger's list, walked by the code blocks of the pages that a stranger reads.

Each item names a page. Its blocks run one after the other, as somebody would paste
them; a block for another process runs in one, where importing fgrad fails. With
FGRAD_STRANGER=1 a tutorial runs in an empty environment as well, which takes a package
index and some minutes.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv

import pytest
from lanes import some

ROOT = pathlib.Path(__file__).parent.parent
HOW_TO = ROOT / "docs" / "how_to"
TUTORIAL = ROOT / "colabs" / "1_first_forward_gradient.ipynb"

# What a stranger wants: the page that shows it, what its code must do, and what the
# code needs beside the library.
LIST = {
    "train my model of linen": ("flax", "model.init", []),
    "train my model of NNX": ("flax", "nnx.Optimizer", []),
    "train linen with BatchNorm": ("training_loop", "nn.BatchNorm(", []),
    "train linen with Dropout": ("training_loop", "nn.Dropout(", []),
    "train NNX with BatchNorm": ("training_loop", "nnx.BatchNorm(", []),
    "train NNX with Dropout": ("training_loop", "nnx.Dropout(", []),
    "train Equinox with BatchNorm": ("equinox", "eqx.nn.BatchNorm(", ["equinox"]),
    "train Equinox with Dropout": ("equinox", "eqx.nn.Dropout(", ["equinox"]),
    "add LoRA to it": ("adapters", "fgrad.lora", []),
    "train a network of AQT": ("quantized_networks", "AqtDotGeneral", []),
    "train a network of Qwix": ("quantized_networks", "qwix.quantize_params", ["qwix"]),
    "save it": ("save_and_export", "fgrad.save", ["flatbuffers"]),
    "export it": ("save_and_export", "jax.export.deserialize", ["flatbuffers"]),
    "recalibrate it": ("recalibrate", "layers.calibrate", []),
    "teach a keyword network": (
        *("keyword_network", "fgrad.adapt("),
        ["pymicro_wakeword", "pymicro_features", "espeakng_loader"],
    ),
}
PAGES = sorted({page for page, _, _ in LIST.values()})

# Another process, in which fgrad cannot be imported.
WITHOUT_FGRAD = "import sys\nsys.modules['fgrad'] = None\n"


def blocks(page, language):
    """The code blocks of a page."""
    text = (HOW_TO / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("wish", LIST)
def test_a_page_shows_it(wish):
    page, words, _ = LIST[wish]
    assert words in "".join([*blocks(page, "python"), *blocks(page, "py")])


@pytest.mark.parametrize("page", some(PAGES, ["flax"]))
def test_the_blocks_run_as_they_are_pasted(page):
    for needed in {
        package for p, _, all_ in LIST.values() if p == page for package in all_
    }:
        pytest.importorskip(needed, reason=f"{page}.md needs {needed}")
    names = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    for code in blocks(page, "py"):  # for another process
        subprocess.run(
            [sys.executable, "-c", WITHOUT_FGRAD + code],
            cwd=names["folder"],
            check=True,
        )


# A notebook of nothing but a tutorial's cells, as Jupyter would run it.
EXECUTE = """
import sys

import nbclient
import nbformat

notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
print(sum("image/png" in str(cell.get("outputs", "")) for cell in notebook.cells))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FGRAD_STRANGER"), reason="installs packages: FGRAD_STRANGER=1"
)
def test_a_tutorial_runs_in_an_empty_environment_with_a_wheel_beside_it(tmp_path):
    pytest.importorskip("build", reason="builds a wheel")
    folder, source = tmp_path / "stranger", tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "workdir", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(TUTORIAL, folder)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Jupyter alone: the tutorial's first cell installs fgrad and what it needs.
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "ipykernel",
        "nbclient",
        "nbformat",
    ]
    subprocess.run(install, check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    shown = subprocess.run(
        [python, "-c", EXECUTE, TUTORIAL.name],
        cwd=folder,
        env=clean | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout.splitlines()[-1]) >= 2  # figures


@pytest.mark.slow
def test_the_exported_module_is_compiled_by_iree(tmp_path):
    compiler = pytest.importorskip("iree.compiler", reason="needs fgrad[integer]")
    runtime = pytest.importorskip("iree.runtime", reason="needs fgrad[integer]")
    pytest.importorskip("flatbuffers", reason="needs fgrad[export]")
    names = {}
    for code in blocks("save_and_export", "python"):
        exec(compile(code, "save_and_export", "exec"), names)
    text = (names["folder"] / "forward.mlir").read_text()
    binary = compiler.compile_str(
        text, target_backends=["llvm-cpu"], input_type="stablehlo"
    )
    config = runtime.Config("local-sync")
    module = runtime.VmModule.copy_buffer(config.vm_instance, binary)
    context = runtime.SystemContext(config=config)
    context.add_vm_module(module)
    np = names["np"]
    x = np.asarray(names["x"][:4])
    found = context.modules[module.name]["main"](x).to_host()
    np.testing.assert_allclose(found, names["forward"](x), rtol=1e-5)
