# SPDX-License-Identifier: Apache-2.0
"""Reading PTX text: comments, numbers, declarations, functions. Instructions are decode.py's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TYPE_SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2} | dict.fromkeys(
    ("b64", "u64", "s64", "f64"), 8
)  # all others: 4


class PtxError(Exception):
    """PTX that the simulator does not know. Never skipped in silence."""


@dataclass(eq=False)
class Variable:
    """A declared variable of any state space; `address` is given when it is placed."""

    name: str
    space: str
    align: int
    size: int
    initial: bytes = b""
    address: int | None = None


@dataclass
class Function:
    result: str | None  # the declaration between ( ) before the name
    parameters: str | None
    body: str


@dataclass
class PtxFile:
    files: dict[int, str] = field(default_factory=dict)  # of .loc
    target: int = 0  # of sm_90a: 90
    variables: dict[str, Variable] = field(default_factory=dict)
    entries: dict[str, tuple[str, str]] = field(default_factory=dict)  # mangled name -> (head, body)
    functions: dict[str, Function] = field(default_factory=dict)


def align_up(offset: int, align: int) -> int:
    return -(-offset // align) * align


def parse_number(text: str) -> int | None:
    """An integer or float literal as 64 bits, or None if it is neither."""
    text = text.strip()
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    match = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
    if not match:
        return None
    digits = match[2]
    base = 0 if digits[:2].lower() in ("0x", "0b") else 8 if digits[0] == "0" else 10
    value = int(digits, base)
    return (-value if match[1] else value) & (2**64 - 1)


_VARIABLE = re.compile(
    r"""\.(?P<space>global|const|shared|local|param)\b
        (?P<attributes>(?:\s*\.(?:align\s+\d+|attribute\s*\([^)]*\)|volatile))*)
        \s+\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?P<extents>(?:\[\d*\])*)\s*(?:=\s*(?P<initial>.*))?$""",
    re.S | re.X,
)


def parse_variable(text: str) -> Variable:
    text = re.sub(r"\.ptr\b(\s*\.(global|shared|local|const))?(\s*\.align\s+\d+)?", "", text)
    match = _VARIABLE.match(re.sub(r"\.(visible|extern|weak|common)\s*", "", text.strip()))
    if not match:
        raise PtxError(f"cannot read the declaration {text[:100]!r}")
    element = TYPE_SIZES.get(match["type"], 4)
    count = 1
    for extent in re.findall(r"\[(\d*)\]", match["extents"]):
        count *= int(extent or 0)
    align = re.search(r"align\s+(\d+)", match["attributes"])
    initial = b""
    if match["initial"]:
        values = [parse_number(value) for value in match["initial"].strip().strip("{}").split(",")]
        if None in values:
            raise PtxError(f"cannot read the initial value of {match['name']}")
        initial = b"".join((value % (1 << 8 * element)).to_bytes(element, "little") for value in values)
    return Variable(match["name"], match["space"], int(align[1]) if align else element, element * count, initial)


_TOP_LEVEL = re.compile(
    r"""(?P<entry>\.entry\s+(?P<name>[\w$]+))
      | (?P<function>\.func\b)
      | (?P<variable>(?:\.(?:visible|weak|extern|common)\s+)*\.(?:global|const|shared)\b[^;]*;)
      | (?P<section>\.section[^{]*\{[^}]*\})""",
    re.X,
)
_FUNCTION_HEAD = re.compile(r"\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?")


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return start + brace.start()
    raise PtxError("a function without an end")


def parse_file(text: str) -> PtxFile:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    ptx = PtxFile({int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)})
    if target := re.search(r"^\s*\.target\s+sm_(\d+)", text, re.M):
        ptx.target = int(target[1])
    position = 0
    while match := _TOP_LEVEL.search(text, position):
        position = match.end()
        if match["variable"]:
            variable = parse_variable(match["variable"][:-1])
            ptx.variables[variable.name] = variable
        elif match["entry"] or match["function"]:
            semicolon, brace = text.find(";", position), text.find("{", position)
            if match["function"] and (brace < 0 or -1 < semicolon < brace):  # a declaration
                position = semicolon
                continue
            end = _closing_brace(text, brace + 1)
            head, body = text[position:brace], text[brace + 1 : end]
            if match["entry"]:
                ptx.entries[match["name"]] = (head, body)
            else:
                parts = _FUNCTION_HEAD.match(head)
                ptx.functions[parts[2]] = Function(parts[1], parts[3], body)
            position = end + 1
    return ptx
