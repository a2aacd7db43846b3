"""Whether a run fits a GPU: parameters, gradients, optimizer, activations and loss of one rank.

Legend: D model width, F expert width, S shared expert width, E experts, N query heads, V key and
value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.tools.logging import logger

from sonicmoe_titan.memory_measure import on_first_forward
from sonicmoe_titan.memory_model import (
    FP32,
    Checkpointing,
    LayerShape,
    Load,
    layer_terms,
    moe_terms,
    total,
)
from sonicmoe_titan.memory_peaks import backward_peak, forward_peak
from sonicmoe_titan.memory_peers import peers
from sonicmoe_titan.model_args import ModelArgs

if TYPE_CHECKING:
    from sonicmoe_titan.trainer import SonicTrainer

MIB, GIB = 2**20, 2**30
GPUS = {  # GiB that torch.cuda reports as total_memory
    "a100-40gb": 39.4,
    "a100-80gb": 79.1,
    "h100-80gb": 79.1,
    "h200-141gb": 139.7,
    "b200-180gb": 178.3,
}
DEFAULT_GPU = "h100-80gb"
RUNTIME_BYTES = int(2.5 * GIB)  # CUDA context, NCCL buffers, cuBLAS workspace; an assumption
FRAGMENTATION = 0.03  # of the allocator; an assumption
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ADAM_STATES = 2
# Bytes per logit at the worst moment of cross-entropy's backward: the kept log-softmax, the
# gradient of the likelihood and that of the softmax, each in fp32.
LOSS_BYTES_PER_LOGIT = 3 * FP32


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks do what; every rank is in one of each."""

    num_gpus: int
    replicate: int
    shard: int
    context: int
    tensor: int
    pipeline: int
    expert: int

    @property
    def fsdp(self) -> int:
        """Ranks that share each dense parameter."""
        return self.shard * self.context


def layout_of(config: SonicTrainer.Config, *, num_gpus: int | None = None) -> Layout:
    """The run's parallelism on `num_gpus` GPUs (None: what its degrees multiply to, or one node).

    Raises:
        ValueError: the degrees do not multiply to the number of GPUs.
    """
    given = config.parallelism
    fixed = (
        given.data_parallel_replicate_degree
        * given.context_parallel_degree
        * given.tensor_parallel_degree
        * given.pipeline_parallel_degree
    )
    shard = given.data_parallel_shard_degree
    if num_gpus is None:
        num_gpus = fixed * shard if shard > 0 else max(8, fixed)
    if shard < 0:
        shard = max(1, num_gpus // fixed)
    if fixed * shard != num_gpus:
        raise ValueError(
            f"{num_gpus} GPUs do not match the parallel degrees of the config: data parallel "
            f"{given.data_parallel_replicate_degree} x {shard}, context "
            f"{given.context_parallel_degree}, tensor {given.tensor_parallel_degree}, pipeline "
            f"{given.pipeline_parallel_degree}; give --gpus {fixed * shard} or change a degree"
        )
    return Layout(
        num_gpus=num_gpus,
        replicate=given.data_parallel_replicate_degree,
        shard=shard,
        context=given.context_parallel_degree,
        tensor=given.tensor_parallel_degree,
        pipeline=given.pipeline_parallel_degree,
        expert=given.expert_parallel_degree,
    )


def checkpointing_of(config: SonicTrainer.Config) -> Checkpointing:
    """The activation checkpointing of a run."""
    policy = config.activation_checkpoint
    if policy is None:
        return "none"
    name = type(policy).__qualname__.split(".")[0]
    return "full" if name == "FullAC" else "selective" if "Selective" in name else "none"


def tokens_of(config: SonicTrainer.Config, layout: Layout) -> int:
    """Tokens of one microbatch on one rank."""
    sequences = config.training.local_batch_size
    if layout.pipeline > 1:
        sequences = config.parallelism.pipeline_parallel_microbatch_size
    return sequences * config.training.seq_len // layout.context


def shape_of(
    config: SonicTrainer.Config, layout: Layout, *, load: Load, on_gpu: bool = True
) -> LayerShape:
    """The layer of a run; on a GPU the norm is fused."""
    return LayerShape(
        args=config.model,
        num_tokens=tokens_of(config, layout),
        value_bytes=DTYPE_BYTES[config.training.mixed_precision_param],
        expert_parallel=layout.expert,
        load=load,
        on_gpu=on_gpu,
    )


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements: of a layer outside its routed experts, of its experts, of the rest."""

    dense: int
    experts: int
    embeddings: int


def count_parameters(args: ModelArgs) -> Parameters:
    """Elements of the decoder that `model.decoder_config` builds."""
    D, H = args.dim, args.head_width
    attention = D * (args.num_heads + 2 * args.kv_heads) * H + args.num_heads * H * D
    norms = 2 * D + (2 * H if args.qk_norm else 0)
    dense = attention + norms + args.num_experts * D + 3 * D * args.shared_expert_dim
    embeddings = args.vocab_size * D * (1 if args.tie_embeddings else 2)
    return Parameters(dense, 3 * args.num_experts * D * args.expert_dim, embeddings + D)


def rank_items(config: SonicTrainer.Config, layout: Layout, *, load: Load) -> dict[str, int]:
    """Bytes that the fullest rank holds at its worst moment, by what they are for.

    Worst is the start of the backward: every layer's activations are kept, and one layer computes
    its gradients, or the loss its logits'. Tensor parallelism divides parameters here and not the
    activations, which it divides in part only.
    """
    args, training = config.model, config.training
    counted = count_parameters(args)
    layers = -(-args.num_layers // layout.pipeline)
    master = DTYPE_BYTES[training.dtype]
    working = DTYPE_BYTES[training.mixed_precision_param]
    reduced = DTYPE_BYTES[training.mixed_precision_reduce]
    stage = layers * (counted.dense + counted.experts) + counted.embeddings
    sharded = stage // (layout.fsdp * layout.tensor)
    gathered = (counted.dense + counted.experts // layout.expert) // layout.tensor
    embeddings = counted.embeddings // layout.tensor

    shape = shape_of(config, layout, load=load)
    policy = checkpointing_of(config)
    kept = total(layer_terms(shape, policy))
    in_flight = layout.pipeline  # microbatches that the first stage of 1F1B holds
    rows = shape.num_tokens
    chunked = isinstance(config.loss, ChunkedLossWrapper.Config)
    chunks = config.loss.num_chunks if chunked else 1  # pyrefly: ignore[missing-attribute]
    loss = LOSS_BYTES_PER_LOGIT * (rows // chunks) * args.vocab_size // layout.tensor
    hidden = rows * args.dim * (2 * shape.value_bytes + (FP32 if chunked else 0))
    transient = max(
        backward_peak(shape, policy) + reduced * gathered, forward_peak(shape), loss + hidden
    )
    return {
        "parameters": master * sharded,
        "gradients": master * sharded,
        "optimizer state (Adam)": ADAM_STATES * FP32 * sharded,
        "gathered parameters (2 layers, embeddings)": working * (2 * gathered + embeddings),
        "activations kept": layers * in_flight * kept,
        "largest transient (a layer's backward or the loss)": transient,
        "runtime (assumed)": RUNTIME_BYTES,
    }


def fits(items: dict[str, int], gpu: str) -> tuple[bool, float]:
    """Whether the sum fits the named GPU, and the sum in GiB with the allocator's fragmentation.

    Raises:
        ValueError: a GPU that has no entry.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: unknown; expected one of {', '.join(GPUS)}")
    needed = sum(items.values()) * (1 + FRAGMENTATION) / GIB
    return needed <= GPUS[gpu], needed


def predicted_activation_bytes(config: SonicTrainer.Config, *, num_gpus: int) -> int:
    """What the layers of one rank keep for their backward in a run on `num_gpus` ranks here."""
    layout = layout_of(config, num_gpus=num_gpus)
    layers = -(-config.model.num_layers // layout.pipeline)
    kept = total(layer_terms(_shape_here(config, layout), checkpointing_of(config)))
    return layers * layout.pipeline * kept


def describe_activations(config: SonicTrainer.Config, *, num_gpus: int) -> str:
    """One line for the log of a run."""
    layout = layout_of(config, num_gpus=num_gpus)
    ours, *_, stock = peers(_shape_here(config, layout))
    kept = predicted_activation_bytes(config, num_gpus=num_gpus)
    bound = "at most " if layout.tensor > 1 else ""  # it divides some of them, see `rank_items`
    return (
        f"Activations that this rank keeps, predicted: {bound}{kept / GIB:.3f} GiB "
        f"({tokens_of(config, layout):,} tokens, {config.model.num_layers} layers, activation "
        f"checkpointing {checkpointing_of(config)}); the experts of one layer "
        f"{ours.bytes / MIB:.1f} MiB, where stock TorchTitan would keep {stock.bytes / MIB:.1f} MiB"
    )


def measure_first_block(
    config: SonicTrainer.Config, model_parts: Sequence[nn.Module], *, num_gpus: int
) -> None:
    """Have the first MoE block's first forward pass log what it keeps beside the prediction.

    A checkpointed or compiled block keeps something else, and of a tensor-parallel one the model
    knows only that it keeps no more: there nothing is measured.
    """
    if config.activation_checkpoint is not None or config.compile.enable:
        return
    if config.parallelism.tensor_parallel_degree > 1:
        return
    first_block = next(model_parts[0].get_submodule("layers").children())
    predicted = total(moe_terms(_shape_here(config, layout_of(config, num_gpus=num_gpus))))

    def tell(measured: int) -> None:
        off = measured / predicted - 1
        logger.info(
            f"The first MoE block keeps {measured:,} bytes for its backward, predicted "
            f"{predicted:,} ({off:+.3%})"
        )

    on_first_forward(first_block.get_submodule("moe"), tell)


def _shape_here(config: SonicTrainer.Config, layout: Layout) -> LayerShape:
    return shape_of(config, layout, load="expected", on_gpu=torch.cuda.is_available())
