"""What a certificate says in two lines, and which token ids its logits are of."""

import numpy as np
import pytest

from megatron_scope.certificate import _read_tokens, describe
from megatron_scope.errors import DataError

EQUAL = {"name": "a", "equal": True, "largest_difference": 0.0}
LOGITS = {
    "tensor": 2,
    "pipeline": 1,
    "expert": 4,
    "largest_difference": 1.234e-6,
    "limit": 2e-5,
    "within_limit": True,
}


def certificate(*each, logits):
    tensors = {"compared": len(each), "equal": sum(one["equal"] for one in each), "each": list(each)}
    return {"tensors": tensors, "logits": logits}


def test_equal_models_are_said_to_be():
    assert describe(certificate(EQUAL, EQUAL, logits=LOGITS)).splitlines() == [
        "2 of 2 tensors are equal bit for bit",
        "logits differ by up to 1.23e-06 (limit 2.00e-05) at TP 2 x PP 1 x EP 4",
    ]


def test_the_first_tensor_that_differs_is_named():
    wrong = [
        {"name": name, "equal": False, "largest_difference": value} for name, value in (("b", 0.25), ("c", 1))
    ]
    assert describe(certificate(EQUAL, *wrong, logits={"skipped": "not asked for"})).splitlines() == [
        "1 of 3 tensors are equal bit for bit; b differs by up to 0.25",
        "logits not compared: not asked for",
    ]


def test_a_number_that_is_none_differs_by_infinity():
    wrong = {"name": "b", "equal": False, "largest_difference": float("inf")}
    first, _ = describe(certificate(wrong, logits=LOGITS)).splitlines()
    assert first == "0 of 1 tensors are equal bit for bit; b differs by up to inf"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_token_ids_are_read_as_they_are(tmp_path, dtype):
    tokens = np.arange(6, dtype=dtype).reshape(2, 3)
    np.save(tmp_path / "t.npy", tokens)
    assert np.array_equal(_read_tokens(str(tmp_path / "t.npy")), tokens)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not a NumPy file of one array; expected one written by numpy.save"),
        (b"garbage", "is not a NumPy file of one array; expected one written by numpy.save"),
        (np.zeros((2, 3)), "holds float64 (2, 3); expected token ids as integers [sequences, length]"),
        (np.zeros(3, dtype=np.int64), "holds int64 (3,); expected token ids as integers"),
        (np.zeros((0, 3), dtype=np.int64), "holds int64 (0, 3); expected token ids as integers"),
        (np.array([[{}]], dtype=object), "is not a NumPy file of one array; expected one written by"),
    ],
)
def test_token_ids_that_are_none_are_refused(tmp_path, content, said):
    path = tmp_path / "t.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError) as raised:
        _read_tokens(str(path))
    assert str(raised.value).startswith(f"{path} {said}") and "\n" not in str(raised.value)
