"""What a training run holds in memory, as tables that add up: one of a device, one of the RAM beside it."""

from dataclasses import dataclass

from cluster.activations import HEAD_ROWS, Pass, activation_bytes
from cluster.memory import (
    PROCESS_BYTES,
    TRAINING_LOGIT_COPIES,
    VALUE_BYTES,
    MemoryItem,
    MemoryTable,
    dequantized_linear_bytes,
    logits_bytes,
    num_lora_parameters,
    weights_bytes,
)
from cluster.training_load import TrainingLoad

GATHERED_LAYERS = 2
"""ZeRO-3 holds the layer at work whole, and fetches the next one meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedState:
    """Bytes of what changes in training, over all workers together and unsharded."""

    num_parameters: int
    values: int
    """Adapter values; 0 for full fine-tuning, whose values are the weights."""
    gradients: int
    optimizer: int


def trained_state(load: TrainingLoad) -> TrainedState:
    """Return adapter, gradient and optimizer bytes.

    LoRA: fp32 value, gradient and two Adam moments, 16 bytes each. Full: 16 bytes each with the weights; under 16 bit
    the gradient is 16 bit too and Adam keeps an fp32 copy of the weight beside its moments (arXiv:1910.02054, 3.1).
    """
    if load.lora is not None:
        count = num_lora_parameters(load.card, r=load.lora.r, target_modules=load.lora.target_modules)
        return TrainedState(num_parameters=count, values=4 * count, gradients=4 * count, optimizer=8 * count)
    count = load.card.num_parameters()
    value_bytes = VALUE_BYTES[load.compute_dtype]
    optimizer = 8 if value_bytes == 4 else 12
    return TrainedState(num_parameters=count, values=0, gradients=value_bytes * count, optimizer=optimizer * count)


def device_table(load: TrainingLoad, *, device: str, available_bytes: int, num_shared: int = 1) -> MemoryTable:
    """Return the memory of one device that `num_shared` workers share: 1 on a GPU, all of them in the RAM of a CPU."""
    card, layout, workers = load.card, load.layout, load.num_workers
    state = trained_state(load)
    weights = 0 if layout.offload_param else _share(weights_bytes(card, load.precision, load.compute_dtype), load, 3)
    if layout.strategy == "fsdp" and num_shared > 1:  # in the RAM, where each worker loads them whole at first
        weights = weights_bytes(card, load.precision, load.compute_dtype)
    gradients = 0 if layout.offload_gradients else _share(state.gradients, load, 2)
    optimizer = 0 if layout.offload_optimizer else _share(state.optimizer, load, 1)
    unpacked = dequantized_linear_bytes(card, load.precision, load.compute_dtype)
    split = f" / {workers} workers" if workers > 1 else ""
    adapter = f"rank {load.lora.r} on {len(load.lora.target_modules)} linears" if load.lora else ""
    kept = "layer inputs and one layer" if load.gradient_checkpointing else "all layers"
    items = (
        ("weights", weights, load.precision + (split if layout.is_sharding_weights else "")),
        ("adapters", state.values, f"{adapter}, {state.num_parameters / 1e6:.1f} M values, fp32"),
        ("gradients", gradients, "of what is trained" + (split if gradients < state.gradients else "")),
        ("optimizer", optimizer, "Adam" + (split if optimizer < state.optimizer else "")),
        ("gradient buckets", _bucket_bytes(load, state), "what DDP sends around"),
        ("activations", activation_bytes(_pass_of(load)), f"{_tokens(load)}, {kept}"),
        ("logits", *_logits(load)),
        ("unpacked linear", unpacked, f"the largest one, {load.compute_dtype}"),
        ("gathered layers", _gathered(load), _gathered_formula(load)),
        ("process", PROCESS_BYTES, "libraries, context, workspaces"),
    )
    times = f", x {num_shared} workers" if num_shared > 1 else ""
    return MemoryTable(
        device=device,
        available_bytes=available_bytes,
        items=tuple(
            MemoryItem(name=name, num_bytes=num_bytes * num_shared, formula=formula + times)
            for name, num_bytes, formula in items
            if num_bytes or name == "weights"
        ),
    )


def host_table(load: TrainingLoad, *, available_bytes: int) -> MemoryTable | None:
    """Return what is offloaded to the RAM of the node, over all of its workers; None where nothing is.

    The optimizer in the RAM works in fp32 (DeepSpeed's CPU Adam).
    """
    layout = load.layout
    if layout.strategy == "fsdp":
        return _loading_table(load, available_bytes=available_bytes)
    if not layout.has_offload:
        return None
    state = trained_state(load)
    parts = (
        ("optimizer", state.optimizer if layout.offload_optimizer else 0, "Adam"),
        ("gradients", state.gradients if layout.offload_gradients else 0, "of what is trained"),
        (
            "weights",
            weights_bytes(load.card, load.precision, load.compute_dtype) if layout.offload_param else 0,
            load.precision,
        ),
        ("process", PROCESS_BYTES * load.num_workers, f"{load.num_workers} x libraries and workspaces"),
    )
    items = tuple(MemoryItem(name=n, num_bytes=b, formula=f) for n, b, f in parts if b)
    return MemoryTable(device="RAM", available_bytes=available_bytes, items=items)


def _loading_table(load: TrainingLoad, *, available_bytes: int) -> MemoryTable:
    """Return what FSDP's workers hold in the RAM before they move their parts to the GPUs: the base, each of them."""
    workers = load.num_workers
    weights = weights_bytes(load.card, load.precision, load.compute_dtype)
    items = (
        MemoryItem(name="weights", num_bytes=weights * workers, formula=f"while loading, {workers} x the whole base"),
        MemoryItem(name="process", num_bytes=PROCESS_BYTES * workers, formula=f"{workers} x libraries and workspaces"),
    )
    return MemoryTable(device="RAM", available_bytes=available_bytes, items=items)


def _pass_of(load: TrainingLoad) -> Pass:
    return Pass(
        card=load.card,
        precision=load.precision,
        compute_dtype=load.compute_dtype,
        lora=load.lora,
        num_tokens=load.pass_tokens,
        has_deepspeed=load.layout.strategy == "deepspeed",
        gradient_checkpointing=load.gradient_checkpointing,
    )


def _tokens(load: TrainingLoad) -> str:
    whole = f"{load.micro_batch_size} x {load.max_length:,} tokens"
    is_cut = load.pass_tokens < load.micro_batch_size * load.max_length
    return f"{load.pass_tokens:,} at once of {whole}" if is_cut else whole


def _logits(load: TrainingLoad) -> tuple[int, str]:
    """Return the bytes of what the head makes at its most, and how they are counted.

    A frozen head that forgets its logits: `HEAD_ROWS` of them, in 16 bit beside float32 where the model has 16. Else
    three copies of all. In full fine-tuning the gradient of the head waits, where it is the embeddings' too, for theirs
    until all layers are done; neither finds room where logits were, which are of another size.
    """
    card, value_bytes = load.card, VALUE_BYTES[load.compute_dtype]
    if load.has_head_loss:
        rows = min(HEAD_ROWS, load.pass_tokens)
        return rows * card.vocab_size * (4 if value_bytes == 4 else 6), f"{rows} rows at a time"
    copies = logits_bytes(card, num_tokens=load.pass_tokens, copies=TRAINING_LOGIT_COPIES)
    if load.lora is not None:
        return copies, "fp32, 3 copies"
    return copies + 2 * card.vocab_size * card.hidden_size * value_bytes, "fp32, 3 copies; 2 gradients of the head"


def _bucket_bytes(load: TrainingLoad, state: TrainedState) -> int:
    """Return DDP's own copy of the gradients, in buckets (`torch.nn.parallel.DistributedDataParallel`)."""
    return state.gradients if load.layout.strategy == "ddp" and load.num_workers > 1 else 0


def _gathered(load: TrainingLoad) -> int:
    """Return what a worker holds whole of sharded weights: some layers; FSDP also embeddings and head."""
    card = load.card
    if not load.layout.is_sharding_weights:
        return 0
    values = GATHERED_LAYERS * (card.num_linear_parameters() // card.num_hidden_layers)
    if load.layout.strategy == "fsdp":
        values += card.num_parameters() - card.num_linear_parameters()
    return values * VALUE_BYTES[load.compute_dtype]


def _gathered_formula(load: TrainingLoad) -> str:
    name = "FSDP, embeddings, head and" if load.layout.strategy == "fsdp" else "ZeRO-3,"
    return f"{name} {GATHERED_LAYERS} at a time"


def _share(num_bytes: int, load: TrainingLoad, from_stage: int) -> int:
    """Return a worker's part: all of it below `from_stage`, its shard from there on.

    FSDP shards what ZeRO-3 does, but for adapters and their state.
    """
    is_shared = load.layout.zero_stage >= from_stage
    if load.layout.strategy == "fsdp":
        is_shared = from_stage == 3 or load.lora is None
    return -(-num_bytes // load.num_workers) if is_shared else num_bytes
