# SPDX-License-Identifier: Apache-2.0
"""From the PTX text of a kernel to a program: an array of instruction records whose operands are slots.

An opcode is decoded by the method `_decode_<opcode>`, or by one of the tables below. Anything else raises PtxError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .build import core
from .ptx import PtxError, PtxFile, Variable, align_up, parse_number, parse_variable


def _words(text: str) -> list[str]:
    return text.split()


# The first slots of every warp, filled by the machine (scheduler.cpp, start_block) in this order.
SPECIAL_REGISTERS = {
    name: slot
    for slot, name in enumerate(
        _words(
            "%tid.x %tid.y %tid.z %ntid.x %ntid.y %ntid.z %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y %nctaid.z "
            "%laneid %warpid %lanemask_eq %lanemask_lt %lanemask_le %lanemask_gt %lanemask_ge %dynamic_smem_size "
            "%nwarpid %smid %total_smem_size %cluster_ctarank %cluster_nctarank"
        )
    )
}
# Number of sources; one destination and nothing else to decode.
PLAIN = {
    opcode: sources
    for sources, opcodes in {
        1: "abs neg not cnot popc clz brev bfind sqrt rsqrt rcp ex2 lg2 sin cos tanh",
        2: "add sub mul div rem min max and or xor shl shr bmsk copysign",
        3: "mad fma bfe sad prmt selp dp4a dp2a",
        4: "bfi",
    }.items()
    for opcode in _words(opcodes)
}
# Hints and waits without an effect here
IGNORED = _words("prefetch prefetchu nanosleep discard applypriority brkpt createpolicy setmaxnreg pmevent")
ROUNDED = {"add", "sub", "mul", "fma", "mad", "div", "sqrt", "rcp"}  # may ask for a directed rounding mode
FLAG_NAMES = {"ftz": "ftz", "sat": "sat", "hi": "hi", "wide": "wide", "NaN": "nan", "relu": "relu"}
STRONG = {"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"}
# Modifiers that change nothing here, or that the decoders below look at; beside the names in the lists of core/types.h.
MODIFIERS = set(
    _words(
        "lo hi wide approx full uni sync aligned cta gpu sys cluster gl sc weak noftz proxy v2 v4 v8 nc to l r clamp "
        "wrap shiftamt ca cg cs cv lu wb wt up down bfly idx all any ballot warp arrive red popc shared::cta "
        "shared::cluster param::entry param::func async commit_group wait_group wait_all m8n8 x1 x2 x4 trans row col "
        "launch_dependents wait m16n8k4 m16n8k8 m16n8k16 m16n8k32 "
        "finite infinite number notanumber normal subnormal"
    )
)
HINTS = ("L1::", "L2::")
MAX_INLINE_DEPTH = 40


@dataclass(frozen=True)
class SourceLine:
    file: str
    line: int
    inlined_at: SourceLine | None = None

    def chain(self) -> list[SourceLine]:
        """This line, then where it was inlined, then where that was, ..."""
        return [self, *(self.inlined_at.chain() if self.inlined_at else [])]

    def __str__(self):
        first, *outer = (f"{line.file}:{line.line}" for line in self.chain())
        return first + (f" (inlined at {', '.join(outer)})" if outer else "")


@dataclass
class Program:
    instructions: np.ndarray  # of core().instruction_dtype
    texts: list[str]
    lines: list[SourceLine | None]
    opcodes: list[str]  # names of core().OPS
    slots: int
    numbers: dict[int, int]  # slot -> value
    symbols: dict[int, Variable]  # slot -> variable whose address it holds
    static_shared: int
    local_bytes: int
    dynamic_shared: list[Variable]  # extern __shared__: placed behind the static ones


_STATEMENT = re.compile(
    r"""\s*(?:(?P<open>\{) | (?P<close>\}) | (?P<loc>\.loc\s[^\n]*) | (?P<pragma>\.pragma[^;]*;)
      | (?P<label>[\w$%]+)\s*:(?!:) | (?P<statement>(?:[^;{}]|\{[^;{}]*\})*);)""",
    re.X,
)
_LOC = re.compile(r"\.loc\s+(\d+\s+\d+\s+\d+)(?:.*?inlined_at\s+(\d+\s+\d+\s+\d+))?", re.S)
_OPERANDS = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{}\[\]])+")
_CALL = re.compile(r"call(?:\.uni)?\s+(?:\(\s*([\w$]+)\s*\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?")


class Decoder:
    def __init__(self, ptx: PtxFile, body: str, parameters: list[Variable]):
        machine = core()
        self.machine, self.ptx = machine, ptx
        self.flag = {name: 1 << bit for name, bit in machine.FLAG_BITS.items()}
        lists = (machine.TYPES, machine.ROUNDINGS, machine.COMPARISONS, machine.ATOMICS, machine.SPACES)
        self.known_modifiers = MODIFIERS.union(STRONG, FLAG_NAMES, *lists)
        self.variables = dict(ptx.variables) | {variable.name: variable for variable in parameters}
        self.slots, self.number_slots, self.symbol_slots = len(SPECIAL_REGISTERS), {}, {}
        self.records, self.texts, self.lines, self.opcodes = [], [], [], []
        self.static_shared = self.local_bytes = 0
        # Names are scoped by { }: inline asm and inlined calls declare the same ones again. Innermost scope first.
        self.scopes, self.scopes_made, self.registers = [0], 0, [{}]
        self.labels, self.branches, self.tables, self.places = {}, [], {}, {}
        self.depth, self.last_label, self.line = 0, None, None

        shared = [variable for variable in ptx.variables.values() if variable.space == "shared"]
        for variable in shared:
            if variable.size and re.search(rf"(?<![\w$]){re.escape(variable.name)}(?![\w$])", body):
                self._place_shared(variable)
        self._read_body(body)
        self.dynamic_shared = [variable for variable in shared if not variable.size]
        for variable in self.dynamic_shared:
            variable.address = align_up(self.static_shared, max(variable.align, 16))
        for index, label, scopes in self.branches:
            targets = [self.labels[scope, label] for scope in scopes if (scope, label) in self.labels]
            if not targets:
                raise PtxError(f"no label {label}")
            self.records[index]["target"] = targets[0]

    def program(self) -> Program:
        instructions = np.zeros(len(self.records), self.machine.instruction_dtype)
        for index, record in enumerate(self.records):
            for name, value in record.items():
                if name == "operands":
                    instructions[name][index, : len(value)] = value
                else:
                    instructions[name][index] = value
        return Program(
            instructions,
            self.texts,
            self.lines,
            self.opcodes,
            self.slots,
            {slot: number for number, slot in self.number_slots.items()},
            {slot: variable for variable, slot in self.symbol_slots.items()},
            self.static_shared,
            self.local_bytes,
            self.dynamic_shared,
        )

    # Statements

    def _place_shared(self, variable: Variable) -> None:
        variable.address = align_up(self.static_shared, variable.align)
        self.static_shared = variable.address + variable.size

    def _open_scope(self) -> int:
        self.scopes_made += 1
        self.scopes.insert(0, self.scopes_made)
        self.registers.insert(0, {})
        return self.scopes_made

    def _close_scope(self) -> None:
        self.scopes.pop(0)
        self.registers.pop(0)

    def _read_body(self, body: str, return_label: str | None = None) -> None:
        position = 0
        while position < len(body):
            match = _STATEMENT.match(body, position)
            if not match:
                if body[position:].strip():
                    raise PtxError(f"cannot read {body[position : position + 120]!r}")
                break
            position = match.end()
            if match["open"]:
                self._open_scope()
            elif match["close"]:
                self._close_scope()
            elif match["loc"]:
                self.line = self._source_line(match["loc"])
            elif match["label"]:
                self.last_label = match["label"]
                self.labels[self.scopes[0], self.last_label] = len(self.records)
            elif match["statement"] and (text := match["statement"].strip()):
                self._read_statement(text, return_label)

    def _source_line(self, text: str) -> SourceLine:
        """`inlined_at` names a place whose own `inlined_at`, if it has one, came with an earlier .loc."""
        place, outer = _LOC.match(text).groups()

        def line_of(place, inlined_at):
            file, line, _ = place.split()
            return SourceLine(self.ptx.files.get(int(file), "?").rsplit("/", 1)[-1], int(line), inlined_at)

        at = None
        if outer:
            at = self.places.get(" ".join(outer.split())) or line_of(outer, None)
        self.places[" ".join(place.split())] = found = line_of(place, at if at and len(at.chain()) < 8 else None)
        return found

    def _read_statement(self, text: str, return_label: str | None) -> None:
        if text.startswith(".reg"):
            for name in re.sub(r"^\.reg\s+\.\w+\s+", "", text).split(","):
                many = re.fullmatch(r"\s*(.*)<(\d+)>\s*", name)
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
                self.registers[0].update(dict.fromkeys(names))  # a slot is given on first use
        elif text.startswith((".shared", ".local", ".param")):
            variable = parse_variable(text)
            self.variables[variable.name] = variable
            if variable.space == "shared":
                self._place_shared(variable)
            else:  # the .param variables of a call are local memory here
                variable.space, variable.address = "local", align_up(self.local_bytes, variable.align)
                self.local_bytes = variable.address + variable.size
        elif text.startswith(".branchtargets"):
            self.tables[self.last_label] = [label.strip() for label in text[len(".branchtargets") :].split(",")]
        elif return_label and re.match(r"(@!?[\w%$]+\s+)?ret$", text):
            self._read_instruction(re.sub(r"ret$", f"bra {return_label}", text))
        else:
            self._read_instruction(text)

    def _inline_call(self, text: str) -> None:
        """A call becomes the callee's body; its parameters are the caller's .param variables."""
        match = _CALL.match(text)
        function = self.ptx.functions.get(match[2]) if match else None
        if function is None or self.depth >= MAX_INLINE_DEPTH:
            raise PtxError(f"unsupported call: {text}")

        def split(declarations):
            return [part.strip() for part in (declarations or "").split(",") if part.strip()]

        formal = [parse_variable(part).name for part in split(function.result) + split(function.parameters)]
        for name, argument in zip(formal, split(match[1]) + split(match[3]), strict=True):
            self.variables[name] = self.variables[argument]
        scope = self._open_scope()
        self.depth += 1
        self._read_body(function.body, "$return")
        self.depth -= 1
        self._close_scope()
        self.labels[scope, "$return"] = len(self.records)

    # Operands

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _number(self, value: int) -> int:
        return self.number_slots.get(value) or self._remember(self.number_slots, value)

    def _remember(self, table: dict, key) -> int:
        table[key] = self._new_slot()
        return table[key]

    def _slot(self, name: str) -> int:
        name = name.strip()
        if name == "_":
            return -1
        if name in SPECIAL_REGISTERS:
            if name.startswith("%cluster"):
                self._need_clusters()
            return SPECIAL_REGISTERS[name]
        if name == "WARP_SZ":
            return self._number(32)
        for registers in self.registers:
            if name in registers:
                return registers[name] or self._remember(registers, name)
        if (value := parse_number(name)) is not None:
            return self._number(value)
        if (variable := self.variables.get(name)) is not None:
            return self.symbol_slots.get(variable) or self._remember(self.symbol_slots, variable)
        raise PtxError(f"unknown operand {name}")

    def _vector(self, text: str) -> list[int]:
        parts = text.strip("{} ").split(",") if text.startswith("{") else [text]
        return [self._slot(part) for part in parts]

    def _address(self, text: str) -> tuple[int, int]:
        """[base + offset] -> (slot of the base, offset)"""
        match = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text.strip())
        if not match:
            raise PtxError(f"cannot read the address {text}")
        offset = parse_number(match[2]) if match[2] else 0
        return self._slot(match[1]), offset - 2**64 if offset >= 2**63 else offset

    # Instructions

    def _read_instruction(self, text: str) -> None:
        self.text = " ".join(text.split())
        self.record = {"predicate": -1, "operands": [], "flags": 0}
        if match := re.match(r"@(!?)([\w%$]+)\s+", text):
            self.record["predicate"], self.record["predicate_negated"] = self._slot(match[2]), int(bool(match[1]))
            text = text[match.end() :]
        name, _, rest = text.replace("\t", " ").partition(" ")
        operands = [operand.strip() for operand in _OPERANDS.findall(rest.strip())]
        opcode, *self.modifiers = name.strip().split(".")
        types = [modifier for modifier in self.modifiers if modifier in self.machine.TYPES]
        self.types = [self.machine.TYPES[name] for name in types]
        self.record["type"] = self.types[-1] if types else 0
        self.record["type2"] = self.types[0] if len(types) > 1 else 0
        self.record["space"] = next(
            (self.machine.SPACES[m.split("::")[0]] for m in self.modifiers if m.split("::")[0] in self.machine.SPACES),
            0,
        )
        if "shared::cluster" in self.modifiers:
            self._need_clusters()
            if opcode not in ("ld", "st", "atom", "red", "mapa"):
                raise self._unsupported()
            self.record["space"] = self.machine.SPACES["shared_cluster"]
        self._set_flags(*(flag for modifier, flag in FLAG_NAMES.items() if modifier in self.modifiers))
        if STRONG & set(self.modifiers):
            self._set_flags("strong")
        if {"release", "acq_rel"} & set(self.modifiers):
            self._set_flags("release")
        if opcode in IGNORED:
            return self._emit("nop")
        if not all(map(self._is_known, self.modifiers)):
            raise self._unsupported()
        if opcode in PLAIN:
            return self._decode_plain(opcode, operands)
        decode = getattr(self, f"_decode_{opcode}", None)
        if decode is None:
            raise self._unsupported()
        try:
            decode(*operands)
        except (TypeError, KeyError, IndexError) as error:  # other operands or modifiers than the decoder expects
            raise self._unsupported() from error

    def _need_clusters(self) -> None:
        if self.ptx.target < 90:
            raise PtxError(f"clusters need sm_90, this is sm_{self.ptx.target}: {self.text} (at {self.line})")

    def _unsupported(self) -> PtxError:
        return PtxError(f"unsupported instruction: {self.text} (at {self.line})")

    def _is_known(self, modifier: str) -> bool:
        return modifier in self.known_modifiers or modifier.startswith(HINTS)

    def _is_float(self) -> bool:
        return self.record["type"] >= self.machine.TYPES["f16"]

    def _has(self, *modifiers: str) -> bool:
        return any(modifier in self.modifiers for modifier in modifiers)

    def _which(self, *names: str) -> int:
        """The position in `names` of the one that is a modifier of this instruction."""
        for index, name in enumerate(names):
            if name in self.modifiers:
                return index
        raise self._unsupported()

    def _set_flags(self, *names: str) -> None:
        for name in names:
            self.record["flags"] |= self.flag[name]

    def _set_operands(self, destinations: list[int], sources: list[int]) -> None:
        self.record.update(destinations=len(destinations), sources=len(sources), operands=[*destinations, *sources])

    def _emit(self, op: str, **fields) -> None:
        self.record.update(fields, op=self.machine.OPS[op])
        self.records.append(self.record)
        self.texts.append(self.text)
        self.lines.append(self.line)
        self.opcodes.append(op)

    def _simple(self, op: str, destinations: list[str], sources: list[str], **fields) -> None:
        self._set_operands([self._slot(name) for name in destinations], [self._slot(name) for name in sources])
        self._emit(op, **fields)

    def _plus_predicate(self, operands: list[str], at: int) -> list[str]:
        """Takes the ! off a source predicate."""
        if len(operands) > at and operands[at].startswith("!"):
            self._set_flags("negated")
            operands = [*operands[:at], operands[at][1:], *operands[at + 1 :]]
        return operands

    def _decode_plain(self, opcode: str, operands: list[str]) -> None:
        if len(operands) != 1 + PLAIN[opcode] or (self._has("sat") and not self._is_float()):
            raise self._unsupported()
        if opcode == "selp" and operands[3].startswith("!"):
            operands = [operands[0], operands[2], operands[1], operands[3][1:]]
        rounding = next((name for name in self.modifiers if name in ("rz", "rm", "rp")), "none")
        self._simple(
            opcode,
            operands[:1],
            operands[1:],
            modifier=int(self._has("shiftamt", "clamp")),
            rounding=self.machine.ROUNDINGS[rounding if opcode in ROUNDED else "none"],
        )

    def _decode_mov(self, to, source):
        if source.startswith("{"):
            self._set_operands([self._slot(to)], self._vector(source))
            self._emit("pack")
        elif to.startswith("{"):
            self._set_operands(self._vector(to), [self._slot(source)])
            self._emit("unpack")
        elif source in ("%clock", "%clock64", "%globaltimer"):
            self._simple("clock", [to], [])
        else:
            self._simple("mov", [to], [source])

    def _decode_mapa(self, to, address, rank):
        if self.modifiers != ["shared::cluster", "u32"]:
            raise self._unsupported()
        self._simple("mapa", [to], [address, rank])

    def _decode_lop3(self, to, a, b, c, table):
        self._simple("lop3", [to], [a, b, c], modifier=parse_number(table))

    def _decode_shf(self, to, a, b, amount):
        self._simple("shf", [to], [a, b, amount], modifier=int(self._has("l")) | 2 * int(self._has("wrap")))

    def _decode_testp(self, to, a):
        kind = self._which("finite", "infinite", "number", "notanumber", "normal", "subnormal")
        self._simple("testp", [to], [a], modifier=kind)

    def _decode_setp(self, *operands, op="setp"):
        to, *sources = self._plus_predicate(list(operands), 3)
        if self.types[-1] in (self.machine.TYPES["f16x2"], self.machine.TYPES["bf16x2"]):
            raise self._unsupported()
        combine = {"and": 1, "or": 2, "xor": 3}[self.modifiers[1]] if len(sources) > 2 else 0
        self._simple(op, to.split("|"), sources, modifier=self.machine.COMPARISONS[self.modifiers[0]] | combine << 8)

    def _decode_set(self, *operands):
        if self.record["type2"] not in (self.machine.TYPES[name] for name in ("u32", "s32", "f32")):
            raise self._unsupported()
        self._decode_setp(*operands, op="set")

    def _decode_cvt(self, to, *sources):
        rounding = next((name for name in self.modifiers if name in self.machine.ROUNDINGS), "none")
        if len(self.types) != 2 or (len(sources) == 2 and rounding != "rn"):
            raise self._unsupported()
        self.record.update(type=self.types[0], type2=self.types[1], rounding=self.machine.ROUNDINGS[rounding])
        self._simple("cvt2" if len(sources) == 2 else "cvt", [to], list(sources))

    def _decode_cvta(self, to, a):
        self._simple("cvta", [to], [a], modifier=int(self._has("to")))

    def _decode_ld(self, to, address, *_cache_policy):
        if self._has("nc"):
            self._set_flags("non_coherent")
        base, offset = self._address(address)
        variable = self.variables.get(re.match(r"\[\s*([\w$]*)", address)[1])
        if self.record["space"] == self.machine.SPACES["param"] and variable and variable.space == "local":
            self.record["space"] = self.machine.SPACES["local"]
        self._set_operands(self._vector(to), [base])
        self._emit("ld", offset=offset)

    _decode_ldu = _decode_ld

    def _decode_st(self, address, value, *_cache_policy):
        base, offset = self._address(address)
        if self.record["space"] == self.machine.SPACES["param"]:  # an argument of a call
            self.record["space"] = self.machine.SPACES["local"]
        self._set_operands([], [base, *self._vector(value)])
        self._emit("st", offset=offset)

    def _decode_atom(self, to, address, *values):
        operation = next((name for name in self.modifiers if name in self.machine.ATOMICS), None)
        if operation is None or any(value.startswith("{") for value in values):
            raise self._unsupported()
        base, offset = self._address(address)
        destinations = [] if to is None else [self._slot(to)]
        self._set_operands(destinations, [base, *map(self._slot, values)])
        self._emit("atom", modifier=self.machine.ATOMICS[operation], offset=offset)

    def _decode_red(self, address, *values):
        self._decode_atom(None, address, *values)

    def _decode_cp(self, *operands):
        if self.modifiers[0] != "async" or self._has("bulk", "mbarrier"):
            raise self._unsupported()
        if self._has("commit_group"):
            self._emit("cp_commit")
        elif self._has("wait_group"):
            self._simple("cp_wait", [], list(operands))
        elif self._has("wait_all"):
            self._emit("cp_wait_all")
        else:
            (to, offset), (source, source_offset) = self._address(operands[0]), self._address(operands[1])
            if self._has("L2::cache_hint") and len(operands) > 3:
                operands = operands[:-1]
            sizes = [self._slot(operand) for operand in operands[2:4]]
            self._set_operands([], [to, source, *sizes])
            self._emit("cp_async", offset=offset, source_offset=source_offset)

    def _decode_shfl(self, to, *sources):
        mode = self._which("up", "down", "bfly", "idx")
        self._simple("shfl", to.split("|"), list(sources), modifier=mode)

    def _decode_vote(self, *operands):
        to, *sources = self._plus_predicate(list(operands), 1)
        self._simple("vote", [to], sources, modifier=self._which("all", "any", "uni", "ballot"))

    def _decode_match(self, to, *sources):
        self._simple("match", to.split("|"), list(sources), modifier=int(self._has("all")))

    def _decode_redux(self, to, *sources):
        operation = next((name for name in self.modifiers if name in self.machine.ATOMICS), None)
        if operation is None or self.record["type"] == self.machine.TYPES["f32"]:
            raise self._unsupported()
        self._simple("redux", [to], list(sources), modifier=self.machine.ATOMICS[operation])

    def _decode_activemask(self, to):
        self._simple("activemask", [to], [])

    def _decode_ldmatrix(self, to, address):
        if self._has("trans"):
            self._set_flags("trans")
        base, offset = self._address(address)
        self._set_operands(self._vector(to), [base])
        self._emit("ldmatrix", offset=offset, space=self.machine.SPACES["shared"])

    def _decode_stmatrix(self, address, value):
        if self._has("trans"):
            self._set_flags("trans")
        base, offset = self._address(address)
        self._set_operands([], [base, *self._vector(value)])
        self._emit("stmatrix", offset=offset, space=self.machine.SPACES["shared"])

    def _decode_mma(self, *operands):
        shapes = ("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
        if not self._has("sync") or not self._has(*shapes) or self._has("sp") or len(self.types) != 4:
            raise self._unsupported()
        d, a, b, c = map(self._vector, operands)
        self._set_operands(d, a + b + c)
        self._emit("mma", modifier=len(a), type=self.types[1], type2=self.types[0])

    def _decode_bar(self, *operands, aligned=True):
        if self.modifiers[0] == "warp":
            return self._simple("warpsync", [], list(operands))
        kind = next((name for name in self.modifiers if name in ("sync", "arrive", "red")), None)
        if kind is None:
            raise self._unsupported()
        if aligned or self._has("aligned"):
            self._set_flags("aligned")
        reduces = kind == "red"
        operands = self._plus_predicate(list(operands), len(operands) - 1)
        destinations, sources = operands[:reduces], operands[reduces:]
        if len(sources) - reduces > 1:
            self._set_flags("has_count")
        # sync, arrive, red.popc, red.and, red.or: the numbering of barriers.cpp
        modifier = 2 + self._which("popc", "and", "or") if reduces else int(kind == "arrive")
        self._simple("bar", destinations, sources, modifier=modifier)

    def _decode_barrier(self, *operands):
        if not self._has("cluster"):
            return self._decode_bar(*operands, aligned=False)
        self._need_clusters()
        if self._has("aligned"):
            self._set_flags("aligned")
        arrives = self._which("wait", "arrive")
        if arrives and not self._has("relaxed"):
            self._set_flags("release")
        self._simple("cluster_arrive" if arrives else "cluster_wait", [], list(operands))

    def _decode_fence(self):
        self._emit("nop" if self._has("cta", "proxy") else "fence")

    _decode_membar = _decode_fence

    def _decode_griddepcontrol(self):
        self._emit("grid_wait" if self._which("launch_dependents", "wait") else "nop")

    def _decode_bra(self, label):
        self.branches.append((len(self.records), label, list(self.scopes)))
        self._emit("bra")

    def _decode_brx(self, index, table):
        """The targets become a row of branches behind this instruction; the machine jumps to where one of them goes."""
        self._set_operands([], [self._slot(index)])
        self._emit("brx", target=len(self.records) + 1)
        for label in self.tables[table]:
            self.text, self.record = f"bra {label}", {"predicate": -1, "operands": []}
            self._decode_bra(label)

    def _decode_exit(self):
        self._emit("exit")

    _decode_ret = _decode_exit

    def _decode_trap(self):
        self._emit("trap")

    def _decode_call(self, *_operands):
        if "__assertfail" in self.text:
            self._emit("assertfail")
        elif "vprintf" in self.text:  # prints nothing, returns 0
            result = re.search(r"\(\s*([\w$]+)", self.text)[1]
            self._set_operands([], [self._slot(result), self._number(0)])
            self._emit("st", type=self.machine.TYPES["b32"], space=self.machine.SPACES["local"], offset=0)
        else:
            self._inline_call(self.text)
