"""Runs what `fgrad.integer.to_c` writes: on this machine, and on an emulated Cortex-M3.

The emulator is PyPI's unicorn, the compiler for it PyPI's ziglang; both are optional.
"""

import ctypes
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fgrad.integer import CProgram

_STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O2"]
# Flash from 0, RAM from 0x20000000 as on every Cortex-M, arguments beside them.
_FLASH, _RAM, _STACK_TOP, _OUTSIDE, _END = (
    0,
    0x20000000,
    0x20400000,
    0x30000000,
    0x3FF00,
)
_MEGABYTE = 1 << 20


def structure(program: CProgram, name: str) -> type[ctypes.Structure]:
    """A struct of the header, laid out as C does."""

    def kind(array: Any) -> Any:
        element = np.ctypeslib.as_ctypes_type(np.dtype(array.dtype))
        return element * int(np.prod(array.shape)) if array.shape else element

    fields = [(field, kind(array)) for field, array in program.fields[name]]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def filled(program: CProgram, name: str, arrays: Sequence[Any]) -> ctypes.Structure:
    """A struct with the values of arrays, one for each field."""
    struct = structure(program, name)()
    for (field, kind), array in zip(program.fields[name], arrays, strict=True):
        values = np.ascontiguousarray(array, np.dtype(kind.dtype))
        place = ctypes.addressof(struct) + getattr(type(struct), field).offset
        ctypes.memmove(place, values.ctypes.data, values.nbytes)
    return struct


def arrays(program: CProgram, name: str, struct: ctypes.Structure) -> list[np.ndarray]:
    """The arrays in a struct."""
    found = []
    for field, kind in program.fields[name]:
        offset = getattr(type(struct), field).offset
        count = int(np.prod(kind.shape))
        flat = np.frombuffer(bytes(struct), np.dtype(kind.dtype), count, offset)
        found.append(flat.reshape(kind.shape))
    return found


def has_host_compiler() -> bool:
    """Whether there is a C compiler for this machine."""
    return shutil.which("gcc") is not None or shutil.which("cc") is not None


def has_emulator() -> bool:
    """Whether the compiler for the Cortex-M3 and its emulator are installed."""
    return all(importlib.util.find_spec(n) is not None for n in ("unicorn", "ziglang"))


def host_library(program: CProgram, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The program, compiled for this machine."""
    compiler = shutil.which("gcc") or shutil.which("cc") or "cc"
    target = program.source.with_suffix(".so")
    command = [compiler, *_STRICT, *flags, "-shared", "-fPIC", str(program.source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class CortexM3:
    """An emulated Cortex-M3, which has no floating-point unit.

    Attributes:
      flash_bytes: code, tables and initial weights.
      ram_bytes: static memory: the arena.
      instructions: executed by the last call.
      stack_bytes: used by the last call.
    """

    def __init__(self, program: CProgram, optimize: str = "-O2"):
        """Compiles a program and loads it."""
        import unicorn
        from unicorn import arm_const

        self._uc, self._arm = unicorn, arm_const
        self.program = program
        elf = program.source.with_suffix(".elf")
        script = program.source.with_suffix(".ld")
        script.write_text(_LINKER_SCRIPT)
        command = [sys.executable, "-m", "ziglang", "cc"]
        command += ["-target", "thumb-freestanding-eabi", "-mcpu=cortex_m3"]
        command += [*_STRICT, optimize, "-ffreestanding", "-nostdlib", "-g"]
        command += [
            "-fno-sanitize=all",
            f"-Wl,-T,{script},--no-gc-sections,--entry=fgrad_predict",
        ]
        subprocess.run([*command, str(program.source), "-o", str(elf)], check=True)
        self._symbols, segments = _read_elf(elf)
        machine = unicorn.Uc(
            unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS
        )
        machine.ctl_set_cpu_model(arm_const.UC_CPU_ARM_CORTEX_M3)
        machine.mem_map(_FLASH, 4 * _MEGABYTE)
        machine.mem_map(_RAM, 4 * _MEGABYTE)
        machine.mem_map(_OUTSIDE, 16 * _MEGABYTE)
        self.flash_bytes = self.ram_bytes = 0
        for address, data, size in segments:
            machine.mem_write(address, data)
            if address < _RAM:
                self.flash_bytes += len(data)
            else:
                self.ram_bytes += size
        self.machine = machine
        self.instructions = self.stack_bytes = 0
        self._lowest = _STACK_TOP
        self._limit: int | None = None
        machine.hook_add(unicorn.UC_HOOK_BLOCK, self._count)
        machine.hook_add(
            unicorn.UC_HOOK_MEM_WRITE,
            self._watch_stack,
            begin=_STACK_TOP - _MEGABYTE,
            end=_STACK_TOP,
        )

    def write(self, address: int, data: bytes) -> int:
        """Puts data beside the program's own memory, at an offset; its address."""
        self.machine.mem_write(_OUTSIDE + address, data)
        return _OUTSIDE + address

    def read(self, address: int, size: int) -> bytes:
        """Memory at an address."""
        return bytes(self.machine.mem_read(address, size))

    def call(
        self, function: str, *pointers: int, stop_after: int | None = None
    ) -> int | None:
        """Calls a function of up to four pointers.

        Args:
          function: its name.
          *pointers: its arguments.
          stop_after: cut the power after about as many instructions.

        Returns:
          What it returned, or None if it was cut off.
        """
        arm, machine = self._arm, self.machine
        registers = (arm.UC_ARM_REG_R0, arm.UC_ARM_REG_R1, arm.UC_ARM_REG_R2)
        for register, pointer in zip(registers, pointers, strict=False):
            machine.reg_write(register, pointer)
        machine.reg_write(arm.UC_ARM_REG_SP, _STACK_TOP)
        machine.reg_write(arm.UC_ARM_REG_LR, _END | 1)
        self.instructions, self._lowest = 0, _STACK_TOP
        self._limit = stop_after
        machine.emu_start(self._symbols[function] | 1, _END)
        self.stack_bytes = _STACK_TOP - self._lowest
        if stop_after is not None and self.instructions >= stop_after:
            return None
        return int(machine.reg_read(arm.UC_ARM_REG_R0))

    def _count(self, machine: Any, address: int, size: int, _: Any) -> None:
        # Instructions of Thumb-2 have 2 or 4 bytes: this counts halfwords, an upper
        # bound of them.
        self.instructions += size // 2
        if self._limit is not None and self.instructions >= self._limit:
            machine.emu_stop()

    def _watch_stack(
        self, machine: Any, access: int, address: int, size: int, value: int, _: Any
    ) -> None:
        self._lowest = min(self._lowest, address)


def pointers(
    machine: CortexM3, structs: Mapping[str, ctypes.Structure]
) -> dict[str, int]:
    """Puts structs into the memory of a machine; their addresses."""
    found, offset = {}, 0
    for name, struct in structs.items():
        found[name] = machine.write(offset, bytes(struct))
        offset += -(-ctypes.sizeof(struct) // 16) * 16
    return found


_LINKER_SCRIPT = """
ENTRY(fgrad_predict)
SECTIONS {
  .text 0x1000 : { KEEP(*(.text*)) KEEP(*(.rodata*)) }
  .data 0x20000000 : { *(.data*) }
  .bss 0x20001000 : { *(.bss*) *(COMMON) }
  /DISCARD/ : { *(.ARM*) *(.comment) *(.note*) }
}
"""


def _read_elf(
    path: pathlib.Path,
) -> tuple[dict[str, int], list[tuple[int, bytes, int]]]:
    """Symbols of a 32-bit ELF, and (address, data, size) of what takes memory."""
    data = path.read_bytes()

    def integer(offset: int, size: int) -> int:
        return int.from_bytes(data[offset : offset + size], "little")

    sections = []
    start, size, count = integer(32, 4), integer(46, 2), integer(48, 2)
    for i in range(count):
        at = start + i * size
        # type, flags, address, offset, size, link, entry size
        places = (4, 8, 12, 16, 20, 24, 36)
        sections.append([integer(at + place, 4) for place in places])
    symbols: dict[str, int] = {}
    loaded = []
    for kind, flags, address, offset, length, link, entry in sections:
        if kind == 2:  # the symbol table
            names = sections[link][3]
            for at in range(offset, offset + length, entry):
                begin = names + integer(at, 4)
                name = data[begin : data.index(b"\0", begin)].decode()
                symbols[name] = integer(at + 4, 4) & ~1
        elif flags & 2 and length:  # it takes memory
            content = data[offset : offset + length] if kind != 8 else bytes(length)
            loaded.append((address, content, length))
    return symbols, loaded
