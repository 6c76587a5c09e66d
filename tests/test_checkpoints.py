import collections
import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments import checkpoints

STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Global:
    """A global by its name, so that a pickle can be written without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """A call of a global that the pickle asks its reader to make."""

    def __init__(self, function, *args):
        self.function, self.args = Global(*function.rsplit(".", 1)), args


class Storage:
    """Data that PyTorch keeps beside the pickle."""

    def __init__(self, key, array, size=None, kind=None):
        self.key, self.array = key, array
        self.size = array.size if size is None else size
        self.kind = kind or STORAGES[array.dtype.name]


class Pickler(pickle._Pickler):
    """Writes pickles as torch.save does."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012  # the base class's way

    def save_global_by_name(self, obj):
        self.write(f"c{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(tuple(obj.args))
        self.write(pickle.REDUCE)

    dispatch[Global] = save_global_by_name
    dispatch[Call] = save_call

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            kind = Global("torch", obj.kind)
            return ("storage", kind, obj.key, "cpu", obj.size, *self.view)
        return None


def pickled(content, view=()):
    file = io.BytesIO()
    pickler = Pickler(file, protocol=2)
    pickler.view = view
    pickler.dump(content)
    return file.getvalue()


def tensor(storage, shape, strides, offset=0):
    hooks = collections.OrderedDict()
    function = "torch._utils._rebuild_tensor_v2"
    return Call(function, storage, offset, shape, strides, False, hooks)


def whole(key, array):
    strides = [stride // array.itemsize for stride in array.strides]
    return tensor(Storage(key, array), array.shape, tuple(strides))


def write_zip(path, content, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", "little")
        for storage in storages:
            data = storage.array.tobytes()
            archive.writestr(f"archive/data/{storage.key}", data)
        archive.writestr("archive/version", "3\n")


def write_legacy(path, content, storages):
    parts = [pickled(0x1950A86A20F9469CFC6C), pickled(1001)]
    parts += [pickled({"little_endian": True}), pickled(content, view=(None,))]
    parts += [pickled([storage.key for storage in storages])]
    for storage in storages:
        parts += [struct.pack("<q", storage.array.size), storage.array.tobytes()]
    path.write_bytes(b"".join(parts))


@pytest.fixture(params=[write_zip, write_legacy])
def write(request):
    return request.param


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", STORAGES)
def test_every_dtype_is_read(tmp_path, write, dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (3, 4)) * (1 if dtype == "bool" else 100)
    array = array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    content = collections.OrderedDict(w=whole("7", array))
    write(tmp_path / "model.pth", content, [Storage("7", array)])
    assert_same(checkpoints.load(tmp_path / "model.pth"), {"w": array})


def test_views_of_one_storage_keep_their_strides_and_share_it(tmp_path, write):
    base = np.arange(24, dtype=np.float32)
    storage = Storage("0", base)
    content = collections.OrderedDict(
        transposed=tensor(storage, (6, 4), (1, 6)),
        rows=tensor(storage, (2, 3), (12, 2), 5),
        scalar=tensor(storage, (), (), 23),
        expanded=tensor(storage, (3, 2), (0, 1), 8),
        empty=tensor(storage, (0, 5), (5, 1)),
    )
    write(tmp_path / "model.pth", content, [storage])
    found = checkpoints.load(tmp_path / "model.pth")
    expected = {
        "transposed": base.reshape(4, 6).T,
        "rows": np.array([[5, 7, 9], [17, 19, 21]], np.float32),
        "scalar": np.float32(23),
        "expanded": np.array([[8, 9]] * 3, np.float32),
        "empty": np.zeros((0, 5), np.float32),
    }
    assert_same(found, expected)
    assert np.shares_memory(found["transposed"], found["rows"])
    with pytest.raises(ValueError, match="read-only"):
        found["rows"][0] = 0


def test_nested_mappings_parameters_and_what_is_no_tensor(tmp_path, write):
    a, b = np.arange(3, dtype=np.float32), np.ones((2, 2), np.float32)
    hooks = collections.OrderedDict()
    parameter = Call("torch._utils._rebuild_parameter", whole("b", b), True, hooks)
    content = {
        "epoch": 3,
        "model": collections.OrderedDict({"z.w": whole("a", a), "b": parameter}),
        "history": [whole("c", a)],
    }
    content["model"]._metadata = {"": {"version": 1}}  # as a module's state has it
    storages = [Storage("a", a), Storage("b", b), Storage("c", a)]
    write(tmp_path / "model.pth", content, storages)
    found = checkpoints.load(tmp_path / "model.pth")
    assert_same(found, {"model.z.w": a, "model.b": b})


@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "builtins.eval", "torch.nn.Module", "os.path"]
)
def test_code_is_refused_and_not_run(tmp_path, write, name):
    ran = tmp_path / "ran"
    content = {"w": Call(name, f"touch {ran}")}
    write(tmp_path / "model.pth", content, [])
    with pytest.raises(ValueError, match=f"asks for {name}.*not run"):
        checkpoints.load(tmp_path / "model.pth")
    assert not ran.exists()


def test_what_is_allowed_cannot_be_changed(tmp_path):
    """BUILD would set attributes of what a global stands for."""
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for state in ({"x": 1}, (None, {"__call__": 1})):
        build = b"\x80\x02" + name + pickled(state)[2:-1] + b"b."
        with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
            archive.writestr("archive/data.pkl", build)
        with pytest.raises(ValueError, match="broken or truncated"):
            checkpoints.load(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((25,), (1,), 0),
        ((24,), (1,), 1),
        ((2, 2), (23, 1), 1),
        ((2,), (-1,), 1),
        ((2,), (1,), -1),
        ((-1,), (1,), 0),
        ((2, 2), (1,), 0),
        ((2**62, 2**62), (0, 0), 0),
        (("2",), (1,), 0),
    ],
)
def test_a_tensor_must_stay_in_its_storage(tmp_path, write, shape, strides, offset):
    storage = Storage("0", np.arange(24, dtype=np.float32))
    content = {"w": tensor(storage, shape, strides, offset)}
    write(tmp_path / "model.pth", content, [storage])
    with pytest.raises(ValueError, match=r"cannot read .*model\.pth"):
        checkpoints.load(tmp_path / "model.pth")


def test_a_storage_must_be_what_the_pickle_says(tmp_path, write):
    array = np.arange(24, dtype=np.float32)
    for storage in (Storage("0", array, size=48), Storage("0", array, kind="Object")):
        content = {"w": tensor(storage, (48,), (1,))}
        write(tmp_path / "model.pth", content, [storage])
        with pytest.raises(ValueError, match=r"has 96 bytes and not 48|torch\.Object"):
            checkpoints.load(tmp_path / "model.pth")
    content = {"w": tensor(["no", "storage"], (1,), (1,))}
    write(tmp_path / "model.pth", content, [])
    with pytest.raises(ValueError, match="which is no storage"):
        checkpoints.load(tmp_path / "model.pth")


def test_a_truncated_file_is_refused(tmp_path, write):
    array = np.arange(24, dtype=np.float32)
    path = tmp_path / "model.pth"
    write(path, {"w": whole("0", array)}, [Storage("0", array)])
    complete = path.read_bytes()
    for size in range(0, len(complete), 7):
        path.write_bytes(complete[:size])
        with pytest.raises(ValueError, match=r"model\.pth"):
            checkpoints.load(path)


def test_mappings_that_hold_each_other_are_refused(tmp_path, write):
    content = {}
    content["self"] = content
    write(tmp_path / "model.pth", content, [])
    with pytest.raises(ValueError, match="occurs twice"):
        checkpoints.load(tmp_path / "model.pth")


def test_an_archive_that_pytorch_would_not_write_is_refused(tmp_path):
    path, array = tmp_path / "model.pth", np.zeros(1000, np.float32)
    write_zip(path, {"w": whole("0", array)}, [])
    with pytest.raises(ValueError, match="has no archive/data/0"):
        checkpoints.load(path)
    storage = Storage("0", array)
    write_zip(path, {"w": whole("0", array)}, [storage], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        checkpoints.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(ValueError, match=r"has one data\.pkl"):
        checkpoints.load(path)
    path.write_bytes(pickled({"w": 1}))
    with pytest.raises(ValueError, match="neither"):
        checkpoints.load(path)


def test_safetensors_are_read_and_checked(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.ones(4, ml_dtypes.bfloat16),
        "c": np.arange(3),
    }
    safetensors_numpy.save_file(tensors, path)
    found = checkpoints.load(path)
    assert_same(dict(sorted(found.items())), tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is no valid"):
        checkpoints.load(path)
