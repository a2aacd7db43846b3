"""Reads what the compiler made of a kernel: registers, stack and instructions of the cubin in an
object.

The tools come with Triton's wheel (cuobjdump and nvdisasm) and need no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ELF_MAGIC = b"\x7fELF"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")


@dataclass(frozen=True)
class Sass:
    """A kernel's resources and instructions, in order of address; of several, all of them."""

    stack_bytes: int
    instructions: list[str]

    def count(self, mnemonic: str) -> int:
        return sum(mnemonic in line for line in self.instructions)

    def main_loop(self, width: int) -> list[str]:
        """From the first to the last matrix instruction whose N is `width`."""
        at = [i for i, line in enumerate(self.instructions) if f"HGMMA.64x{width}x16" in line]
        return self.instructions[at[0] : at[-1] + 1]


def tools_folder() -> Path | None:
    """Where cuobjdump and nvdisasm are, or None."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "cuobjdump").exists() else None


def read_sass(object_file: Path, scratch: Path) -> Sass:
    """Disassembles the one cubin inside an exported object file."""
    tools = tools_folder()
    assert tools is not None
    for name in ("cuobjdump", "nvdisasm"):  # wheels may lack the executable bit
        shutil.copy(tools / name, scratch / name)
        (scratch / name).chmod(0o755)
    data = object_file.read_bytes()
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(data[data.index(ELF_MAGIC, len(ELF_MAGIC)) :])
    environment = {**os.environ, "PATH": f"{scratch}:{os.environ['PATH']}"}

    def dump(flag: str) -> str:
        command = [str(scratch / "cuobjdump"), flag, str(cubin)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout

    stacks = [int(found) for found in re.findall(r"STACK:(\d+)", dump("-res-usage"))]
    assert stacks
    lines = (INSTRUCTION.match(line) for line in dump("-sass").splitlines())
    return Sass(max(stacks), [match[2] for match in lines if match])
