"""Whether the servers' model is the student, before any byte is sent: SGLang leaves out tensors that it does
not know without a word, and takes another architecture's.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.errors import DataError, SyncError
from megatron_scope.records import ServedModel, WeightBucket


def check_served(served: ServedModel, architecture: str, buckets: Iterable[WeightBucket]) -> None:
    """SyncError where the server tells of another architecture, or the folder that it was started with, if it
    can be read from here, has other tensors than the buckets.
    """
    where = f"{served.url}: serves {served.model_path!r}"
    mend = "start the server with the student's model, or mend rollout.servers"
    if served.architectures and architecture not in served.architectures:
        raise SyncError(f"{where}, a {served.architectures[0]}; the student is a {architecture}: {mend}")
    try:
        sizes = _sizes(served.model_path)
    except DataError:
        return
    for bucket in buckets:
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            found = sizes.pop(name, None)
            if found != shape:
                has = "no" if found is None else f"{list(found)} as size of"
                raise SyncError(f"{where}, which has {has} {name}; the student's is {list(shape)}: {mend}")
    if sizes:
        raise SyncError(f"{where}, which has {min(sizes)}; the student has no such tensor: {mend}")


def _sizes(path: str) -> dict[str, tuple[int, ...]]:
    """The size of each tensor that counts, by the headers of the folder's files; DataError where it cannot
    be read.
    """
    folder = HfFolder(path)
    try:
        names = set(folder.file_of) - folder.redundant(folder.file_of)
        return {name: tuple(folder.slice(name).get_shape()) for name in names}
    finally:
        folder.close()
