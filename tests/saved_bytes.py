"""What autograd keeps of a forward, for tests and benchmarks of the kernel package."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], Tensor], ignore: list[Tensor]) -> int:
    """Bytes that autograd keeps, each storage once, without those of `ignore`."""
    skipped = {t.untyped_storage().data_ptr() for t in ignore}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        out = forward()
    assert out.requires_grad
    return sum(kept.values())
