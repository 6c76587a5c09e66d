"""Files that nobody honest wrote, each with its reader and what is said of it."""

import bz2
import io
import itertools
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

LONG = 4_000_000_000
NDARRAY = b"cnumpy\nndarray\n"
RECONSTRUCT = (
    b"cnumpy.core.multiarray\n_reconstruct\n" + NDARRAY + b"K\x00\x85C\x01b\x87R"
)
ENCODE = b"c_codecs\nencode\n"
DTYPE = b"cnumpy\ndtype\n"


def dtype(name, *state):
    state = state or ("<", None, None, None, -1, -1, 0)
    return DTYPE + pickle_of((name, False, True)) + b"R" + pickle_of((3, *state)) + b"b"


def pickle_of(value):
    """What pushes a value."""
    return pickle.dumps(value, 2)[2:-1]


def array(shape, kind, data):
    parts = RECONSTRUCT, b"(K\x01", pickle_of(shape), kind, b"\x89", data, b"tb"
    return b"".join(parts)


def forged_pointers():
    """An integer that a dtype's state makes an object of: a pointer."""
    field = DTYPE + pickle_of(("O8", False, True)) + b"R"
    field += pickle_of((3, "|", None, None, None, -1, -1, 63)) + b"b"
    state = (
        b"(K\x03X\x01\x00\x00\x00|N(X\x01\x00\x00\x00at}X\x01\x00\x00\x00a"
        + field
        + b"K\x00\x86sK\x08K\x08K\x1bt"
    )
    kind = DTYPE + pickle_of(("V8", False, True)) + b"R" + state + b"b"
    return array((1,), kind, b"C\x08" + b"\x41" * 8) + b"."


def nested_arrays(levels):
    inner = b"N"
    for _ in range(levels):
        inner = array((1,), dtype("O8", *OBJECT), b"](" + inner + b"e")
    return inner + b"."


OBJECT = ("|", None, None, None, -1, -1, 63)
PICKLES = {
    "pointers": (forged_pointers(), "dtype"),
    "bytes": (b"c__builtin__\nbytes\n(I%d\ntR." % LONG, "broken"),
    "ndarray": (NDARRAY + b"((I3000000000\nttR.", "it calls numpy.ndarray"),
    "uninitialised": (NDARRAY + b"((K\x08ttR.", "it calls numpy.ndarray"),
    "empty array": (RECONSTRUCT + b".", "before it tells its state"),
    "long empty array": (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + NDARRAY
        + b"(I3000000000\ntC\x01b\x87R.",
        "before it tells its state",
    ),
    "shape": (array((LONG,), dtype("u1"), b"C\x01a") + b".", "4000000000 bytes"),
    "shape of none": (array((0, LONG, -1), dtype("u1"), b"C\x00") + b".", "shape"),
    "fewer bytes": (array((3,), dtype("u2"), b"C\x04abcd") + b".", "of 6 bytes"),
    "more bytes": (array((1,), dtype("u2"), b"C\x04abcd") + b".", "of 2 bytes"),
    "no bytes": (array((LONG,), dtype("S0"), b"C\x00") + b".", "of no bytes"),
    "numbers as objects": (
        array((1,), dtype("O8", *OBJECT), b"C\x08aaaaaaaa") + b".",
        "1 objects is made of",
    ),
    "objects as numbers": (array((1,), dtype("u8"), b"]Na") + b".", "made of list"),
    "shared objects": (
        b"]("
        + b"N" * 20_000
        + b"eq\xf0"
        # Twice as many arrays as fit.
        + (array((20_000,), dtype("O8", *OBJECT), b"h\xf0") + b"0") * 6000
        + b"N.",
        "much more memory",
    ),
    "shared bytes": (
        b"X"
        + struct.pack("<I", 1 << 20)
        + b"a" * (1 << 20)
        + b"q\x010"
        + (ENCODE + b"h\x01X\x06\x00\x00\x00latin1\x86R") * 4000
        + b".",
        "much more memory",
    ),
    "shared pairs": (
        b"]("
        + b"K\x01K\x02\x86" * 9000
        + b"eq\x01"
        + b"ccollections\nOrderedDict\nh\x01\x85R" * 9000
        + b".",
        "much more memory",
    ),
    "nested arrays": (nested_arrays(3000), "more than 8 deep"),
    "truth": (array((1,), dtype("b1"), b"C\x01\x07") + b".", "truth values"),
    "no character": (
        array((1,), dtype("U1"), b"C\x04\xff\xff\xff\xff") + b".",
        "chara",
    ),
    "sub-array": (dtype("V8", "|", ("u1", (LONG,)), None, None, 8, 1, 0) + b".", "V8"),
    "unknown dtype": (dtype("M8", "<", None, None, None, -1, -1, 0) + b".", "'M8'"),
    "length": (b"\x8e" + struct.pack("<Q", 1 << 40) + b"abc.", "are to come"),
    "longest length": (b"\x8e" + b"\xff" * 8 + b"abc.", "are to come"),
    "text's length": (b"X" + struct.pack("<I", LONG) + b"abc.", "are to come"),
    "bytearray's length": (b"\x96" + struct.pack("<Q", 1 << 40) + b"a.", "are to come"),
    "negative length": (b"\x8b" + struct.pack("<i", -3) + b"abc.", "length of -3"),
    "frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", None),
    "memo": (b"Nr" + struct.pack("<I", 500_000_000) + b".", None),
    "memo that is not there": (b"j" + struct.pack("<I", 500_000_000) + b".", "broken"),
    "deep list": (b"]" * 500_000 + b"a" * 499_999 + b".", None),
    "itself": (b"]q\x00h\x00a.", None),
    "deep key": (b"})" + b"\x85" * 500_000 + b"Ns.", "a key of a mapping"),
    "list as key": (b"}]Ns.", "a key of a mapping"),
    "keys that collide": (
        b"}("
        + b"".join(
            b"\x8a\x0c" + (n * ((1 << 61) - 1)).to_bytes(12, "little") + b"N"
            for n in range(1, 100_000)
        )
        + b"u.",
        "a key of a mapping",
    ),
    "doubling": (
        b"]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(200)) + b".",
        None,
    ),
    "number": (b"I" + b"9" * 1_000_000 + b"\n.", "broken"),
    "call": (b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "builtins.eval"),
    "long name": (b"c" + b"a" * 100_000 + b"\nb\n.", "asks for aaa"),
    "instance": (b"(ios\nsystem\n.", "opcode b'i'"),
    "new": (NDARRAY + b")\x81.", "opcode b'\\\\x81'"),
    "extension": (b"\x82\x01.", "opcode b'\\\\x82'"),
    "persistent": (b"NQ.", "persistent id"),
    "state of a list": (b"]}b.", "gives a state to"),
    "protocol": (b"\x80\xffN.", "protocol 255"),
    "nothing": (b".", "broken"),
    "empty": (b"", "1 bytes are to come"),
    "mark": (b"(.", "broken"),
}


def npy(header, content=b"", version=b"\x01\x00"):
    if isinstance(header, str):
        header = header.encode()
        layout = "<H" if version[:1] == b"\x01" else "<I"
        header = struct.pack(layout, len(header)) + header
    return b"\x93NUMPY" + version + header + content


def described(shape, descr="'|O'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


ONE = pickle.dumps(np.array([1, "a"], object))
NPYS = {
    "shape": (npy(described((10**12,), "'<f8'")), "8000000000000 bytes"),
    "shape of texts": (npy(described((10**9, 10**9), "'<U8'"), b"abc"), "to come"),
    "negative": (npy(described((-1,), "'<f8'")), "shape"),
    "other shape": (npy(described((3,)), ONE), r"header says \(3,\)"),
    "other pickle": (npy(described((2,)), pickle.dumps([1, 2])), "no array of objects"),
    "other dtype": (npy(described((2,)), pickle.dumps(np.arange(2))), "no array of ob"),
    "structured": (npy(described((2,), "[('a', '|O')]"), ONE), "dtype"),
    "sub-array": (npy(described((1,), "('<f8', (1000000000,))")), "dtype"),
    "long dtype": (npy(described((1,), "'|S2000000000'")), "dtype"),
    "version": (npy(described((2,)), ONE, b"\x03\x00"), "version 3.0"),
    "header": (npy(struct.pack("<I", LONG) + b"abc", b"", b"\x02\x00"), "header of 40"),
    "no header": (npy("(" * 9000), "cannot read"),
    "code": (npy("__import__('os').getcwd()"), "cannot read"),
    "more": (npy(described((2,)), ONE + b"a"), "more bytes than"),
    "pointers": (npy(described((1,)), forged_pointers()), "dtype"),
}


def zip_of(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def storage(key="0", size=4, kind="FloatStorage"):
    """What pushes a storage, of a zip that has 16 bytes of each key."""
    pid = pickle_of("storage") + f"ctorch\n{kind}\n".encode() + pickle_of(key)
    return b"(" + pid + pickle_of("cpu") + pickle_of(size) + b"tQ"


def tensor(shape=(4,), strides=(1,), source=None, offset=0):
    rest = pickle_of(offset) + pickle_of(shape) + pickle_of(strides) + b"\x89}"
    return TENSOR + b"(" + (source or storage()) + rest + b"tR"


def mapping(**values):
    items = b"".join(pickle_of(name) + value for name, value in values.items())
    return b"}(" + items + b"u"


def torch(content, compression=zipfile.ZIP_STORED, **members):
    members = {f"a/{name}": value for name, value in members.items()}
    pickled = b"\x80\x02" + content + b"."
    found = {"a/data.pkl": pickled, "a/data/0": b"\1" * 16, "a/data/1": b"\0" * 16}
    return zip_of(found | members, compression)


def doubled(levels):
    """A persistent id whose repr doubles at each level."""
    return b")q\x00" + b"h\x00h\x00\x86q\x00" * levels + b"Q"


def deep_mappings(levels, name):
    """A tensor at each level of mappings, whose names add up."""
    content = tensor() + b"q\x010"
    for _ in range(levels):
        content += b"}(" + pickle_of("t") + b"h\x01" + pickle_of(name)
    return content + b"}" + b"u" * levels


def overlapping():
    """A thousand members that are the same bytes of the file."""
    content = mapping(
        **{
            f"t{n}": tensor((250_000,), (1,), storage(str(n), 250_000))
            for n in range(999)
        }
    )
    pickled = b"\x80\x02" + content + b"."
    raw = bytearray(zip_of({"a/data.pkl": pickled, "a/data/0": bytes(1_000_000)}))
    end = raw.rindex(b"PK\x05\x06")
    (start,) = struct.unpack("<I", raw[end + 16 : end + 20])
    second = raw.index(b"PK\x01\x02", start + 4)
    entry = bytes(raw[second:end])
    entries = b""
    for n in range(999):
        name = f"a/data/{n}".encode()
        head = bytearray(entry[:46])
        head[28:30] = struct.pack("<H", len(name))
        entries += bytes(head) + name
    found = raw[:second] + entries
    tail = bytearray(raw[end:])
    tail[8:12] = struct.pack("<HH", 1000, 1000)
    tail[12:16] = struct.pack("<I", len(found) - start)
    return bytes(found + tail)


CHECKPOINTS = {
    "memo": (
        torch(b"Nr" + struct.pack("<I", 500_000_000) + b"0" + mapping(w=tensor())),
        None,
    ),
    "repr": (torch(doubled(60)), "of no supported kind"),
    "two types": (
        torch(mapping(a=tensor(), b=tensor(source=storage(kind="IntStorage")))),
        "is 4 elements of torch.FloatStorage and 4 of torch.IntStorage",
    ),
    "two sizes": (
        torch(mapping(a=tensor(), b=tensor((2,), source=storage(size=2)))),
        "is 4 elements of torch.FloatStorage and 2",
    ),
    "two halves": (
        torch(
            mapping(
                a=tensor((8,), source=storage(size=8, kind="HalfStorage")), b=tensor()
            )
        ),
        "is 8 elements of torch.HalfStorage and 4",
    ),
    "two of a name": (
        torch(
            b"}("
            + pickle_of("a")
            + mapping(b=tensor())
            + pickle_of("a.b")
            + tensor()
            + b"u"
        ),
        "have the name 'a.b'",
    ),
    "a number and its text": (
        torch(b"}(K\x01" + tensor() + pickle_of("1") + tensor() + b"u"),
        "have the name '1'",
    ),
    "two paths of a name": (
        torch(
            mapping(**{"a.b": mapping(c=tensor()), "a": mapping(**{"b.c": tensor()})})
        ),
        "have the name 'a.b.c'",
    ),
    "stride 0": (torch(mapping(w=tensor((10**12,), (0,)))), "much larger"),
    "strides 0": (torch(mapping(w=tensor((10**6,) * 3, (0,) * 3))), "much larger"),
    "stride 0 in some": (torch(mapping(w=tensor((2, 10**10), (1, 0)))), "much larger"),
    "many of stride 0": (
        torch(mapping(**{f"w{n}": tensor((200_000,), (0,)) for n in range(99)})),
        "much larger",
    ),
    "no elements": (torch(mapping(w=tensor((0, 2**60), (1, 1)))), None),
    "too many axes": (
        torch(mapping(w=tensor((1,) * 4000, (1,) * 4000))),
        "a tensor has",
    ),
    "long shape": (torch(mapping(w=tensor((2**9000,), (0,)))), "a tensor has"),
    "true as offset": (
        torch(mapping(w=tensor(offset=True))),
        "a tensor has offset True",
    ),
    "truth": (
        torch(
            mapping(
                w=tensor((16,), source=storage(size=16, kind="BoolStorage")),
                v=tensor(source=storage("1")),
            ),
            **{"data/0": b"\x07" * 16},
        ),
        "truth values",
    ),
    "names": (torch(deep_mappings(5000, "n" * 100)), "is too long"),
    "one long name": (
        torch(
            mapping(
                **{"n" * 1_000_000: mapping(**{f"t{n}": tensor() for n in range(500)})}
            )
        ),
        "is too long",
    ),
    "compressed pickle": (
        torch(
            b"(" + b"N" * 50_000_000 + b"t0" + mapping(w=tensor()), zipfile.ZIP_DEFLATED
        ),
        "is compressed",
    ),
    "overlapping": (overlapping(), "larger than the file|[Oo]verlap"),
    "storage of no text": (
        torch(mapping(w=tensor(source=b"(" + pickle_of(("storage",)) + b"tQ"))),
        "of no supported kind",
    ),
    "metadata": (
        torch(
            mapping(
                w=TENSOR
                + b"("
                + storage()
                + b"K\x00K\x04\x85K\x01\x85\x89}}K\x01Nst"
                + b"R"
            )
        ),
        "metadata is not supported",
    ),
    "directory's size": (
        torch(mapping(w=tensor()))[:-10]
        + struct.pack("<I", LONG)
        + torch(mapping(w=tensor()))[-6:],
        "cannot read",
    ),
    "call": (torch(mapping(w=b"cos\nsystem\nX\x04\x00\x00\x00true\x85R")), "os.system"),
    "way out": (torch(mapping(w=tensor(source=storage("../../b")))), "has no a/data/"),
    "legacy": (
        b"".join(
            b"\x80\x02" + part + b"."
            for part in (
                pickle_of(0x1950A86A20F9469CFC6C),
                b"K\x01",
                b"}",
                mapping(w=tensor()),
                b"]" + pickle_of("0") + b"a",
            )
        )
        + struct.pack("<q", 2**61),
        "truncated",
    ),
}


def wav(samples=b"\0\0" * 100, rate=16_000, channels=1, kind=1, width=16, **sizes):
    align = channels * width // 8 % 65536
    form = struct.pack(
        "<HHIIHH", kind, channels, rate, rate * align % 2**32, align, width
    )
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", sizes.get("data", len(samples))) + samples
    return b"RIFF" + struct.pack("<I", sizes.get("riff", len(body))) + body


def flac(samples):
    """One that says that it has so many samples, of which there are none."""
    numbers = (16_000 << 44) | (15 << 36) | samples
    info = struct.pack(">HH6xQ16x", 4096, 4096, numbers)
    return b"fLaC" + b"\x80" + len(info).to_bytes(3, "big") + info


def floats(*values):
    return wav(np.array(values, "<f4").tobytes(), kind=3, width=32)


SOUNDS = {
    "cut": (wav()[:-20], "it is truncated"),
    "cut within its header": (wav()[:30], "it is truncated"),
    "cut before its samples": (wav()[:36], "truncated"),
    "cut where it is even": (wav(riff=2**32 - 1)[:-40], "it is truncated"),
    "data's size": (wav(data=2**32 - 1), "chunk b'data' has 4294967295 bytes"),
    "file's size": (wav(riff=2**32 - 1), "header says 4294967303 bytes"),
    "both sizes": (wav(riff=2**32 - 1, data=2**32 - 9), "it is truncated"),
    "smaller data": (wav(b"\1" * 200, data=100), "damaged"),
    "no samples": (wav(b""), "truncated or damaged"),
    "NaN": (floats(0, np.nan, 0.5), "NaN or infinite"),
    "infinite": (floats(0, -np.inf), "NaN or infinite"),
    "rate 1": (wav(rate=1), "1 samples a second"),
    "rate 0": (wav(rate=0), "cannot read"),
    "rate": (wav(rate=2_147_483_629), "2147483629 samples a second"),
    "channels": (wav(channels=60_000), "cannot read"),
    "no channels": (wav(channels=0), "cannot read"),
    "flac's length": (flac(2**36 - 1), "cannot read"),
    "short flac": (flac(1000), "truncated|cannot read"),
    "text": (b"<html>not found</html>", "cannot read"),
    "empty": (b"", "cannot read"),
    "two of samples": (
        wav(wav()[36:] + wav()[36:])[:36] + (wav()[36:] * 2),
        "truncated|twice",
    ),
    "ogg": (b"OggS\0\2" + b"\0" * 20 + b"\xff" + b"\xff" * 200, "within a page"),
    "au": (
        b".snd" + struct.pack(">5I", 24, 200, 3, 16_000, 1) + b"\0" * 200,
        "an? AU file",
    ),
}


def member(name, content, size=None):
    size = len(content) if size is None else size
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{size:<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def package(data, name="data.tar.xz", size=None):
    head = b"!<arch>\n" + member("debian-binary", b"2.0\n")
    return head + member(name, data, size)


def tar(*infos, **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", **options) as archive:
        for info, content in infos:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def named(name, content=b"abc", **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def resized(size):
    """A tar file whose header gives a size, as eleven digits or in binary."""
    found = bytearray(tar(named("a")))
    found[124:136] = size
    found[148:156] = b" " * 8
    found[148:156] = b"%06o\0 " % sum(found[:512])
    return bytes(found)


def xz_of(dictionary):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dictionary}]
    return lzma.compress(tar(named("a")), filters=filters)


WHOLE = tar(named("a", b"x" * 2000), named("b", b"y" * 2000))
BOMB = lzma.compress(bytes(1 << 28), preset=1)
PACKAGES = {
    "size": (package(b"abc", size=9_999_999_999), "has 9999999999 bytes"),
    "negative size": (package(b"abc", size=-5), "broken header"),
    "no size": (package(b"abc", size="many"), "broken header"),
    "size of another": (
        b"!<arch>\n" + member("debian-binary", b"2.0\n", 9_999_999_999),
        "has 9999999999 bytes",
    ),
    "name": (package(b"abc", name="\u00ff"), "cannot read"),
    "header's end": (package(lzma.compress(WHOLE)).replace(b"`\n", b"'\n"), "broken h"),
    "cut": (package(lzma.compress(WHOLE))[:-30], "it is truncated"),
    "cut and resized": (package(lzma.compress(WHOLE)[:-30]), "truncated"),
    "bomb": (package(BOMB), "would unpack to more"),
    "bomb of bz2": (package(bz2.compress(bytes(1 << 28)), "data.tar.bz2"), "would unp"),
    "dictionary": (package(xz_of(1 << 30)), "cannot read"),
    "unknown": (package(b"abc", "data.tar.zst"), "compressed as zst"),
    "cut between members": (package(WHOLE[:2560], "data.tar"), "truncated"),
    "cut within a member": (package(WHOLE[:1500], "data.tar"), "cannot read"),
    "damaged header": (
        package(WHOLE[:2570] + b"????" + WHOLE[2574:], "data.tar"),
        "damaged between two",
    ),
    "absolute": (package(tar(named("/etc/passwd")), "data.tar"), "leads out"),
    "up": (package(tar(named("usr/../../x")), "data.tar"), "leads out"),
    "pax": (
        package(tar(named("a" * 300), format=tarfile.PAX_FORMAT), "data.tar"),
        "member of type b'x'",
    ),
    "sparse": (package(tar(named("a", type=b"S")), "data.tar"), "member of type b'S'"),
    "device": (package(tar(named("a", type=b"3")), "data.tar"), "member of type b'3'"),
    "long name": (
        package(tar(named("a" * 9000), format=tarfile.GNU_FORMAT), "data.tar"),
        "name of 9001 bytes",
    ),
    "size in a tar": (
        package(resized(b"77777777777\0"), "data.tar"),
        "truncated|cannot",
    ),
    "negative size in a tar": (
        package(resized(b"\xff" * 10 + b"\xfe\x00"), "data.tar"),
        "-512 bytes",
    ),
    "huge size in a tar": (
        package(resized(b"\x80" + b"\x7f" * 11), "data.tar"),
        "truncated|cannot",
    ),
    "text": (b"<html>", "is no Debian package"),
}


def csv(text):
    return text.encode() if isinstance(text, str) else text


TABLES = {
    name: (csv(text), message)
    for name, (text, message) in {
        "up": ("file,label\n../../etc/passwd,a\n", "leads out"),
        "up and down": ("file,label\na/../../b,a\n", "leads out"),
        "absolute": ("file,label\n/etc/passwd,a\n", "leads out"),
        "Windows": ("file,label\n..\\..\\b,a\n", "leads out"),
        "drive": ("file,label\nC:\\b,a\n", "leads out"),
        "folder": ("file,label\n.,a\n", "leads out"),
        "no column": ("file,name\na,b\n", "no column called label"),
        "no field": ("file,label\na.wav\n", "line 2 has not one field"),
        "empty field": ("file,label\n,a\n", "line 2 has not one field"),
        "more fields": ("file,label\na,b,c\n", "line 2 has not one field"),
        "twice": ("file,label\na,b\na,c\n", "names 'a' twice"),
        "no rows": ("file,label\n", "no rows"),
        "empty": ("", "no column"),
        "long field": ("file,label\n" + "a" * 200_000 + ",b\n", "field"),
        "no text": (b"file,label\n\xff\xfe,a\n", "cannot read"),
        "zero": (b"file,label\na\0b,a\n", "cannot read"),
    }.items()
}


def archive(name="a.wav", content=b"abc", compression=zipfile.ZIP_DEFLATED, **more):
    table = f"file,label\n{name},x\n"
    members = {"zipped/table.csv": table, f"zipped/{name}": content}
    return zip_of(members | more, compression)


def changed(raw, field, value, layout="<I"):
    """A zip whose last entry of the directory says something else."""
    raw = bytearray(raw)
    place = raw.rindex(b"PK\x01\x02") + field
    raw[place : place + struct.calcsize(layout)] = struct.pack(layout, value)
    return bytes(raw)


ZIPS = {
    "bomb": (archive(content=bytes(300 << 20)), "would unpack to 314572800"),
    "size": (changed(archive(), 24, LONG), "would unpack to|cannot read"),
    "both sizes": (changed(changed(archive(), 24, LONG), 20, LONG), "more than its"),
    "damaged": (
        archive(compression=zipfile.ZIP_STORED).replace(b"abc", b"abd"),
        "cannot read",
    ),
    "encrypted": (changed(archive(), 8, 1, "<H"), "cannot read"),
    "method": (changed(archive(), 10, 99, "<H"), "cannot read"),
    "place": (changed(archive(), 42, LONG), "cannot read"),
    "stored size": (
        changed(
            changed(archive(compression=zipfile.ZIP_STORED), 24, LONG),
            *(20, LONG),
        ),
        "more than its zip",
    ),
    "directory's size": (
        archive()[:-10] + struct.pack("<I", LONG) + archive()[-6:],
        "cannot read",
    ),
    "cut": (archive()[:-30], "cannot read"),
    "up": (archive(**{"../../x": b""}), "leads out"),
    "absolute": (archive(**{"/x": b""}), "leads out"),
    "slashes": (archive(**{"//x": b""}), "member called"),
    "folders": (archive(**{"a/" * 30_000 + "b": b""}), "member called"),
    "name in the table": (archive("../table.csv"), "leads out"),
    "not there": (zip_of({"zipped/table.csv": "file,label\na,b\n"}), "no such file"),
    "no table": (zip_of({"zipped/x": ""}), "no such file"),
    "text": (b"<html>", "cannot read"),
}


def png(width, height):
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "png")
    raw = file.getvalue()
    head = b"IHDR" + struct.pack(">II", width, height) + raw[24:29]
    return raw[:12] + head + struct.pack(">I", zlib.crc32(head)) + raw[33:]


def picture(form):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 99, 199)).save(file, form)
    return file.getvalue()


PICTURES = {
    "pixels": (png(60_000, 60_000), "cannot read"),
    "some pixels": (png(9000, 9000), "9000x9000 pixels"),
    "no pixels": (png(0, 0), "cannot read"),
    "cut png": (picture("png")[:60], "cannot read"),
    "cut jpeg": (picture("jpeg")[:-50], "cannot read"),
    "gif": (picture("gif"), "cannot read"),
    "eps": (picture("eps"), "cannot read"),
    "tiff": (picture("tiff"), "cannot read"),
    "text": (b"<html>", "cannot read"),
}

# Reader: end of the file's name, and the cases: content, and what is said of it, or
# None if it can be read.
CASES = {
    "pickled": ("pkl", PICKLES),
    "npy": ("npy", NPYS),
    "checkpoint": ("pth", CHECKPOINTS),
    "sound": ("wav", SOUNDS),
    "package": ("deb", PACKAGES),
    "table": ("csv", TABLES),
    "zipped": ("zip", ZIPS),
    "picture": ("png", PICTURES),
}
assert all(itertools.chain(*(cases for _, cases in CASES.values())))
