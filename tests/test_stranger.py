"""A stranger's list, walked by the code blocks of the pages that a stranger reads.

Each item names a page. Its blocks run one after the other, as somebody would paste
them; a block for another process runs in one, where importing fgrad fails.
"""

import pathlib
import re
import subprocess
import sys

import pytest
from lanes import some

HOW_TO = pathlib.Path(__file__).parent.parent / "docs" / "how_to"

# What a stranger wants: the page that shows it, what its code must do, and what the
# code needs beside the library.
LIST = {
    "train my model of linen": ("flax", "model.init", []),
    "train my model of NNX": ("flax", "nnx.Optimizer", []),
    "add LoRA to it": ("adapters", "fgrad.lora", []),
    "train a network of AQT": ("quantized_networks", "AqtDotGeneral", []),
    "train a network of Qwix": ("quantized_networks", "qwix.quantize_params", ["qwix"]),
    "save it": ("save_and_export", "fgrad.save", ["flatbuffers"]),
    "export it": ("save_and_export", "jax.export.deserialize", ["flatbuffers"]),
    "recalibrate it": ("recalibrate", "layers.calibrate", []),
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
