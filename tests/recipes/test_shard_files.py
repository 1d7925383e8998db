import gzip
import io
import tarfile

import fsspec
import pytest

from recipes.shard_files import Problem, Sample, TarSource, find_shards, split_name
from tests.recipes.shard_runs import write_shards


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


class Pipe(io.BytesIO):
    def seekable(self):
        return False

    def seek(self, *place):
        raise io.UnsupportedOperation("seek")


def contents(source, shard=0, start=0):
    return [dict(sample) for sample in source.rows(shard, start=start)]


MEMBERS = [
    ("a/1.txt", b"one"),
    ("a/1.seg.PNG", b"mask"),
    ("b/1.txt", b"other folder"),
    (".hidden", b"no data"),
    ("__index__", b"no data"),
    ("b/2.txt", b""),
]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_consecutive_members_with_a_key_are_a_sample(tmp_path, suffix):
    mode = "w:gz" if suffix == "tar.gz" else "w"
    url = write_tar(tmp_path / f"x.{suffix}", MEMBERS, mode)
    source = TarSource(url)
    assert contents(source) == [
        {"__key__": "a/1", "__url__": url, "txt": b"one", "seg.png": b"mask"},
        {"__key__": "b/1", "__url__": url, "txt": b"other folder"},
        {"__key__": "b/2", "__url__": url, "txt": b""},
    ]
    for start in range(4):
        assert contents(source, start=start) == contents(source)[start:]
    assert source.num_rows(0) == 3


def test_a_shard_behind_a_url_is_read_whether_it_can_seek_or_not(tmp_path, monkeypatch):
    local = write_tar(tmp_path / "x.tar", MEMBERS)
    with fsspec.open("memory://shards/x.tar", "wb") as file:
        file.write((tmp_path / "x.tar").read_bytes())
    source = TarSource("memory://shards/*.tar")
    assert list(source.shards) == ["memory:///shards/x.tar"]
    expected = [{**row, "__url__": source.shards[0]} for row in contents(TarSource(local))]
    assert contents(source) == expected
    pipe = Pipe((tmp_path / "x.tar").read_bytes())
    monkeypatch.setattr("recipes.shard_files._open", lambda url: io.BufferedReader(pipe))
    assert contents(source, start=1) == expected[1:]


def test_headers_alone_are_read_to_skip_and_to_count(tmp_path, monkeypatch):
    source = TarSource([str(path) for path in write_shards(tmp_path, (50,))])
    read = []
    original = tarfile.ExFileObject.__init__

    def spy(self, archive, member):
        read.append(member.name)
        original(self, archive, member)

    monkeypatch.setattr(tarfile.ExFileObject, "__init__", spy)
    assert source.num_rows(0) == 50
    assert not read
    assert next(source.rows(0, start=49))["txt"] == b"0-49"
    assert len(read) == 2


def test_rows_are_counted_once(tmp_path):
    (path,) = write_shards(tmp_path, (3,))
    source = TarSource(str(path))
    assert source.num_rows(0) == 3
    path.unlink()
    assert source.num_rows(0) == 3


def test_a_part_that_is_missing_is_an_error_that_says_what_is_there():
    sample = Sample(__key__="1", jpg=b"x", txt=b"")
    with pytest.raises(ValueError, match="it has no 'json', only jpg, txt"):
        sample["json"]
    assert sample.first("png", "txt", "jpg") == b""
    with pytest.raises(ValueError, match="it has no 'png or webp', only jpg, txt"):
        sample.first("png", "webp")
    with pytest.raises(ValueError, match="it has no 'txt', only nothing"):
        Sample()["txt"]


def damage(path, kind):
    """Damages a shard of samples of two members of 2 blocks each, and an end of 20 blocks."""
    content = path.read_bytes()
    if kind == "data":  # in the second member of sample 1
        path.write_bytes(content[: 512 * 8 + 700])
    elif kind == "header":
        path.write_bytes(content[: 512 * 10 + 99])
    elif kind == "between":
        path.write_bytes(content[: 512 * 10])
    elif kind == "flipped":
        path.write_bytes(content[: 512 * 10] + b"?" * 512 + content[512 * 11 :])
    elif kind == "gzip":
        packed = gzip.compress(content, 0)
        path.write_bytes(packed[: 512 * 11])
    elif kind == "html":
        path.write_bytes(b"<html>404</html>" * 99)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "num_good", "match"),
    [
        ("data", 1, r"sample in/0-1: .*unexpected end of data"),
        ("header", 1, r"sample in/0-1: the archive is cut off"),
        ("between", 1, r"sample in/0-1: the archive is cut off"),
        ("flipped", 1, r"sample in/0-1: damaged: (bad checksum|invalid header)"),
        ("gzip", 1, r"ended before the end-of-stream marker"),
        ("html", 0, r"damaged: (bad checksum|invalid header)"),
        ("empty", 0, r"the archive is cut off"),
        ("gone", 0, r"No such file"),
    ],
)
def test_damage_is_never_taken_for_the_end(tmp_path, kind, num_good, match):
    path, other = write_shards(tmp_path, (3, 1))
    source = TarSource([str(path), str(other)])
    damage(path, kind)
    found = []
    with pytest.raises(OSError, match=match):
        found.extend(source.rows(0))
    assert [row["txt"] for row in found] == [b"0-0", b"0-1", b"0-2"][:num_good]
    # A place for what is lost.
    assert source.num_rows(0) == num_good + 1
    assert len(contents(source, 1)) == 1


def test_repeated_member_costs_its_sample_only(tmp_path):
    members = [("1.txt", b"a"), ("1.txt", b"b"), ("2.txt", b"c")]
    first, second = TarSource(write_tar(tmp_path / "x.tar", members)).rows(0)
    assert first == Problem("1", "it has two members 'txt'")
    assert second["txt"] == b"c"


class Flaky:
    """Opens shards whose connection breaks so many times behind the first sample."""

    def __init__(self, path, failures, error):
        self.path, self.failures, self.error, self.pauses = path, failures, error, []

    def open(self, url):
        content = self.path.read_bytes()
        if self.failures:
            self.failures -= 1
            return io.BufferedReader(Broken(content[: 512 * 6 + 9], self.error))
        return io.BufferedReader(io.BytesIO(content))


class Broken(io.BytesIO):
    def __init__(self, content, error):
        super().__init__(content)
        self.error = error

    def readinto(self, buffer):
        number = super().readinto(buffer)
        if number == 0 and len(buffer):
            raise self.error
        return number


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    (path,) = write_shards(tmp_path, (3,))

    def make(failures, error):
        found = Flaky(path, failures, error)
        monkeypatch.setattr("recipes.shard_files._open", found.open)
        monkeypatch.setattr("time.sleep", found.pauses.append)
        return found

    return make


def test_remote_reads_are_repeated_with_growing_pauses(flaky):
    found = flaky(2, ConnectionError("reset"))
    source = TarSource("s3://bucket/x.tar", pause_s=0.5)
    assert [row["txt"] for row in source.rows(0)] == [b"0-0", b"0-1", b"0-2"]
    assert found.pauses == [0.5, 2.0]
    found = flaky(99, ConnectionError("reset"))
    with pytest.raises(OSError, match="reset"):
        list(source.rows(0))
    # Progress counts: the first sample came each time it was asked for, and none behind it.
    assert found.failures == 99 - 3


def test_what_is_not_there_or_is_local_is_not_tried_again(flaky, tmp_path):
    found = flaky(9, FileNotFoundError("404"))
    with pytest.raises(OSError, match="404"):
        list(TarSource("s3://bucket/x.tar", attempts=3).rows(0))
    found_local = flaky(9, OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        list(TarSource(str(found.path)).rows(0))
    assert found_local.failures == 8
    assert not found_local.pauses


def test_patterns(tmp_path):
    assert find_shards("s3://b/train-{0008..0010}.tar") == [
        *("s3://b/train-0008.tar", "s3://b/train-0009.tar", "s3://b/train-0010.tar")
    ]
    assert find_shards("s3://{a,b}/{1..2}.tar") == [
        *("s3://a/1.tar", "s3://a/2.tar", "s3://b/1.tar", "s3://b/2.tar")
    ]
    assert find_shards(["s3://b/1.tar", "https://c/2.tar?download=true"]) == [
        *("s3://b/1.tar", "https://c/2.tar?download=true")
    ]
    paths = [str(path) for path in write_shards(tmp_path)]
    (tmp_path / "notes.txt").write_text("")
    assert find_shards(str(tmp_path)) == find_shards(f"{tmp_path}/*.tar") == paths
    assert find_shards(f"{tmp_path}/part{{0..9}}-000000.tar")[:4] == paths


@pytest.mark.parametrize(
    ("urls", "match"),
    [
        ("x-{0..}.tar", r"braces hold a range \{000..123\} or a list \{a,b\}, got \{0..\} in 'x-"),
        ("x-{3..1}.tar", r"from the smaller number to the larger one, got \{3..1\}"),
        ("nowhere/x-{0..4}.tar", r"got 'nowhere/x-\{0..4\}.tar', 5 names of which none exists"),
        ("nowhere/*.tar", "urls must match shards, got 'nowhere/\\*.tar': none"),
        (["s3://a", "s3://a"], "every shard must be named once, got s3://a repeatedly"),
        ([], "0 names of which none exists"),
    ],
)
def test_wrong_patterns_are_refused(urls, match):
    with pytest.raises(ValueError, match=match):
        find_shards(urls)


@pytest.mark.parametrize("options", [{"attempts": 0}, {"pause_s": -1.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="attempts must be 1 or more and pause_s 0 or more, got"):
        TarSource("s3://a", **options)


def test_a_name_is_split_at_the_first_dot_behind_the_last_slash():
    assert split_name("a.b/c.D.Jpg") == ("a.b/c", "d.jpg")
    assert split_name("readme") == ("readme", "")
