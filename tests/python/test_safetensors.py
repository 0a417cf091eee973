# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors against the safetensors package, and files made to hurt."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from vimcore import _core

safetensors_numpy = pytest.importorskip("safetensors.numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")
safe_open = pytest.importorskip("safetensors").safe_open

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
SHAPES = [(), (1,), (7,), (0,), (3, 5), (2, 0, 4), (2, 3, 4, 5), (1, 2, 1, 2, 1, 2, 1, 2)]


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits of that type (NaN payloads included); booleans are 0 or 1."""
    rng = np.random.default_rng(seed)
    if dtype == "?":
        return rng.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape).copy()


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def collection() -> dict[str, np.ndarray]:
    return {f"{dtype}.{i}": tensor(dtype, shape, i) for dtype in DTYPES for i, shape in enumerate(SHAPES)}


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    metadata = {"format": "np", "text": 'a "quote" \\ \n \u00e9 \U0001f600', "": ""}
    safetensors_numpy.save_file(collection(), path, metadata)
    tensors, got = _core.read_safetensors(path)
    assert got == metadata
    assert tensors.keys() == collection().keys()
    for name, value in collection().items():
        same(tensors[name], value)


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    metadata = {"vimcore.config": '{"a": [1, 2]}', "text": 'a "quote" \\ \n \x01 \u00e9 \U0001f600'}
    _core.write_safetensors(path, collection(), metadata)
    with safe_open(path, "np") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == collection().keys()
        for name, value in collection().items():
            same(file.get_tensor(name), value)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_round_trip_of_odd_names_and_no_tensors(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    names = ["", " ", "a/b", 'x"y', "tab\t", "\u00e9\u6f22\U0001f600", "n" * 4096]
    tensors = {name: tensor("f4", (i,), i) for i, name in enumerate(names)}
    _core.write_safetensors(path, tensors, {})
    got, metadata = _core.read_safetensors(path)
    assert metadata == {}
    assert got.keys() == tensors.keys()
    for name in names:
        same(got[name], tensors[name])
    _core.write_safetensors(path, {}, {})
    assert _core.read_safetensors(path) == ({}, {})


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    """numpy has no bfloat16: the file is made by hand, and comes back as float32 with the same upper half."""
    bits = np.arange(0, 65536, 257, dtype=np.uint16)
    header = {"a": {"dtype": "BF16", "shape": [16, 16], "data_offsets": [0, 512]}}
    path = tmp_path / "a.safetensors"
    path.write_bytes(build(json.dumps(header), bits.tobytes()))
    tensors, _ = _core.read_safetensors(str(path))
    assert tensors["a"].shape == (16, 16)
    value = tensors["a"]
    got = value.view(np.uint32) >> 16 if value.dtype == np.float32 else value.view(np.uint16)
    np.testing.assert_array_equal(got.ravel(), bits)


def test_bfloat16_of_the_package_both_ways(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    values = torch.from_numpy(np.arange(-600, 600).astype(np.int16).reshape(30, 40)).view(torch.bfloat16)
    safetensors_torch.save_file({"a": values, "b": values[0].half()}, path)
    tensors, _ = _core.read_safetensors(path)
    assert np.array_equal(
        tensors["a"].view(np.uint32) >> 16, values.view(torch.int16).numpy().view(np.uint16)
    )
    same(tensors["b"], values[0].half().numpy())
    _core.write_safetensors(path, {"a": values, "b": values[0].half()}, {})
    loaded = safetensors_torch.load_file(path)
    assert loaded["a"].dtype == torch.bfloat16
    assert torch.equal(loaded["a"].view(torch.int16), values.view(torch.int16))
    assert loaded["b"].dtype == torch.float16


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_8_bit_floats_of_the_package_both_ways(name: str, tmp_path: Path) -> None:
    """numpy has none of them: they come back as float32, every one of the 256 as torch widens it."""
    path = str(tmp_path / "a.safetensors")
    values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).reshape(16, 16)
    safetensors_torch.save_file({"a": values, "one": values[3, 4].clone()}, path)
    tensors, _ = _core.read_safetensors(path)
    np.testing.assert_array_equal(tensors["a"], values.float().numpy())
    assert tensors["a"].dtype == np.float32
    assert tensors["one"].shape == ()
    header, _ = _core.safetensors_header(path)
    assert {kind for _, kind, _ in header} == {name.replace("float", "f").removesuffix("fn")}
    _core.write_safetensors(path, {"a": values}, {})
    loaded = safetensors_torch.load_file(path)["a"]
    assert loaded.dtype == values.dtype
    assert torch.equal(loaded.view(torch.uint8), values.view(torch.uint8))


def test_complex_numbers_of_the_package_both_ways(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    values = torch.view_as_complex(torch.from_numpy(tensor("f4", (3, 5, 2))))
    safetensors_torch.save_file({"a": values, "none": values[:0]}, path)
    tensors, _ = _core.read_safetensors(path)
    same(tensors["a"], values.numpy())
    same(tensors["none"], values[:0].numpy())
    _core.write_safetensors(path, tensors, {})
    same(safetensors_torch.load_file(path)["a"].numpy(), values.numpy())


def test_every_type_of_the_package_is_tested() -> None:
    """A new release of safetensors may bring new ones."""
    known = {"bfloat16", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
    known |= {str(torch.from_numpy(np.zeros(1, dtype)).dtype).removeprefix("torch.") for dtype in DTYPES}
    assert {str(dtype).removeprefix("torch.") for dtype in safetensors_torch._TYPES.values()} == known


def test_every_element_is_aligned_in_our_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _core.write_safetensors(str(path), collection(), {"pad": "x"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % np.dtype(name.split(".")[0]).itemsize == 0


# ---- damaged and hostile files ----


def build(header: str | bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A file from a header text, data, and the header length to claim."""
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: object, begin: object, end: object, **extra: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **extra}


def head(**tensors: object) -> str:
    return json.dumps(tensors)


WHOLE = entry("F32", [4], 0, 16)
TEXT = head(a=WHOLE)
BARE = TEXT[1:-1]

ACCEPTED = {
    "plain": (build(TEXT), {"a": (4,)}),
    "no tensors": (build("{}", b""), {}),
    "spaces after": (build(TEXT + "     "), {"a": (4,)}),
    "spaces before": (build("   " + TEXT), {"a": (4,)}),
    "unknown field": (build(head(a=entry("F32", [4], 0, 16, later=[1, {"x": None}]))), {"a": (4,)}),
    "empty shares an offset": (build(head(z=entry("F32", [0], 0, 0), a=WHOLE)), {"z": (0,), "a": (4,)}),
    "empty at the end": (build(head(a=WHOLE, z=entry("F64", [3, 0], 16, 16))), {"a": (4,), "z": (3, 0)}),
    "scalar": (build(head(a=entry("F32", [], 0, 4)), bytes(4)), {"a": ()}),
    "misaligned": (
        build(head(u=entry("U8", [3], 0, 3), a=entry("F32", [1], 3, 7)), bytes(7)),
        {"u": (3,), "a": (1,)},
    ),
    "not in order": (
        build(head(b=entry("F32", [3], 4, 16), a=entry("F32", [1], 0, 4))),
        {"b": (3,), "a": (1,)},
    ),
}

DEEP = "[" * 100000 + "]" * 100000
REJECTED = {
    "empty file": (b"", "an empty file"),
    "five bytes": (b"\1\0\0\0\0", "header"),
    "no header": (struct.pack("<Q", 0), "end of text"),
    "length beyond file": (build(TEXT, length=10**6), "longer than the file"),
    "length 2**63": (build(TEXT, length=2**63), "100 MB"),
    "length 2**64 - 1": (build(TEXT, length=2**64 - 1), "100 MB"),
    "header over 100 MB": (struct.pack("<Q", 100_000_001) + b"{" + b" " * 100_000_000, "100 MB"),
    "length too short": (build(TEXT, length=len(TEXT) - 1), "end of text"),
    "length too long": (build(TEXT, length=len(TEXT) + 1), "unexpected text"),
    "array": (build("[]", b""), "expected an object"),
    "number": (build("7", b""), "expected an object"),
    "not json": (build("hello"), "unexpected character"),
    "trailing comma": (build("{" + BARE + ",}"), "unexpected character"),
    "two documents": (build(TEXT + "{}"), "unexpected text"),
    "NUL after": (build(TEXT + "\0"), "unexpected text"),
    "same name twice": (build("{" + BARE + ", " + BARE + "}"), "duplicate tensor"),
    "same name, escaped": (
        build("{" + BARE + ", " + BARE.replace('"a"', '"\\u0061"') + "}"),
        "duplicate tensor",
    ),
    "field twice": (build(TEXT.replace('"shape"', '"dtype": "F32", "shape"')), "duplicate field"),
    "metadata twice": (
        build('{"__metadata__": {}, "__metadata__": {}, ' + BARE + "}"),
        "duplicate __metadata__",
    ),
    "metadata key twice": (
        build('{"__metadata__": {"x": "1", "x": "2"}, ' + BARE + "}"),
        "duplicate metadata",
    ),
    "metadata number": (build('{"__metadata__": {"x": 1}, ' + BARE + "}"), "expected a string"),
    "metadata list": (build('{"__metadata__": [], ' + BARE + "}"), "expected an object"),
    "hole at the end": (build(TEXT, bytes(20)), "belong to none"),
    "hole in the middle": (build(head(a=entry("F32", [2], 0, 8), b=entry("F32", [1], 12, 16))), "hole"),
    "hole at the start": (build(head(a=entry("F32", [3], 4, 16))), "hole"),
    "overlap": (build(head(a=WHOLE, b=entry("F32", [2], 8, 16))), "overlap"),
    "same bytes twice": (build(head(a=WHOLE, b=WHOLE)), "overlap"),
    "beyond the end": (build(head(a=entry("F32", [8], 0, 32))), "beyond"),
    "truncated data": (build(TEXT, bytes(15)), "beyond"),
    "reversed": (build(head(a=entry("F32", [4], 16, 0))), "reversed"),
    "size mismatch": (build(head(a=entry("F64", [4], 0, 16))), "32 bytes"),
    "negative size": (build(head(a=entry("F32", [-4], 0, 16))), "unsigned"),
    "negative offset": (build(head(a=entry("F32", [4], -16, 0))), "unsigned"),
    "real size": (build(head(a=entry("F32", [4.0], 0, 16))), "expected an integer"),
    "exponent": (build(TEXT.replace("[4]", "[4e0]")), "expected an integer"),
    "text size": (build(head(a=entry("F32", ["4"], 0, 16))), "expected an integer"),
    "leading zero": (build(TEXT.replace("[4]", "[04]")), "start with 0"),
    "huge size": (build(head(a=entry("F32", [2**70], 0, 16))), "out of range"),
    "product wraps to 16": (
        build(head(a=entry("F32", [4194305, 4194305, 211106198978564], 0, 16))),
        "overflow",
    ),
    "product wraps to 0": (build(head(a=entry("F32", [2**32, 2**32], 0, 0)), b""), "overflow"),
    "overflow beside a zero": (build(head(a=entry("U8", [2**62, 2**62, 0], 0, 0)), b""), "overflow"),
    "nine dimensions": (build(head(a=entry("F32", [1] * 8 + [4], 0, 16))), "dimensions"),
    "unknown dtype": (build(head(a=entry("Q7", [4], 0, 16))), "dtype"),
    "dtype number": (build(head(a=entry(7, [4], 0, 16))), "expected a string"),  # type: ignore[arg-type]
    "one offset": (build(head(a={"dtype": "F32", "shape": [4], "data_offsets": [0]})), "two data_offsets"),
    "three offsets": (
        build(head(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]})),
        "two data_offsets",
    ),
    "no dtype": (build(head(a={"shape": [4], "data_offsets": [0, 16]})), "no dtype"),
    "no shape": (build(head(a={"dtype": "F32", "data_offsets": [0, 16]})), "no shape"),
    "no offsets": (build(head(a={"dtype": "F32", "shape": [4]})), "no data_offsets"),
    "entry is a list": (build(head(a=["F32", [4], [0, 16]])), "expected an object"),
    "deep list": (build('{"a": ' + DEEP + "}"), "expected an object"),
    "deep in an unknown field": (build(TEXT[:-2] + ', "x": ' + DEEP + "}}"), "nested deeper"),
    "bad utf-8": (build(TEXT.encode().replace(b'"a"', b'"\xff\xfe"')), "UTF-8"),
    "overlong utf-8": (build(TEXT.encode().replace(b'"a"', b'"\xc0\x80"')), "UTF-8"),
    "surrogate": (build(TEXT.replace('"a"', '"\\ud800"')), "surrogate"),
    "control character": (build(TEXT.replace('"a"', '"\n"')), "control"),
    "very long name": (build(head(**{"n" * 5000: WHOLE})), "longer than 4096"),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted(kind: str, tmp_path: Path) -> None:
    data, shapes = ACCEPTED[kind]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    tensors, _ = _core.read_safetensors(str(path))
    assert {name: value.shape for name, value in tensors.items()} == shapes


@pytest.mark.parametrize("kind", REJECTED)
def test_rejected(kind: str, tmp_path: Path) -> None:
    data, word = REJECTED[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"bad\.safetensors") as caught:
        _core.read_safetensors(str(path))
    message = str(caught.value)
    assert word in message
    assert len(message) < 1500
    assert message.isprintable()


@pytest.mark.slow
def test_what_the_package_rejects_we_reject(tmp_path: Path) -> None:
    """Random damage to the header: whatever we accept, the package accepts, with the same names and bytes."""
    path = tmp_path / "a.safetensors"
    tensors = {"layers.0.weight": tensor("f4", (2, 3)), "layers.0.bias": tensor("u1", (5,))}
    safetensors_numpy.save_file(tensors, str(path), {"architecture": "a value of some length"})
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    rng = np.random.default_rng(4)
    accepted = 0
    for _ in range(1500):
        data = bytearray(good)
        for at in rng.integers(0, 8 + length, rng.integers(1, 3)):
            data[at] = rng.choice([data[at] ^ 1, rng.integers(256), 0x30 + rng.integers(10), 0x20])
        path.write_bytes(bytes(data))
        try:
            ours, metadata = _core.read_safetensors(str(path))
        except RuntimeError:
            continue
        accepted += 1
        with safe_open(str(path), "np") as file:
            assert set(file.keys()) == ours.keys()
            assert (file.metadata() or {}) == metadata
            for name in ours:
                same(file.get_tensor(name), ours[name])
    assert accepted > 100


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _core.write_safetensors(str(path), {"a": tensor("f4", (9,)), "b": tensor("u1", (3,))}, {"k": "v"})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(RuntimeError, match=r"a\.safetensors"):
            _core.read_safetensors(str(path))


def test_missing_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nowhere.*No such file"):
        _core.read_safetensors(str(tmp_path / "nowhere"))
    with pytest.raises(
        RuntimeError, match=r"not a regular file but a folder; name the file .* RUN/best\.safetensors"
    ):
        _core.read_safetensors(str(tmp_path))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(RuntimeError, match="not a regular file"):
        _core.read_safetensors(str(pipe))


# ---- writing ----


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    tensors = {"a": tensor("f4", (4,))}
    with pytest.raises(RuntimeError, match="No such file"):
        _core.write_safetensors(str(tmp_path / "no" / "a.safetensors"), tensors, {})
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(RuntimeError, match=r"folder\.safetensors"):
        _core.write_safetensors(str(folder), tensors, {})
    assert os.listdir(tmp_path) == ["folder.safetensors"]
    assert os.listdir(folder) == []
    with pytest.raises(ValueError, match="reserved"):
        _core.write_safetensors(str(tmp_path / "a"), {"__metadata__": tensors["a"]}, {})
    with pytest.raises(ValueError, match="4096"):
        _core.write_safetensors(str(tmp_path / "a"), {"n" * 4097: tensors["a"]}, {})
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_overwriting_keeps_a_mapped_reader_and_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _core.write_safetensors(str(path), {"a": tensor("f4", (4,), 1)}, {})
    path.chmod(0o640)
    with path.open("rb") as old:
        _core.write_safetensors(str(path), {"a": tensor("f4", (4,), 2)}, {})
        before = old.read()
    assert before[-16:] == tensor("f4", (4,), 1).tobytes()
    assert path.read_bytes()[-16:] == tensor("f4", (4,), 2).tobytes()
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a.safetensors"]
