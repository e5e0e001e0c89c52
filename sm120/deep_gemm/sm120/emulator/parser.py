"""PTX text -> kernels of instructions with resolved registers, labels and symbols.

Statements end with ``;``.  ``{`` opens a scope for registers and labels (inline assembly makes many of them with the
same names).  Nothing here knows what an instruction does.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import EmulatorError
from .formats import TYPES, Type


class Reg(NamedTuple):
    """A register: its number in the kernel's register file, its width in bits (1: predicate)."""

    number: int
    bits: int
    name: str


class Imm(NamedTuple):
    """A constant.  ``kind`` int: value is an integer; f32, f64: value holds the bits of that format."""

    value: int
    kind: str


class Sym(NamedTuple):
    """A label, variable, parameter or special register, by name."""

    name: str


class Addr(NamedTuple):
    """[base + offset]; ``extra`` holds what follows a comma inside the brackets (tensor coordinates)."""

    base: Reg | Sym | Imm
    offset: int
    extra: tuple = ()


class Vec(NamedTuple):
    """{a, b, ...}"""

    items: tuple


class Pair(NamedTuple):
    """p|q: two destinations."""

    first: Reg | None
    second: Reg | None


class Not(NamedTuple):
    """!p"""

    operand: Reg


SINK = Sym("_")


@dataclass
class Instruction:
    """One instruction.  ``parts`` is the opcode split at its dots; ``pc`` its index in the kernel."""

    pc: int
    line: int
    text: str
    guard: Reg | Not | None
    opcode: str
    parts: tuple[str, ...]
    operands: tuple
    scope: dict = field(repr=False)

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.parts for modifier in modifiers)

    def one_of(self, *modifiers: str, default: str = "") -> str:
        """The first of ``modifiers`` that the opcode carries."""
        return next((modifier for modifier in modifiers if modifier in self.parts), default)

    @property
    def types(self) -> list[Type]:
        return [TYPES[part] for part in self.parts if part in TYPES]

    @property
    def type(self) -> Type:
        """The last type in the opcode: for most instructions the type of all operands."""
        return self.types[-1]

    def error(self, message: str) -> EmulatorError:
        return EmulatorError(f"PTX line {self.line}: {message}\n    {self.text}")


@dataclass
class Variable:
    """A .shared, .local, .global, .const or .param variable.  ``nbytes`` 0: unsized (dynamic shared memory)."""

    name: str
    space: str
    nbytes: int
    align: int
    type: Type
    data: bytes | None = None
    offset: int = 0


@dataclass
class Kernel:
    name: str
    params: dict[str, Variable] = field(default_factory=dict)
    param_bytes: int = 0
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    registers: int = 0
    directives: str = ""
    names: set[str] = field(default_factory=set)  # of variables, labels and special registers in its operands

    def block_limit(self) -> int | None:
        """Most threads a block may have, by .maxntid or .reqntid."""
        found = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", self.directives)
        if not found:
            return None
        x, y, z = (int(number or 1) for number in found.groups())
        return x * y * z


COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file|version|target|address_size)\b[^\n]*", re.M)
ENTRY = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b\s*(?:\([^)]*\)\s*)?([\w$]+)\s*", re.S)
LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
SPACE = re.compile(r"\s+")
STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
OPERAND = re.compile(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,{\[]+)+)\s*(?:,|$)")
PARTS = re.compile(r"\.(?=[A-Za-z0-9_])")
NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
FLOAT = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?$")
REGISTERS = re.compile(r"\.reg\s+((?:\.v[24]\s+)?)\.(\w+)\s+(.*)", re.S)
VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|global|const|param)\b\s*(.*?)\.([a-z]+\d+(?:x2)?)\b\s*"
    r"(?:\.ptr\b(?:\s*\.(?:global|shared|const|local))?(?:\s*\.align\s+\d+)?)?\s*([\w$%]+)((?:\s*\[[^\]]*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


def integer(text: str) -> int:
    text = text.rstrip("U")
    digits = text.lstrip("+-")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return int(text, 8) if octal else int(text, 0)


class Scope:
    """Names of registers and labels between two braces."""

    def __init__(self, parent: Scope | None):
        self.parent, self.labels, self.declared, self.known = parent, {}, {}, {}

    def label(self, name: str) -> int | None:
        scope = self
        while scope is not None and name not in scope.labels:
            scope = scope.parent
        return None if scope is None else scope.labels[name]


class Parser:
    """Reads one PTX module into ``kernels`` and ``variables``."""

    def __init__(self, text: str):
        def blank(match: re.Match) -> str:  # keeps line numbers
            return "\n" * match.group().count("\n") or " "

        self.text = LINE_DIRECTIVE.sub(blank, COMMENT.sub(blank, text))
        self.newlines = [match.start() for match in re.finditer("\n", self.text)]
        self.kernels: dict[str, Kernel] = {}
        self.variables: dict[str, Variable] = {}
        target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
        self.target = target.group(1) if target else ""
        self._module()

    def line(self, position: int) -> int:
        return bisect_right(self.newlines, position - 1) + 1

    def fail(self, position: int, message: str) -> EmulatorError:
        excerpt = " ".join(self.text[position : position + 120].split())
        return EmulatorError(f"PTX line {self.line(position)}: {message}\n    {excerpt}")

    # --- the module ---

    def _module(self) -> None:
        text, position = self.text, 0
        while (position := self._skip(position)) < len(text):
            header = ENTRY.match(text, position)
            if header:
                position = self._function(header)
            elif text.startswith(".section", position):
                position = self._closing(text.index("{", position)) + 1
            else:
                end = text.find(";", position)
                if end < 0:
                    raise self.fail(position, "statement without an end")
                statement = text[position:end].strip()
                variable = self._variable(statement, position)
                if variable:
                    self.variables[variable.name] = variable
                elif not statement.startswith((".pragma", ".alias")):
                    raise self.fail(position, "cannot read this statement of the module")
                position = end + 1

    def _skip(self, position: int) -> int:
        found = SPACE.match(self.text, position)
        return found.end() if found else position

    def _closing(self, opening: int) -> int:
        depth = 0
        for match in re.compile(r"[{}]").finditer(self.text, opening):
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return match.start()
        raise self.fail(opening, "brace is never closed")

    def _function(self, header: re.Match) -> int:
        text, position = self.text, header.end()
        kernel = Kernel(header.group(2))
        if text.startswith("(", position):
            end = text.index(")", position)
            for declaration in filter(None, (part.strip() for part in text[position + 1 : end].split(","))):
                param = self._variable(declaration, position)
                if param is None:
                    raise self.fail(position, f"cannot read the parameter '{declaration}'")
                kernel.param_bytes = -(-kernel.param_bytes // param.align) * param.align
                param.offset = kernel.param_bytes
                kernel.param_bytes += param.nbytes
                kernel.params[param.name] = param
            position = end + 1
        body = re.compile(r"[{;]").search(text, position)
        if body is None:
            raise self.fail(position, f"function '{kernel.name}' has no body")
        if body.group() == ";":  # a declaration
            return body.end()
        kernel.directives = text[position : body.start()]
        if header.group(1) == "func":  # calls are not supported: an instruction that calls will say so
            return self._closing(body.start()) + 1
        self.kernels[kernel.name] = kernel
        return Body(self, kernel, body.end()).end

    def _variable(self, declaration: str, position: int) -> Variable | None:
        found = VARIABLE.match(declaration)
        if not found:
            return None
        space, attributes, type_name, name, dims, initial = found.groups()
        if type_name not in TYPES:
            raise self.fail(position, f"unknown type .{type_name}")
        kind = TYPES[type_name]
        align = re.search(r"\.align\s+(\d+)", attributes)
        count = 1
        for dim in re.findall(r"\[([^\]]*)\]", dims):
            count *= integer(dim.strip()) if dim.strip() else 0
        size = max(kind.bits // 8, 1)
        data = None
        if initial:
            data = b"".join(self._constant(item, kind, position) for item in re.findall(r"[^\s{},]+", initial))
            data = data.ljust(count * size, b"\0")
        return Variable(name, space, count * size, int(align.group(1)) if align else size, kind, data)

    def _constant(self, text: str, kind: Type, position: int) -> bytes:
        value = immediate(text)
        if value is None:
            raise self.fail(position, f"cannot read the initial value '{text}'")
        if value.kind == "f64" and kind.bits == 32:
            return struct.pack("<f", struct.unpack("<d", struct.pack("<Q", value.value))[0])
        return (value.value & ((1 << kind.bits) - 1)).to_bytes(kind.bits // 8, "little")


def immediate(text: str) -> Imm | None:
    """A constant operand, or None."""
    if NUMBER.match(text):
        return Imm(integer(text), "int")
    prefix = text[:2].lower()
    if prefix == "0f" and len(text) == 10:
        return Imm(int(text[2:], 16), "f32")
    if prefix == "0d" and len(text) == 18:
        return Imm(int(text[2:], 16), "f64")
    if FLOAT.match(text):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
    return None


class Body:
    """The statements of one kernel."""

    def __init__(self, parser: Parser, kernel: Kernel, position: int):
        self.parser, self.kernel, self.scope = parser, kernel, Scope(None)
        self.opcodes: dict[str, tuple[str, ...]] = {}
        text = parser.text
        depth = 1
        while depth:
            position = parser._skip(position)
            if position >= len(text):
                raise parser.fail(len(text) - 1, f"kernel '{kernel.name}' is never closed")
            first = text[position]
            if first == "{":
                self.scope, depth, position = Scope(self.scope), depth + 1, position + 1
            elif first == "}":
                self.scope, depth, position = self.scope.parent, depth - 1, position + 1
            elif first == ";":
                position += 1
            elif label := LABEL.match(text, position):
                self.scope.labels[label.group(1)] = len(kernel.instructions)
                position = label.end()
            else:
                end = text.find(";", position)
                if end < 0:
                    raise parser.fail(position, "statement without an end")
                statement = text[position:end].rstrip()
                if first == ".":
                    self._declaration(statement, position)
                else:
                    self._instruction(statement, position)
                position = end + 1
        self.end = position

    def _declaration(self, statement: str, position: int) -> None:
        if registers := REGISTERS.match(statement):
            vector, type_name, names = registers.groups()
            if vector or type_name not in TYPES:
                raise self.parser.fail(position, f"registers of type {vector}.{type_name} are not supported")
            for name in names.split(","):
                self.scope.declared[name.split("<")[0].strip()] = (TYPES[type_name].bits, "<" in name)
        elif variable := self.parser._variable(statement, position):
            self.kernel.variables[variable.name] = variable
        elif not statement.startswith((".pragma", ".maxnreg", ".branchtargets")):
            raise self.parser.fail(position, "cannot read this declaration")

    def _instruction(self, statement: str, position: int) -> None:
        found = STATEMENT.match(statement)
        if not found:
            raise self.parser.fail(position, "cannot read this statement")
        negated, guard, opcode, rest = found.groups()
        if guard:
            guard = self._register(guard, position)
            guard = Not(guard) if negated else guard
        parts = self.opcodes.get(opcode)
        if parts is None:
            parts = self.opcodes[opcode] = tuple(PARTS.split(opcode))
        operands = tuple(self._operand(text.strip(), position) for text in OPERAND.findall(rest)) if rest else ()
        kernel = self.kernel
        kernel.instructions.append(
            Instruction(
                len(kernel.instructions),
                self.parser.line(position),
                " ".join(statement.split()) + ";",
                guard or None,
                opcode,
                parts,
                operands,
                self.scope,
            )
        )

    def _operand(self, text: str, position: int):
        first = text[0]
        if text == "WARP_SZ":
            return Imm(32, "int")
        if first == "(":  # what a call takes and returns; calls are refused later, by name
            return Sym(text)
        if first == "%" or first.isalpha() or first in "_$":
            if "|" in text:
                return Pair(*(self._operand(half.strip(), position) for half in text.split("|")))
            found = self._register(text, position, missing=Sym(text))
            if isinstance(found, Sym):
                self.kernel.names.add(text)
            return found
        if first == "[":
            return self._address(text[1:-1].strip(), position)
        if first == "{":
            return Vec(tuple(self._operand(item.strip(), position) for item in text[1:-1].split(",")))
        if first == "!":
            return Not(self._register(text[1:].strip(), position))
        value = immediate(text)
        if value is None:
            raise self.parser.fail(position, f"cannot read the operand '{text}'")
        return value

    def _address(self, text: str, position: int) -> Addr:
        base, *extra = (part.strip() for part in OPERAND.findall(text))
        found = re.match(r"([\w$%.]+)\s*(?:\+\s*(-?\w+))?$", base)
        if not found:
            raise self.parser.fail(position, f"cannot read the address [{text}]")
        name, offset = found.groups()
        return Addr(
            self._operand(name, position),
            integer(offset) if offset else 0,
            tuple(self._operand(item, position) for item in extra),
        )

    def _register(self, name: str, position: int, missing=None):
        scope = self.scope
        known = scope.known.get(name)
        if known is not None:
            return known
        prefix = name.rstrip("0123456789")
        while scope is not None:
            # `%r<9>` declares %r0 .. %r8; a plain `%r1` declares just that
            bits, many = scope.declared.get(name, (0, True))
            if many and prefix != name:
                bits, many = scope.declared.get(prefix, (0, False))
                bits = bits if many else 0
            if bits:
                register = scope.known.get(name)
                if register is None:
                    register = scope.known[name] = Reg(self.kernel.registers, bits, name)
                    self.kernel.registers += 1
                self.scope.known.setdefault(name, register)
                return register
            scope = scope.parent
        if missing is None:
            raise self.parser.fail(position, f"register '{name}' is not declared")
        return missing
