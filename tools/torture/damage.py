"""Seeded damage to a good file: what a broken download, a full disk, another program or a hostile sender makes of it."""

import copy
import json
import struct
import zlib

from formats import WIDTHS, png_chunks, read_json, safetensors, tensor_bytes

NUMBERS = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
VALUES = ("-1", "0", "9223372036854775807", "18446744073709551616", "1e308", "nan", "-inf", '""', '"../../../etc/passwd"',
          "[]", "[[[[[[]]]]]]", "{}", "true", '"\\u0000"', "1979-05-27T07:32:00Z", '"=1+1"')
HOSTILE = (None, True, -1, 0, 1, 3, 1e308, -1e308, 5e-324, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 1 << 31, 65536, "",
           "../../../outside", "a)|(b*", "/etc/passwd", "=1+1", "\u202e\u0000\U0001f415", [], {}, [1, "x", None, -1], [0] * 1000)
FLOATS = (0.0, -0.0, float("nan"), float("inf"), float("-inf"), 3.4028234e38, -3.4028234e38, 1e-40, 1e20, 1e-20, 1.0)
# No damage makes a file larger than this much beyond the good one.
MOST_GROWTH = 1 << 20


def damage(rng, name, content, other):
    """The file damaged (never equal to the good one), and in a word how. `other` is another good file of its kind."""
    for _ in range(20):
        kind = rng.choice(ways(name, content))
        try:
            bad = kind(rng, content, other)
        except (ValueError, KeyError, TypeError, IndexError, struct.error, zlib.error, RecursionError):
            continue
        if bad != content and len(bad) < len(content) + MOST_GROWTH:
            return bad, kind.__name__
    return content[:len(content) // 2], "cut"


def ways(name, content):
    if name.endswith(".safetensors"):
        return (tensors, tensors, tensors, header_text, raw, cut, disguise)
    if name.endswith(".json"):
        return (json_values, json_values, json_values, json_values, raw, text_lines, cut, disguise)
    if name.endswith(".jsonl"):
        return (jsonl, jsonl, text_lines, raw, cut, disguise)
    if name.endswith((".toml", ".txt", ".csv", ".pts")):
        return (text_lines, text_lines, text_lines, raw, cut, disguise)
    if name.endswith(".png"):
        return (png_parts, png_parts, png_header, raw, cut, disguise)
    return (raw, raw, raw, cut, disguise)


def raw(rng, content, other):
    """Bits, bytes, pieces, and numbers that stand for sizes; near the beginning, where the sizes are, as often as anywhere."""
    bad = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not bad:
            break
        at = rng.randrange(min(len(bad), 256) if rng.random() < 0.5 else len(bad))
        how = rng.randrange(6)
        if how <= 1:
            bad[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            bad[at] = rng.randrange(256)
        elif how == 3:
            start = rng.randrange(len(other)) if other else 0
            bad[at:at] = other[start:start + rng.randint(1, 64)]
        elif how == 4:
            del bad[at:at + rng.randint(1, 64)]
        else:
            number = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS))[:rng.choice((1, 2, 4, 8))]
            bad[at:at + len(number)] = number
    return bytes(bad)


def cut(rng, content, _):
    """The end is missing, as after a full disk; or all of it; or blocks of it are zeros, as after a lost write."""
    how = rng.randrange(4)
    if how == 0:
        return b""
    if how == 1:
        at = rng.randrange(len(content)) & ~511
        return content[:at] + b"\0" * min(512, len(content) - at) + content[at + 512:]
    return content[:rng.randrange(len(content))]


def disguise(rng, content, other):
    """Something else under the name."""
    return rng.choice((
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        b"<!DOCTYPE html><html><body>Log in</body></html>\n",
        b"\x80\x02}q\x00.", b"PK\x03\x04" + b"\0" * 26, b"\xff\xfe" + "{}".encode("utf-16-le"),
        b"\xef\xbb\xbf" + content, content + content, content + b"\0" * 100, other[:len(other) // 2] + content,
    ))


def text_lines(rng, content, _):
    lines = content.decode("utf-8").split("\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        how = rng.randrange(7)
        if how == 0:
            del lines[at:at + rng.randint(1, 3)]
            lines = lines or [""]
        elif how == 1:
            lines.insert(at, rng.choice(lines))
        elif how == 2:
            lines[at] = rng.choice(("[" * 5000, '"' * 3, "\x1b]0;x\x07", "x" * 100_000, "\u202e", "=cmd|' /C calc'!A0"))
        elif how == 3:
            start = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:start] + rng.choice((",", '"', "=", "[", "}", "\\", "\0", "#", "\r")) + lines[at][start:]
        else:
            key, sign, _ = lines[at].partition(rng.choice("=:, ") if rng.random() < 0.3 else "=")
            lines[at] = f"{key}{sign or ' '}{rng.choice(VALUES)}"
    return "\n".join(lines).encode()


def nodes(value):
    """Every place of a JSON value: container and key."""
    stack, found = [value], []
    while stack:
        inner = stack.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            found.append((inner, key))
            stack.append(inner[key])
    return found


def change(rng, value):
    """One value of a JSON document replaced, taken out, moved or renamed."""
    places = nodes(value)
    inner, key = rng.choice([p for p in places if p[0] is value] if rng.random() < 0.5 else places)
    how = rng.randrange(8)
    if how == 0:
        del inner[key]
    elif how == 1 and isinstance(inner, dict):
        inner[rng.choice(list(inner)) + rng.choice(("", "x"))] = inner.pop(key)
    elif how == 2:
        other, from_key = rng.choice(places)
        inner[key] = json.loads(json.dumps(other[from_key]))
    elif how == 3 and isinstance(inner[key], (int, float)) and not isinstance(inner[key], bool):
        inner[key] = rng.choice((-inner[key], inner[key] + 1, inner[key] * 2, inner[key] * 1e10, inner[key] / 2))
    else:
        # A copy: what is damaged further would else damage the list, and hold itself in the end.
        inner[key] = copy.deepcopy(rng.choice(HOSTILE))


def json_values(rng, content, _):
    value = read_json(content)
    for _ in range(rng.randint(1, 3)):
        change(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.1:
        at = text.find(":", rng.randrange(len(text)))
        text = text[:at + 1] + rng.choice(("NaN,", "-Infinity,", "1e999,", "00,", '"\\ud800",', "[" * 1000)) + text[at + 1:]
    return text.encode()


def jsonl(rng, content, _):
    lines = content.decode("utf-8").split("\n")
    at = rng.choice([i for i, line in enumerate(lines) if line])
    value = json.loads(lines[at])
    change(rng, value)
    lines[at] = json.dumps(value)
    return "\n".join(lines).encode()


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_text(rng, content, _):
    """A header that lies, before data as they were."""
    header, data = safetensors(content)
    change(rng, header)
    return with_header(header, data)


def tensors(rng, content, _):
    """An honest file of tensors that nobody expects: other names, shapes, types, values."""
    header, data = safetensors(content)
    parts = {name: [dtype, list(header[name]["shape"]), bytes(values)] for name, dtype, values in tensor_bytes(header, data)}
    for _ in range(rng.randint(1, 3)):
        name, giver = rng.choice(list(parts)), rng.choice(list(parts))
        part, how = parts[name], rng.randrange(8)
        if how == 0 and len(parts) > 1:
            del parts[name]
        elif how == 1:
            parts[giver + rng.choice(("", ".x", ".weight"))] = parts.pop(name)
        elif how == 2:
            parts[name] = list(parts[giver])
        elif how == 3:
            part[0] = rng.choice(list(WIDTHS))
        elif how == 4:
            part[1] = rng.choice((part[1][::-1], part[1] + [1], part[1][1:], [2 * d for d in part[1]], [0], [1 << 40, 0], []))
        else:
            value, some = struct.pack("<f", rng.choice(FLOATS)), rng.random() < 0.7
            chosen = {rng.randrange(max(len(part[2]) // 4, 1)) for _ in range(3)}
            part[2] = b"".join(value if not some or i in chosen else part[2][4 * i:4 * i + 4] for i in range(len(part[2]) // 4))
    made, body = {key: header[key] for key in header if key == "__metadata__"}, b""
    for name, (dtype, shape, values) in sorted(parts.items()):
        size = WIDTHS[dtype]
        for length in shape:
            size *= length
        if size > MOST_GROWTH:
            continue
        values = (values or b"\0") * (size // max(len(values), 1) + 1)
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += values[:size]
    return with_header(made, body)


def png(parts):
    packed = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def png_parts(rng, content, _):
    """Chunks moved, doubled, taken out, or with other content under a right checksum."""
    parts = png_chunks(content)
    at, how = rng.randrange(len(parts)), rng.randrange(5)
    if how == 0:
        del parts[at]
    elif how == 1:
        parts.insert(rng.randrange(len(parts)), parts[at])
    elif how == 2:
        kind, body = parts[at]
        parts[at] = (kind, raw(rng, body or b"\0", body))
    elif how == 3:
        text = zlib.compress(b"\0x" * rng.choice((10, 1 << 22)))
        parts.insert(1, rng.choice(((b"zTXt", b"software\0\0" + text), (b"iCCP", b"icc\0\0" + text), (b"tRNS", b"\0\1"))))
    else:
        data = b"".join(body for kind, body in parts if kind == b"IDAT")
        pixels = raw(rng, zlib.decompress(data), b"")
        parts = [part for part in parts if part[0] not in (b"IDAT", b"IEND")] + [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return png(parts)


def png_header(rng, content, _):
    """Another size, depth, colour or interlacing than the pixels have."""
    parts = png_chunks(content)
    fields = list(struct.unpack(">IIBBBBB", parts[0][1]))
    at = rng.randrange(7)
    fields[at] = rng.choice((0, 1, 2, 7, 16, 13377, 65535, 1 << 20, (1 << 31) - 1)) if at < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return png([(parts[0][0], struct.pack(">IIBBBBB", *fields)), *parts[1:]])
