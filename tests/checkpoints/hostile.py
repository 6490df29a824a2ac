"""Files made to do harm, and what is wrong with each: for the tests, and for `benchmarks/hostile.py`."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from miniflux.checkpoints.gguf import MAX_ITEMS, MAX_TEXT
from miniflux.strictjson import MAX_HEADER, MAX_MARKS
from tests.checkpoints.raw import entry

INDEX_SUFFIX = ".safetensors.index.json"
F32 = 0  # a type of tensors in GGUF files
U8, TEXT, ARRAY = 0, 8, 9  # types of fields
MANY, MAX_TEXTS = 200_000, MAX_TEXT // 8 - 9


def filled(text: bytes, unit: bytes, size: int = MAX_HEADER) -> bytes:
    """`text` with its `%` replaced by as many `unit`s as JSON of the largest size holds."""
    begin, _, end = text.partition(b"%")
    return begin + unit * ((size - len(text)) // len(unit)) + end


def many(text: bytes, unit: bytes) -> bytes:
    """The same with as many units as are allowed in number."""
    begin, _, end = text.partition(b"%")
    return begin + unit * ((MAX_MARKS - 20) // sum(map(unit.count, (b",", b"[", b"{")))) + end


ENTRIES = {f"tensor{i}": entry(i, i + 1, "U8", [1]) for i in range(MAX_MARKS // 10 - 10)}
ENTRIES["last"] = entry(7, 8, "U8", [1])
HEADERS: dict[str, tuple[bytes, str]] = {
    "100 MB": (b"{" + b" " * 100_000_000 + b"}", "its header has 100,000,002 bytes, of which at most 20,000,000"),
    "as long as may be": (filled(b'{"a": %}', b"1"), "header is no JSON"),
    "one name": (filled(b'{"%": 1}', b"a"), r"entry of 'aaa.*\(19,999,99\d characters\) is malformed"),
    "one name, in four bytes each": (filled(b'{"%": 1}', "\U0001f600".encode()), "is malformed"),
    "escapes": (filled(b'{"%": 1}', rb"\u00e9"), "is malformed"),
    "lists": (many(b'{"a": [%0]}', b"[],"), "entry of 'a' is malformed"),
    "too many strings": (filled(b'{"a": [%0]}', b'"",'), "more than 250,000 items"),
    "a string without an end": (filled(b'{"%', rb"\""), "header is no JSON"),
    "a metadata string of one character in four bytes": (
        filled('{"__metadata__": {"a": "😀%"}}'.encode(), b"a"),
        r"19,999,9\d\d characters, some of which take four bytes",
    ),
    "too many lists": (filled(b'{"a": [%0]}', b"[],"), "more than 250,000 items"),
    "objects": (many(b'{"a": [%0]}', b"{},"), "entry of 'a' is malformed"),
    "numbers": (many(b'{"a": {"dtype": "U8", "shape": [%1], "data_offsets": [0, 1]}}', b"9999999999999,"), "malformed"),
    "as many tensors as may be": (json.dumps(ENTRIES).encode(), "'last' starts .* overlaps"),
    "a name over and over": (many(b'{%"a": 1}', b'"a": 1,'), "its header gives 'a' twice"),
    "deep lists": (many(b"%", b"["), "header is no JSON: .*recursion"),
    "deep objects": (many(b"%", b'{"a":'), "header is no JSON: .*recursion"),
    "deep in an entry": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", r"malformed: \[\[\[\[\[\[\[...\]+"),
    "not UTF-8": (b'{"a\xff": 1}', "header is no JSON: not UTF-8 at byte 3"),
    "UTF-16": (json.dumps({"a": entry(0, 8)}).encode("utf-16"), "header is no JSON: not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": entry(0, 8)}).encode(), "header is no JSON"),
    "half a surrogate pair": (b'{"\\ud800": 1}', "header is no JSON: .*surrogates not allowed"),
    "a tensor twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), "its header gives 'a' twice"),
    "a shape twice": (b'{"a": {"dtype": "F32", "shape": [3], "shape": [2], "data_offsets": [0, 8]}}', "'shape' twice"),
    "a fourth field": (json.dumps({"a": entry(0, 8) | {"more": 1}}).encode(), "entry of 'a' is malformed"),
    "minus zero": (b'{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}', "entry of 'a' is malformed"),
    "NaN": (b'{"a": NaN}', "malformed: nan"),
    "no metadata": (b'{"__metadata__": false}', "__metadata__ is not a JSON object of strings"),
    "2**60 elements": (json.dumps({"a": entry(0, 2**60, "U8", [2**60])}).encode(), "cut off: 'a' ends at byte 1152921"),
    "2**60 elements of 8 bytes": (json.dumps({"a": entry(0, 8, "F64", [2**60])}).encode(), "9223372036854775808 bytes"),
    "2**80 elements": (json.dumps({"a": entry(0, 0, "U8", [2**40, 2**40, 0])}).encode(), "malformed"),
    "40 axes": (json.dumps({"a": entry(0, 8, "F64", [1] * 40)}).encode(), "malformed"),
    "offsets far out": (json.dumps({"a": entry(2**62, 2**62 + 8)}).encode(), "cut off: 'a' ends at byte 46116860"),
    "offsets of 4300 digits": (json.dumps({"a": entry(10**4300 - 9, 10**4300 - 1)}).encode(), "malformed"),
    "overlapping offsets": (json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), "'b' starts .* overlaps"),
}


def headed(name: str) -> bytes:
    """A safetensors file with one of those headers."""
    header = HEADERS[name][0]
    data = bytes(len(ENTRIES) if name == "as many tensors as may be" else 16)
    return struct.pack("<Q", len(header)) + header + data


def text(content: bytes, length: int | None = None) -> bytes:
    """A text in a GGUF file."""
    return struct.pack("<Q", len(content) if length is None else length) + content


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes = b"") -> bytes:
    return field(b"array", ARRAY, struct.pack("<IQ", kind, length) + values)


def tensor(name: bytes, shape: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(*parts: bytes, tensors: int = 0, fields: int = 0, order: str = "<", data: int = 64) -> bytes:
    """A GGUF file that claims so many tensors and fields, with these bytes behind its counts."""
    counts = struct.pack(order + "IQQ", 3, tensors, fields)
    return b"".join([b"GGUF", counts, *parts, bytes(data)])


# Functions, because some are large.
GGUF: dict[str, tuple[Callable[[], bytes], str]] = {
    "2**60 tensors": (lambda: gguf(tensors=2**60), "1,152,921,504,606,846,976 tensors"),
    "2**60 fields": (lambda: gguf(fields=2**60), "1,152,921,504,606,846,976 fields"),
    "many tensors": (
        lambda: gguf(*(tensor(b"%d" % i) for i in range(MANY)), tensors=MANY),
        "claims 200,000 tensors",
    ),
    "many fields": (
        lambda: gguf(*(field(b"%d" % i, U8, b"1") for i in range(MANY)), fields=MANY),
        "claims 200,000 fields",
    ),
    "as many as may be": (
        lambda: gguf(
            *(field(b"%d" % i, U8, b"1") for i in range(MAX_ITEMS)),
            *(tensor(b"%d" % i) for i in range(MAX_ITEMS)),
            tensors=MAX_ITEMS,
            fields=MAX_ITEMS,
        ),
        "'1' overlaps '0'",
    ),
    "a name beyond the file": (lambda: gguf(text(b"a", 2**40), tensors=1), "1099511627784 bytes of texts"),
    "a name of 2**64 bytes": (lambda: gguf(text(b"a", 2**64 - 1), fields=1), "18446744073709551623 bytes of texts"),
    "a name of 100 MB": (lambda: gguf(tensor(b"a" * 10**8), tensors=1), "100000008 bytes of texts"),
    "a text of 100 MB": (lambda: gguf(field(b"a", TEXT, text(b"a" * 10**8)), fields=1), "bytes of texts"),
    "a name that is cut off": (lambda: gguf(text(b"a", 1000), tensors=1), "1000 values are announced at byte 32"),
    "a name that is not UTF-8": (lambda: gguf(tensor(b"\xff"), tensors=1), "can't decode byte 0xff"),
    "a text that is not UTF-8": (lambda: gguf(field(b"a", TEXT, text(b"\xff")), fields=1), "can't decode byte 0xff"),
    "2**60 numbers": (lambda: gguf(tensor(b"a", (2**60,)), tensors=1), "1152921504606846976 values are announced"),
    "2**64 numbers": (lambda: gguf(tensor(b"a", (2**32, 2**32)), tensors=1), "cut off"),
    "2**31 axes": (lambda: gguf(text(b"a"), struct.pack("<I", 2**31), tensors=1), "2147483648 values are announced"),
    "a million axes": (lambda: gguf(tensor(b"a", (1,) * 10**6), tensors=1), "cut off"),
    "a tensor far out": (lambda: gguf(tensor(b"a", offset=2**62), tensors=1), "8 values are announced"),
    "overlapping tensors": (lambda: gguf(tensor(b"a"), tensor(b"b"), tensors=2, data=200), "'b' overlaps 'a'"),
    "a tensor twice": (lambda: gguf(tensor(b"a"), tensor(b"a"), tensors=2, data=200), "duplicated tensor"),
    "a field twice": (lambda: gguf(*[field(b"a", U8, b"1")] * 2, fields=2), "Duplicate a"),
    "an array of 2**60 numbers": (lambda: gguf(array(U8, 2**60), fields=1), "1152921504606846976 values are"),
    "an array of 2**64 texts": (
        lambda: gguf(array(TEXT, 2**64 - 1), fields=1),
        "bytes of texts in the header",
    ),
    "an array beyond the file": (lambda: gguf(array(TEXT, 1000), fields=1), "an array of 1000 texts in the header, wh"),
    "as many texts as may be": (
        lambda: gguf(*[array(TEXT, MAX_TEXTS, bytes(8 * MAX_TEXTS))] * 2, fields=2),
        " bytes of texts in the header",
    ),
    "arrays in arrays": (
        lambda: gguf(array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 100_000), fields=1),
        "an array of ARRAY",
    ),
    "an unknown type": (lambda: gguf(field(b"a", 77, b""), fields=1), r"77\)? is not a valid GGUFValueType"),
    "numbers the wrong way round": (lambda: gguf(tensor(b"a"), tensors=1, order=">"), "big-endian"),
}
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    **{f"header: {name}": ("a.safetensors", partial(headed, name), why) for name, (_, why) in HEADERS.items()},
    "a header longer than the file": ("a.safetensors", lambda: struct.pack("<Q", 2**40), "claims 1099511627776 bytes"),
    "a pickle": ("a.safetensors", lambda: pickle.dumps([1] * 1000), "looks like a pickle"),
    "a shard in another folder": (
        f"a{INDEX_SUFFIX}",
        lambda: b'{"weight_map": {"a": "../a.safetensors"}}',
        "shards are files in the folder of their index",
    ),
    **{f"GGUF: {name}": ("a.gguf", *case) for name, case in GGUF.items()},
}

# Left to the benchmark: while every allocation is traced they take seconds.
AT_THE_LIMIT = {"GGUF: as many as may be", "GGUF: as many texts as may be"}


def made(name: str, folder: Path) -> Path:
    """Write one of them into a folder; the path to open."""
    where, content, _ = FILES[name]
    (folder / where).write_bytes(content())
    return folder / where
