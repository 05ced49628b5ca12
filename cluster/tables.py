"""Tables for people: the catalog, one plan, the adapters. Readable at 100 columns."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.alias import Alias
from cluster.hardware import Hardware
from cluster.memory import GIB, DoesNotFit, MemoryTable, weights_bytes
from cluster.model_card import ModelCard, Precision
from cluster.plan import ServingPlan, TrainingPlan, plan_serving
from cluster.plan_precision import choose_compute_dtype, choose_precision
from cluster.plan_record import Log
from cluster.presets import DType
from cluster.registry import AdapterVersion, Registry
from cluster.traps import ImpossibleCombination

SPEC_LABELS: dict[Precision, str] = {"int8": "8bit", "nf4": "4bit", "gptq": "4bit"}
"""The specification's memory label that a precision is compared with; the unquantized ones with float16."""


def models_table(cards: Sequence[ModelCard], hardware: Hardware) -> Table:
    """Return the catalog: facts, what a plan for `hardware` would serve, and the specification's notes.

    `weights` is computed, in GiB; `spec` is the specification's own label, in GB, and decides nothing.
    """
    table = Table(title=f"Models on {hardware}", title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    table.add_column("model", ratio=1, overflow="fold")
    for header in ("size", "context"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("engine\nheld as", no_wrap=True)
    for header in ("weights\nGiB", "spec\nGB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("fits\nhere", no_wrap=True)
    for card in cards:
        table.add_row(*_model_row(card, hardware))
    return table


def _model_row(card: ModelCard, hardware: Hardware) -> tuple[RenderableType, ...]:
    engine, precision, dtype, here = _served(card, hardware)
    size = card.num_parameters() / 1e9
    return (
        _described(card),
        f"{size:.1f} B" if size >= 1 else f"{size * 1000:.0f} M",
        f"{card.max_position_embeddings:,}",
        f"{engine}\n{precision}",
        f"{weights_bytes(card, precision, dtype) / GIB:.1f}",
        _spec_label(card, precision),
        here,
    )


def _served(card: ModelCard, hardware: Hardware) -> tuple[str, Precision, DType, Text]:
    """Return engine, precision, dtype and whether it fits, as a plan without any wish would have it."""
    try:
        plan = plan_serving(card, hardware)
    except DoesNotFit:
        precision = choose_precision(card, hardware, Log(), wanted=None, fits_fp32=False)
        dtype = choose_compute_dtype(card, hardware, Log(), precision)
        return "-", precision, dtype, Text("no", style="red")
    except ImpossibleCombination:
        return "-", "fp32", "float32", Text("?", style="yellow")
    copies = f"yes, {plan.replicas_per_node}x" if plan.replicas_per_node > 1 else "yes"
    return plan.engine, plan.precision, plan.compute_dtype, Text(copies, style="green")


def _described(card: ModelCard) -> Text:
    text = Text(card.name, style="bold")
    gate = ", gated" if card.is_gated else ""
    text.append(
        f"\n  {card.licence}{gate} · {' '.join(card.languages) or 'languages not stated'}", style="not bold dim"
    )
    for note in card.notes_ja:
        text.append(f"\n  {note}", style="not bold dim")
    return text


def _spec_label(card: ModelCard, precision: Precision) -> str:
    figures = dict(card.spec_vram_gb)
    gb = figures.get(SPEC_LABELS.get(precision, "float16"), figures.get(""))
    return str(gb) if gb is not None else "-"


def plan_table(plan: ServingPlan | TrainingPlan) -> Group:
    """Return the plan's numbers, its memory as a table that adds up, its reasons and its warnings."""
    parts: list[RenderableType] = [_headline(plan), Text(), _memory_table(plan.memory)]
    host = plan.host_memory if isinstance(plan, TrainingPlan) else None
    if host is not None:
        parts += [Text(), _memory_table(host)]
    parts += [Text(), _decisions_table(plan)]
    if plan.warnings:
        parts.append(Text())
    parts += [Text(f"! {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts)


def _headline(plan: ServingPlan | TrainingPlan) -> Text:
    text = Text(plan.card.name, style="bold")
    if isinstance(plan, ServingPlan):
        does = f"is served at {plan.precision} by {plan.engine}: {plan.max_num_seqs} streams of {plan.max_model_len:,} "
        does += (
            f"tokens, {plan.max_loras} adapters, {plan.replicas_per_node} replica{_s(plan.replicas_per_node)} a node"
        )
    else:
        workers = f"{plan.num_workers} worker{_s(plan.num_workers)}"
        batch = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {workers}"
        does = f"is trained by {plan.method} at {plan.precision}: {plan.effective_batch_size} samples a step ({batch}) "
        does += f"of up to {plan.max_length:,} tokens"
    text.append(f" {does}\non {plan.hardware}", style="not bold")
    return text


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _memory_table(memory: MemoryTable) -> Table:
    table = Table(title=f"Memory of {memory.device}", title_justify="left", box=None, padding=(0, 2), pad_edge=False)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("what it is", style="dim")
    rounded = memory.rounded(100)
    for item, hundredths in zip(memory.items, rounded, strict=True):
        if item.num_bytes:
            table.add_row(item.name, f"{hundredths / 100:.2f}", item.formula)
    share = memory.total_bytes / memory.available_bytes
    table.add_section()
    table.add_row("sum", f"{sum(rounded) / 100:.2f}", f"{share:.0%} of what may be used", style="bold")
    table.add_row("available", f"{memory.available_bytes / GIB:.2f}", "")
    return table


def _decisions_table(plan: ServingPlan | TrainingPlan) -> Table:
    table = Table(title="Why", title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=20)
    table.add_column("by", no_wrap=True)
    table.add_column("reason", style="dim", overflow="fold")
    for decision in plan.decisions:
        table.add_row(decision.field, decision.value, decision.source, decision.reason)
    return table


def adapters_table(registry: Registry, versions: Sequence[AdapterVersion]) -> Table:
    """Return one row per adapter version; the one that its name means is marked."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("adapter", overflow="fold")
    for header in ("", "trained", "precision", "r", "held-out loss", "data"):
        table.add_column(header, no_wrap=True)
    for version in versions:
        manifest = version.manifest
        before, after = manifest.metrics.get("held_out_loss_before"), manifest.metrics.get("held_out_loss_after")
        table.add_row(
            version.served_name,
            _standing(registry.alias(version.model, version.name), version.version),
            manifest.created_at[:10],
            manifest.precision,
            str(manifest.adapter.get("r", "")),
            f"{before:.3f} → {after:.3f}" if before is not None and after is not None else "",
            manifest.data.file,
        )
    return table


def _standing(alias: Alias, version: int) -> Text:
    if alias.canary is not None and alias.canary.version == version:
        return Text(f"canary {alias.canary.percent:g}%", style="yellow")
    if alias.version != version:
        return Text("")
    return Text("current, pinned" if alias.is_pinned else "current", style="green")
