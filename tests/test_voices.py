import io
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from experiments import audio
from experiments.data import sounds, voices
from experiments.learners import episodes

soundfile = pytest.importorskip("soundfile")

# Package: (folder, format, recordings) of each set.
SETS = {
    "klettres-data": [
        ("usr/share/klettres/de/alpha", "ogg", 20),
        ("usr/share/klettres/de/syllab", "ogg", 10),  # the same set
        ("usr/share/klettres/lt/alpha", "ogg", 80),  # more than are taken
        ("usr/share/klettres/tn/alpha", "ogg", 24),  # fewer than a set has
        ("usr/share/klettres/ar/alpha", "ogg", 26),
    ],
    "ktuberling-data": [
        ("usr/share/ktuberling/sounds/de", "wav", 25),
        ("usr/share/ktuberling/pics", "wav", 30),  # no voice
    ],
}
for _language, _name in zip(
    ("en", "es", "fr", "it", "ru"),
    ("en_US_f_A", "es_MX_f_A", "fr_CA_f_J", "it_IT_m_C", "ru_RU_f_I"),
    strict=True,
):
    SETS[f"asterisk-core-sounds-{_language}-wav"] = [
        (f"usr/share/asterisk/sounds/{_name}", "wav", 15),
        (f"usr/share/asterisk/sounds/{_name}/digits", "wav", 12),
        (f"usr/share/asterisk/sounds/{_name}/silence", "wav", 12),
    ]
# Those of 25 or more, in the order of their labels.
EXPECTED = {
    ("ar", "klettres"): ("test", 26),
    ("de", "klettres"): ("train", 30),
    ("de", "ktuberling"): ("train", 25),
    ("en", "asterisk"): ("train", 27),
    ("es", "asterisk"): ("train", 27),
    ("fr", "asterisk"): ("train", 27),
    ("it", "asterisk"): ("train", 27),
    ("lt", "klettres"): ("validation", 60),
    ("ru", "asterisk"): ("train", 27),
}
RATE = 2000


def tone(index):
    """Half a second; the height tells the set, an offset the recording."""
    number, recording = index
    t = np.arange(RATE // 2) / RATE
    return 0.3 * np.sin(2 * np.pi * (100 + 20 * number) * t) + 0.002 * recording


def member(name, content):
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
    return header.encode() + content + b"\n" * (len(content) % 2)


def write_package(path, contents):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=0) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": data.getvalue(),
    }
    path.write_bytes(b"!<arch>\n" + b"".join(member(*pair) for pair in members.items()))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    manual = root / "downloads" / "manual"
    manual.mkdir(parents=True)
    number = 0
    for package, sets in SETS.items():
        contents = {f"usr/share/doc/{package}/copyright": b"GPL"}
        for folder, extension, count in sets:
            number += 1
            for index in range(count):
                file = io.BytesIO()
                soundfile.write(file, tone((number, index)), RATE, format=extension)
                contents[f"{folder}/{index:03d}.{extension}"] = file.getvalue()
        write_package(manual / f"{package}_4%3a1.0-1_all.deb", contents)
    return root


def builder(data_dir):
    return voices.Voices(
        config="1s", data_dir=str(data_dir), file_format="array_record"
    )


def test_sets_are_in_the_split_of_their_language(data_dir):
    splits = sounds.load(builder(data_dir), num_mels=8, hop_seconds=0.1)
    episodes.check_disjoint({name: split.labels for name, split in splits.items()})
    assert all(split.images.shape[1:] == (10, 8, 1) for split in splits.values())
    found = {}
    for name, split in splits.items():
        for label, count in zip(
            *np.unique(split.labels, return_counts=True), strict=True
        ):
            found[int(label)] = name, int(count)
    assert [found[label] for label in sorted(found)] == list(EXPECTED.values())


def test_recordings_are_resampled_and_fitted(data_dir):
    prepared = builder(data_dir)
    prepared.download_and_prepare()
    examples = [e for e in prepared.as_data_source("train") if e["label"] == 2]
    assert len(examples) == 25
    number = 1 + len(SETS["klettres-data"])
    for example in examples:
        samples = example["audio"] / 32767
        assert samples.shape == (16_000,)
        # Half a second in the middle of a second.
        np.testing.assert_array_equal(samples[:3990], 0)
        np.testing.assert_array_equal(samples[-3990:], 0)
        inner = samples[4200:-4200] - samples[4200:-4200].mean()
        peak = np.abs(np.fft.rfft(inner, 16_000)).argmax()
        assert peak == pytest.approx(100 + 20 * number, abs=3)


def test_the_spectrograms_are_those_of_the_front_end(data_dir):
    prepared = builder(data_dir)
    split = sounds.load(prepared, num_mels=8, hop_seconds=0.1)["test"]
    example = prepared.as_data_source("test")[3]
    spectrogram = audio.log_mel(example["audio"] / 32767, num_mels=8, hop_seconds=0.1)
    expected = audio.ast_normalized(spectrogram)
    np.testing.assert_allclose(split.images[3, ..., 0], expected, atol=1e-3)
    assert int(split.labels[3]) == example["label"]


def test_missing_and_broken_packages_are_named(data_dir, tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "notes.txt").touch()  # of an empty folder TFDS speaks
    match = "has no klettres-data_.*apt-get download klettres-data ktuberling-data"
    with pytest.raises(FileNotFoundError, match=match):
        builder(tmp_path).download_and_prepare()
    wrong = manual / "klettres-data_1.deb"
    wrong.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"klettres-data_1.deb is no Debian package"):
        list(voices.files(wrong))
    wrong.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0\n"))
    with pytest.raises(ValueError, match=r"klettres-data_1.deb has no data.tar"):
        list(voices.files(wrong))


def test_damaged_packages_are_refused(data_dir, tmp_path):
    manual = tmp_path / "downloads" / "manual"
    shutil.copytree(data_dir / "downloads" / "manual", manual)
    known = next(name for name in voices.CHECKSUMS if name.startswith("klettres"))
    next(manual.glob("klettres-data_*")).rename(manual / known)
    with pytest.raises(ValueError, match=r"klettres-data_.*is damaged: its SHA-256"):
        builder(tmp_path).download_and_prepare()


def test_licences_are_told():
    for text in (voices.__doc__, voices.Voices.DESCRIPTION, voices.Voices.LICENSE):
        assert "GPL-2+" in text
        assert "CC BY-SA 3.0" in text


def test_nothing_imports_tensorflow(data_dir):
    code = (
        "import sys; from experiments.data import sounds, voices;"
        "builder = voices.Voices(config='1s', data_dir=sys.argv[1],"
        " file_format='array_record'); sounds.load(builder, num_mels=8);"
        "assert 'tensorflow' not in sys.modules"
    )
    path = [str(path) for path in sys.path]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path}; {code}", data_dir],
        check=True,
    )
