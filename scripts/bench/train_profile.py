"""One traced training step by kind of GPU work and by kernel."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from bench.kernels import kind

GAPS = 8  # of the longest, shown


def read_trace(path: Path) -> dict:
    """A trace, compressed or not, whatever its name says."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def profile_table(events: list[dict]) -> str:
    """GPU milliseconds of a trace by kind, its longest waits and its longest kernels."""
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min(e["ts"] for e in work)
    busy, end, last = 0.0, begin, ""
    gaps: list[tuple[float, str, str]] = []
    for event in sorted(work, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        if event["ts"] > end:
            gaps.append((event["ts"] - end, last, event["name"]))
        if stop >= end:
            end, last = stop, event["name"]
    kinds: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for event in work:
        what = kind(event["name"])
        kinds[what] = kinds.get(what, 0.0) + event["dur"] / 1e3
        kernels.setdefault(event["name"], []).append(event["dur"] / 1e3)
    lines = [f"span {(end - begin) / 1e3:.2f} ms, idle {(end - begin - busy) / 1e3:.2f} ms"]
    lines += [f"{ms:9.2f} ms  {what}" for what, ms in sorted(kinds.items(), key=lambda i: -i[1])]
    lines += [
        f"{us / 1e3:9.3f} ms idle after {before[:50]} before {after[:50]}"
        for us, before, after in sorted(gaps, reverse=True)[:GAPS]
    ]
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
    lines += [f"{sum(ms):9.3f} ms x{len(ms):<4d} {name[:110]}" for name, ms in longest]
    return "\n".join(lines) + "\n"
