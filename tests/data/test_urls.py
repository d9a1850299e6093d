"""Remote shards: fetched whole, verified by their index, tried again, kept within a limit, named where they fail."""

import hashlib
import itertools
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ratiograph.data import remote
from ratiograph.data.embedded import check_local, resolve
from ratiograph.data.images import encode_png
from ratiograph.data.remote import RemoteShard
from ratiograph.data.shards import INDEX, write_shards
from ratiograph.data.stream import ShardStream, load_all


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def folder(tmp_path):
    """Four shards of ten samples; sample k has pixels and label k."""
    samples = [
        {"__key__": f"{k:02d}", "png": encode_png(np.full((4, 4), k, np.uint8)), "cls": b"%d" % k} for k in range(40)
    ]
    write_shards(tmp_path / "web", "set", samples, 4)
    return tmp_path / "web"


class Server(ThreadingHTTPServer):
    """Serves the files of ``folder``. ``refusals[name]`` requests of a file are answered with ``answer`` first."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.refusals, self.answer, self.asked = folder, {}, 503, []
        self.cut = 0  # bytes that are left out of every file

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.asked.append(name)
        path = self.server.folder / name
        if self.server.refusals.get(name, 0) > 0:
            self.server.refusals[name] -= 1
            return self.send_error(self.server.answer)
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) - self.server.cut] if name != INDEX else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def labels(stream, size, count, start=0):
    batches = stream.batches(size, 3, start)
    found = [batch.condition.labels.tolist() for batch in itertools.islice(batches, count)]
    batches.close()
    return list(itertools.chain(*found))


def local_labels(folder, count):
    return labels(ShardStream(urls=f"{folder}/set-{{000000..000003}}.tar", shuffle_buffer=5), 8, count)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_the_local_ones(server, folder, workers):
    server.refusals = {"set-000001.tar": 2, "set-000002.tar": 1, INDEX: 2}
    stream = ShardStream(urls=server.url + "/set-{000000..000003}.tar", shuffle_buffer=5, workers=workers)
    assert labels(stream, 8, 20) == local_labels(folder, 20)
    assert server.asked.count("set-000001.tar") == 3  # two refusals, and once for all processes and epochs
    assert server.asked.count("set-000003.tar") == 1


def test_a_resumed_stream_fetches_what_it_reads_alone(server, folder):
    """Shards that fill the last epoch's end; the index counts the others."""
    stream = ShardStream(urls=server.url + "/set-{000000..000003}.tar", shuffle_buffer=0, prefetch=1)
    assert labels(stream, 1, 1, start=30) == local_labels_unshuffled(folder)[30:31]
    assert len({name for name in server.asked if name != INDEX}) <= 2


def local_labels_unshuffled(folder):
    return labels(ShardStream(urls=f"{folder}/set-{{000000..000003}}.tar", shuffle_buffer=0), 40, 1)


def test_without_an_index_shards_are_counted_by_fetching_them(server, folder):
    (folder / INDEX).unlink()
    stream = ShardStream(urls=server.url + "/set-{000000..000003}.tar", shuffle_buffer=5)
    assert labels(stream, 8, 2, start=40) == local_labels(folder, 7)[40:]


def test_several_kinds_of_places_are_one_data_set(server, folder):
    places = [f"{folder}/set-000000.tar", f"pipe:cat {folder}/set-00000{{1,2}}.tar", f"{server.url}/set-000003.tar?k=1"]
    images, classes = load_all("::".join(places))
    assert classes.tolist() == list(range(40))
    assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == list(range(40))


def test_a_cut_transfer_is_tried_again_and_never_left_behind(server, cache):
    server.cut = 100
    with pytest.raises(ValueError, match=r"set-000000\.tar cannot be fetched, after 5 tries: .* bytes"):
        resolve(f"{server.url}/set-000000.tar")
    assert server.asked.count("set-000000.tar") == 5
    assert [path.name for path in cache.glob("*/set*")] == []
    assert [path.name for path in cache.glob("*/.*part")] == []
    server.cut = 0
    assert [path.name for path in resolve(f"{server.url}/set-000000.tar")] == ["set-000000.tar"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 8])
def test_a_damaged_copy_leaves_the_cache(server, folder, cache, workers, start):
    """A transfer that is cut where nobody can tell, with a middle or without an end: rerunning helps."""
    (folder / INDEX).unlink()
    stream = ShardStream(urls=f"{server.url}/set-000000.tar", workers=workers)
    whole = (folder / "set-000000.tar").read_bytes()
    for damaged in (whole[:9000], whole.replace(b"IDAT", b"JDAT")):
        (folder / "set-000000.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match="This copy was removed from the cache"):
            labels(stream, 8, 2, start)
        assert not list(cache.glob("*/set*"))
    (folder / "set-000000.tar").write_bytes(whole)
    assert sorted(labels(stream, 10, 1)) == list(range(10))


def test_a_copy_that_is_not_what_was_asked_for_stays(server, cache):
    with pytest.raises(ValueError, match=r"Set ShardStream\.channels"):
        labels(ShardStream(urls=f"{server.url}/set-000000.tar", channels=3), 8, 1)
    assert len(list(cache.glob("*/set*"))) == 1


@pytest.mark.parametrize("urls", ["{p,q}ipe:touch ran", "a.tar::{pipe:,}touch ran", "pip{e:touch ran,x}"])
def test_braces_make_no_command(urls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="becomes a command by its braces: begin it with pipe:"):
        resolve(urls)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["many", "-1", "nan"])
def test_a_size_of_the_cache_that_is_no_number_is_named(server, monkeypatch, value):
    monkeypatch.setenv("RATIOGRAPH_CACHE_GIGABYTES", value)
    with pytest.raises(ValueError, match=f"RATIOGRAPH_CACHE_GIGABYTES is '{value}': give a number of gigabytes"):
        resolve(f"{server.url}/set-000000.tar")
    assert server.asked == []


def test_without_a_home_the_cache_must_be_named(monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ValueError, match="set the environment variable RATIOGRAPH_CACHE"):
        remote.cache_folder()


def test_waits_double(monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    with pytest.raises(ValueError, match="cannot be fetched, after 5 tries"):
        resolve("pipe:exit 3")
    assert waits == [0, 1, 2, 4, 8]


@pytest.mark.parametrize(("answer", "tries"), [(404, 1), (403, 1), (429, 5), (500, 5)])
def test_what_cannot_pass_is_not_tried_again(server, answer, tries):
    server.refusals, server.answer = {"set-000000.tar": 99}, answer
    with pytest.raises(ValueError, match=rf"after {tries} tries: the server says {answer}"):
        resolve(f"{server.url}/set-000000.tar")
    assert server.asked.count("set-000000.tar") == tries


def test_a_shard_is_what_its_index_says(server, folder, cache):
    index = json.loads((folder / INDEX).read_text())
    data = bytearray((folder / "set-000002.tar").read_bytes())
    data[700] ^= 1
    (folder / "set-000002.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"set-000002\.tar cannot be fetched.*SHA-256"):
        resolve(f"{server.url}/set-000002.tar")
    index["shards"]["set-000002.tar"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / INDEX).write_text(json.dumps(index))
    (path,) = resolve(f"{server.url}/set-000002.tar")
    assert path.read_bytes() == data
    path.write_bytes(data[:-512])  # someone else's mistake: the cached copy has another size than the index says
    assert resolve(f"{server.url}/set-000002.tar")[0].read_bytes() == data


def test_what_is_cached_is_used_while_the_server_is_away(server, folder):
    stream = ShardStream(urls=server.url + "/set-{000000..000003}.tar", shuffle_buffer=5)
    assert labels(stream, 8, 5) == local_labels(folder, 5)
    server.refusals = {path.name: 99 for path in folder.iterdir()}
    assert labels(stream, 8, 5) == local_labels(folder, 5)


def test_an_unreachable_server_is_named_without_its_secrets():
    with pytest.raises(ValueError, match=r"Shard http://127\.0\.0\.1:9/x/") as caught:
        resolve("http://name:secret@127.0.0.1:9/x/a.tar?signature=secret")
    assert "secret" not in str(caught.value)


def test_a_command_that_fails_says_why():
    with pytest.raises(ValueError, match=r"Shard pipe:echo some; cat /none \| cat cannot be fetched.*/none"):
        resolve("pipe:echo some; cat /none | cat")


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"s3://bucket/a\.tar cannot be fetched.*'aws' is not installed"):
        resolve("s3://bucket/a.tar")


def test_s3_is_read_by_aws(tmp_path, folder, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "aws"
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && cat {folder}/${{3#s3://bucket/}}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert load_all("s3://bucket/set-{000001,000000}.tar")[1].tolist() == [*range(10, 20), *range(10)]
    with pytest.raises(ValueError, match=r"s3://bucket/none\.tar cannot be fetched, after 5 tries: 'aws' ended"):
        resolve("s3://bucket/none.tar")


def test_more_bytes_than_a_shard_can_have_are_not_taken(monkeypatch, cache):
    monkeypatch.setattr(remote, "LARGEST_SHARD", 10_000)
    with pytest.raises(ValueError, match="after 1 tries: more than 10000 bytes came"):
        resolve("pipe:cat /dev/zero")
    assert not list(cache.glob("*/*.tar"))
    assert not list(cache.glob("*/.*part"))


def test_the_cache_loses_what_was_used_longest_ago(server, folder, cache, monkeypatch):
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    monkeypatch.setenv("RATIOGRAPH_CACHE_GIGABYTES", str(2.5 * max(sizes.values()) / 1e9))
    monkeypatch.setattr(remote, "IN_USE", 0)

    def use(number):
        (path,) = resolve(f"{server.url}/set-00000{number}.tar")
        time.sleep(0.01)
        return path

    use(0), use(1), use(0)
    use(2)
    assert sorted(path.name for path in cache.glob("*/*.tar")) == ["set-000000.tar", "set-000002.tar"]
    use(1)
    assert sorted(path.name for path in cache.glob("*/*.tar")) == ["set-000001.tar", "set-000002.tar"]
    assert server.asked.count("set-000000.tar") == 1
    assert server.asked.count("set-000001.tar") == 2


def test_a_shard_in_use_is_kept(server, cache, monkeypatch):
    monkeypatch.setenv("RATIOGRAPH_CACHE_GIGABYTES", "0")
    resolve(server.url + "/set-{000000..000003}.tar")
    assert len(list(cache.glob("*/*.tar"))) == 4


def test_places_do_not_share_a_folder_and_names_stay_inside_it(cache):
    places = ["http://a/x/s.tar", "http://b/x/s.tar", "pipe:cat x", "pipe:cat y", "https://a/x/..", "https://a/x/.lock"]
    paths = [RemoteShard(place).path for place in places]
    assert len({path.parent for path in paths}) == len(places)
    assert all(path.parent.parent == cache and path.resolve().is_relative_to(cache.resolve()) for path in paths)
    signed = {RemoteShard(f"http://a/x/s.tar?signature={k}").path for k in range(3)}
    assert signed == {paths[0]}


@pytest.mark.parametrize("urls", ["{0..99999999999}.tar", "{0..9999}/{0..9999}.tar", "a.tar::" + 30 * "{a,b}"])
def test_braces_that_name_shards_without_end_are_refused(urls):
    with pytest.raises(ValueError, match=r"names more than 1,000,000 shards"):
        check_local(urls)


def test_braces_of_many_names():
    with pytest.raises(ValueError, match=r"1040 of 1040 shards do not exist, the first is a/3\.tar"):
        check_local("{a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q,r,s,t,u,v,w,x,y,z}/{3..42}.tar")
