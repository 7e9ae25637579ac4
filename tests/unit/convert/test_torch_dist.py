"""`torch_dist` checkpoints: what is written is read by torch and by us, and what is broken is refused."""

import io
import itertools
import os
import pickle
import re
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_scope.convert import torch_dist, torch_dist_writer
from megatron_scope.convert.torch_dist import BACKEND_FILE, COMMON, METADATA, TorchDistFolder
from megatron_scope.convert.torch_dist_writer import TorchDistWriter
from megatron_scope.errors import DataError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
WHOLE = torch.arange(2 * 3 * 7 * 5, dtype=torch.float32).reshape(2, 3, 7, 5)


def write(path, values, cuts=None, empty=(), aliases=()):
    """A checkpoint of tensors by key, each cut along every dimension at the given places."""
    path.mkdir(exist_ok=True)
    with TorchDistWriter(path) as writer:
        for key, value in values.items():
            for place, block in pieces(value, (cuts or {}).get(key, [[]] * value.dim())):
                writer.add(key, tuple(value.shape), place, block)
        for key in empty:
            writer.add_empty(key)
        for key, name in aliases:
            writer.alias(key, name)
        writer.finish()
    return path


def pieces(value, cuts):
    """(place, contiguous copy) of the blocks that a tensor falls into."""
    found = [((), value)]
    for dim, places in enumerate(cuts):
        edges = [0, *sorted(set(places)), value.shape[dim]]
        found = [
            ((*place, start), block.narrow(dim, start, stop - start))
            for place, block in found
            for start, stop in itertools.pairwise(edges)
        ]
    return [(place, block.clone(memory_format=torch.contiguous_format)) for place, block in found]


def everything(size):
    return tuple(slice(0, length) for length in size)


@pytest.fixture
def folder(tmp_path):
    """Two tensors in several blocks."""
    values = {"w": WHOLE, "b": torch.arange(6, dtype=torch.bfloat16)}
    return write(tmp_path / "checkpoint", values, {"w": [[1], [], [2, 4], []], "b": [[4]]})


# ---- what is written


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_own_reader_reads_what_is_written(tmp_path, dtype):
    values = {"w": WHOLE.to(dtype), "b": torch.randn(6).to(dtype)}
    path = write(tmp_path / "c", values, {"w": [[1], [2], [3], [1, 4]], "b": [[2]]})
    found = {key: torch.full_like(value, float("nan")) for key, value in values.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert all(torch.equal(found[key], value) for key, value in values.items())


def test_torchs_own_reader_reads_empty_objects_and_other_names(tmp_path):
    path = write(tmp_path / "c", {"w": WHOLE}, {"w": [[1], [], [], []]}, ["w_extra/shard_0_2"], [("w", "v")])
    found = {"w": torch.zeros_like(WHOLE), "v": torch.zeros_like(WHOLE), "w_extra/shard_0_2": "something"}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert torch.equal(found["w"], WHOLE) and torch.equal(found["v"], WHOLE)
    assert found["w_extra/shard_0_2"] == [None]
    ours = TorchDistFolder(path)
    assert set(ours.tensors) == {"w", "v"}
    assert torch.equal(ours.read("v", (), everything(WHOLE.shape)), WHOLE)


def test_we_read_what_torchs_own_writer_writes(tmp_path):
    values = {"w": WHOLE, "b": torch.randn(6).bfloat16(), "step": 3}
    dcp.save(values, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    folder = TorchDistFolder(tmp_path / "c")
    folder.check_files()
    assert set(folder.tensors) == {"w", "b"} and folder.dtype("b") == torch.bfloat16
    assert torch.equal(folder.read("b", (), (slice(1, 5),)), values["b"][1:5])
    assert torch.equal(folder.read("w", (1, 2), (slice(0, 7), slice(1, 4))), WHOLE[1, 2, :, 1:4])


def test_nothing_is_readable_before_the_end(tmp_path):
    with TorchDistWriter(tmp_path) as writer:
        writer.add("w", (2, 3), (0, 0), torch.zeros(2, 3))
        writer.new_file()
        with pytest.raises(DataError, match="written to the end"):
            TorchDistFolder(tmp_path)
        writer.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"__0_0.distcp", COMMON, BACKEND_FILE, METADATA}
    assert TorchDistFolder(tmp_path).size("w") == (2, 3)


@pytest.mark.parametrize("by", ["size", "request"])
def test_blocks_go_on_in_another_file(tmp_path, monkeypatch, by):
    if by == "size":
        monkeypatch.setattr(torch_dist_writer, "_MAX_FILE_BYTES", 100)
    with TorchDistWriter(tmp_path) as writer:
        for layer in range(4):
            writer.add("w", (4, 20), (layer, 0), torch.full((1, 20), float(layer)))
            if by == "request":
                writer.new_file()
                writer.new_file()  # an empty one is none
        writer.finish()
    assert sorted(path.name for path in tmp_path.glob("*.distcp")) == [f"__{n}_0.distcp" for n in range(4)]
    found = TorchDistFolder(tmp_path).read("w", (), everything((4, 20)))
    assert torch.equal(found, torch.arange(4.0)[:, None].expand(4, 20))


# ---- what is read


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_region_is_read_of_any_blocks(tmp_path_factory, data):
    """Blocks that span layers, rows or columns, as other writers cut them."""
    cuts = [
        data.draw(
            st.lists(st.integers(1, max(1, length - 1)), max_size=2).filter(
                lambda c, n=length: n > 1 or not c
            )
        )
        for length in WHOLE.shape
    ]
    axes = data.draw(st.integers(0, 2))
    place = tuple(data.draw(st.integers(0, length - 1)) for length in WHOLE.shape[:axes])
    edges = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in WHOLE.shape[axes:]]
    region = tuple(slice(start, stop) for start, stop in edges)
    folder = TorchDistFolder(write(tmp_path_factory.mktemp("c"), {"w": WHOLE}, {"w": cuts}))
    found = folder.read("w", place, region)
    assert torch.equal(found, WHOLE[place][region])


def test_what_is_read_outlives_its_file(folder):
    found = TorchDistFolder(folder).read("w", (1,), everything(WHOLE.shape[1:]))
    for path in folder.glob("*.distcp"):
        path.unlink()
    found += 1
    assert torch.equal(found, WHOLE[1] + 1)


def test_size_and_dtype_are_told_without_reading(folder):
    for path in folder.glob("*.distcp"):
        path.unlink()
    found = TorchDistFolder(folder)
    assert (found.size("w"), found.dtype("w")) == ((2, 3, 7, 5), torch.float32)
    assert (found.size("b"), found.dtype("b")) == ((6,), torch.bfloat16)


# ---- what is refused


def problem(action):
    with pytest.raises(DataError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def read_all(path):
    folder = TorchDistFolder(path)
    for key in folder.tensors:
        folder.read(key, (), everything(folder.size(key)))


@pytest.mark.parametrize("missing", ["folder", "metadata"])
def test_a_folder_without_metadata_is_refused(folder, missing):
    path = folder / "other" if missing == "folder" else folder
    (folder / METADATA).unlink()
    assert problem(lambda: TorchDistFolder(path)) == (
        f"{path / METADATA} is missing; expected a Megatron checkpoint in torch_dist format, written to the "
        "end"
    )


def test_a_file_in_place_of_a_folder_is_refused(folder):
    assert problem(lambda: TorchDistFolder(folder / COMMON)).startswith(
        f"{folder / COMMON / METADATA} is missing"
    )


def test_a_folder_in_place_of_the_metadata_is_refused(folder):
    (folder / METADATA).unlink()
    (folder / METADATA).mkdir()
    assert problem(lambda: TorchDistFolder(folder)) == f"{folder / METADATA} cannot be read: Is a directory"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x80\x04\x95" + b"\xff" * 20,
        pickle.dumps({}),
        pickle.dumps(None),
        pickle.dumps([1, "two"]),
        pickle.dumps(Metadata({})),  # of a run that ended before the blocks were written
        b"\x00" * 1000,
    ],
)
def test_a_metadata_file_of_something_else_is_refused(folder, content):
    (folder / METADATA).write_bytes(content)
    assert problem(lambda: TorchDistFolder(folder)).startswith(
        f"{folder / METADATA} is not the metadata of a checkpoint"
    )


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_metadata_file_is_refused(folder, part):
    content = (folder / METADATA).read_bytes()
    (folder / METADATA).write_bytes(content[: int(part * len(content))])
    assert "is not the metadata of a checkpoint" in problem(lambda: TorchDistFolder(folder))


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (eval, "builtins.eval"),
        (torch.load, "torch.serialization.load"),
    ],
)
def test_a_metadata_file_that_would_run_something_is_refused_and_does_not(
    folder, tmp_path, protocol, function, name
):
    mark = tmp_path / "was here"
    words = {os.system: f"touch '{mark}'", eval: f"open({str(mark)!r}, 'w')", torch.load: str(mark)}
    (folder / METADATA).write_bytes(pickle.dumps([Runs(function, words[function])], protocol))
    message = problem(lambda: TorchDistFolder(folder))
    assert f"it names {name}, which no checkpoint needs" in message.replace("__builtin__", "builtins")
    assert not mark.exists()


def test_members_of_enumerations_are_read_as_every_python_writes_them():
    """Python 3.11.0 to 3.11.3 write a call of getattr."""
    for written in (WriteItemType.SHARD, Runs(getattr, WriteItemType, "SHARD")):
        read = torch_dist._MetadataUnpickler(io.BytesIO(pickle.dumps(written))).load()
        assert read is WriteItemType.SHARD


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.Size, "__init__"), "it takes '__init__' of .*Size.*, which is no enumeration"),
        ((WriteItemType, "__class__"), "__class__"),
    ],
)
def test_getattr_reaches_nothing_else(folder, arguments, said):
    (folder / METADATA).write_bytes(pickle.dumps(Runs(getattr, *arguments)))
    assert re.search(said, problem(lambda: TorchDistFolder(folder)))


def test_a_name_cannot_reach_through_an_allowed_one(folder):
    """From protocol 4 a pickle may name attributes of attributes."""
    parts = (b"torch.serialization", b"_get_layout.__globals__")
    short = b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts)
    (folder / METADATA).write_bytes(b"\x80\x04" + short + b"\x93.")
    assert "_get_layout.__globals__, which no checkpoint needs" in problem(lambda: TorchDistFolder(folder))


@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_a_truncated_file_is_refused_before_and_while_it_is_read(folder, keep):
    path = folder / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    message = problem(lambda: TorchDistFolder(folder).check_files())
    assert message == (
        f"{path} should have {len(content)} bytes, found {len(content[:keep])} bytes; copy it again"
    )
    assert problem(lambda: read_all(folder)).startswith(f"{path}")


def test_a_missing_file_is_refused_before_and_while_it_is_read(folder):
    path = folder / "__0_0.distcp"
    size = path.stat().st_size
    path.unlink()
    assert problem(lambda: TorchDistFolder(folder).check_files()) == (
        f"{path} should have {size} bytes, found no file; copy it again"
    )
    assert problem(lambda: read_all(folder)).startswith(f"{path}: w cannot be read (")


@pytest.mark.parametrize("fill", [b"\x00", b"\xff", b"PK\x03\x04"])
def test_a_file_of_the_right_length_but_other_content_is_refused(folder, fill):
    path = folder / "__0_0.distcp"
    size = path.stat().st_size
    path.write_bytes((fill * size)[:size])
    TorchDistFolder(folder).check_files()
    assert problem(lambda: read_all(folder)).startswith(f"{path}: w cannot be read (")


def change_metadata(folder, change):
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def place_of(metadata, key):
    return next(index for index in metadata.storage_data if index.fqn == key)


def test_a_block_that_the_metadata_leaves_out_is_refused(folder):
    change_metadata(folder, lambda metadata: metadata.state_dict_metadata["w"].chunks.pop())
    assert problem(lambda: read_all(folder)) == (
        f"{folder / METADATA} lists no block for {3 * 3 * 5} numbers of w"
    )


def test_a_block_that_lies_nowhere_is_refused(folder):
    change_metadata(folder, lambda metadata: metadata.storage_data.pop(place_of(metadata, "b")))
    assert problem(lambda: read_all(folder)) == (
        f"{folder / METADATA} does not say where a block of b lies; copy it again"
    )


def test_a_block_of_another_size_is_refused(folder):
    def exchange(metadata):
        metadata.storage_data[place_of(metadata, "b")] = metadata.storage_data[place_of(metadata, "w")]

    change_metadata(folder, exchange)
    message = problem(lambda: read_all(folder))
    assert "b has a block of torch.float32, size (1, 3, 2, 5)" in message and "(4,), contiguous" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_of_another_dtype_is_refused(folder, dtype):
    """Half of the bytes of longer numbers, or as many of another kind, would pass for numbers."""

    def change(metadata):
        metadata.state_dict_metadata["b"].properties.dtype = dtype

    change_metadata(folder, change)
    message = problem(lambda: read_all(folder))
    assert f"b has a block of torch.bfloat16, size (4,) and strides (1,); {METADATA} says {dtype}" in message


def test_a_place_beyond_the_end_is_refused(folder):
    def move(metadata):
        for info in metadata.storage_data.values():
            info.offset += 10_000_000

    change_metadata(folder, move)
    assert "should have" in problem(lambda: TorchDistFolder(folder).check_files())
    assert "cannot be read (" in problem(lambda: read_all(folder))


@pytest.mark.parametrize("after", [0, 3, 9, 20])
def test_an_interrupt_while_a_header_is_read_stays_one(folder, monkeypatch, after):
    """torch puts an error of its own in its place, which would pass for a damaged file."""
    pread, calls = os.pread, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == after + 1:
            signal.raise_signal(signal.SIGINT)
        return pread(*arguments)

    monkeypatch.setattr(torch_dist.os, "pread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_all(folder)


# ---- a disk that fills up


class Full:
    """A file on a disk with room for some bytes."""

    def __init__(self, file, room):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data):
        if not self.room:
            raise OSError(28, os.strerror(28))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 300, 2000, 5000])
def test_a_full_disk_is_an_error_of_the_file(tmp_path, monkeypatch, room):
    """torch's own complaint about the unfinished archive would hide the reason."""

    def open_full(path, mode, **options):
        return Full(open(path, mode, **options), room)

    monkeypatch.setattr(torch_dist_writer, "open", open_full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*/__0_0\.distcp'"):
        write(tmp_path / "c", {"w": torch.zeros(2000), "b": torch.zeros(9)})


def test_writes_that_stop_short_are_continued(tmp_path, monkeypatch):
    class Short(Full):
        def write(self, data):
            return self.file.write(data[:7])

    def open_short(path, mode, **options):
        return Short(open(path, mode, **options), 0)

    monkeypatch.setattr(torch_dist_writer, "open", open_short, raising=False)
    read = TorchDistFolder(write(tmp_path / "c", {"w": WHOLE})).read("w", (), everything(WHOLE.shape))
    assert torch.equal(read, WHOLE)
