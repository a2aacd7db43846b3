"""What a built kernel's machine code says: registers, local memory, instructions.

The tools cuobjdump and nvdisasm come with CUDA or inside the triton package.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ELF_MAGIC = b"\x7fELF"
ELF_MACHINE_CUDA = 190


@functools.cache
def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        triton = importlib.util.find_spec("triton")
        if triton is not None and triton.origin is not None:
            inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
            found = str(inside) if inside.exists() else None
    if found is None:
        pytest.skip(f"{name} is neither on the PATH nor in the triton package")
    return found


@dataclass(frozen=True)
class MachineCode:
    """stack and local: bytes per thread; lines: the disassembly, one instruction each."""

    stack: int
    local: int
    lines: tuple[str, ...]

    def count(self, opcode: str) -> int:
        """How many instructions have an opcode that starts with `opcode`."""
        return sum(n for name, n in self._opcodes.items() if name.startswith(opcode))

    @functools.cached_property
    def _opcodes(self) -> collections.Counter[str]:
        names = (re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", x) for x in self.lines)
        return collections.Counter(match[1] for match in names if match)


def _device_image(library: bytes) -> bytes:
    """The kernel's image inside a linked object: the ELF file for the GPU."""
    start = library.find(ELF_MAGIC, 1)
    while start >= 0:
        header = struct.unpack_from("<HHIQQQIHHHHHH", library, start + 16)
        machine, program_table, section_table = header[1], header[4], header[5]
        program_size, programs, section_size, sections = header[8:12]
        if machine == ELF_MACHINE_CUDA:
            length = max(
                program_table + program_size * programs, section_table + section_size * sections
            )
            return library[start : start + length]
        start = library.find(ELF_MAGIC, start + 1)
    raise AssertionError("no device image in the object")


def read_machine_code(library: Path, scratch: Path) -> MachineCode:
    """Reads the machine code of a built kernel; `scratch` is a folder for its device image."""
    image = scratch / f"{library.stem}.cubin"
    image.write_bytes(_device_image(library.read_bytes()))

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = run(_tool("cuobjdump"), "--dump-resource-usage", str(image))
    stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))  # type: ignore[index]
    return MachineCode(stack, local, tuple(run(_tool("nvdisasm"), str(image)).splitlines()))
