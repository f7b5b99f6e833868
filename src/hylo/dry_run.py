"""What a recipe would do, from the configurations alone: the plan, every stage's steps and schedule, and its memory."""

import math

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from hylo.convert.config import planned_config
from hylo.distill.settings import Stage
from hylo.distill.student import stored_dtype
from hylo.errors import HyloError
from hylo.estimate import Memory, batch, stage_flops, stage_memory
from hylo.recipe import Recipe

GIB = 1 << 30


def dry_run(recipe: Recipe, console: Console, devices: int = 1) -> list[tuple[Stage, Memory]]:
    """Prints it, for that many devices, and returns each stage's memory. Needs no weights: a model of the Hub is asked
    for its small files alone. Raises HyloError for what does not fit together."""
    recipe = recipe.with_models(weights=False)
    plan, energy = recipe.plan(), recipe.energy
    plan.print(console)
    if energy is not None:
        console.print(f"ranks: by {energy:.0%} of the energy, which needs the weights; shown is the geometry's own")
    student = planned_config(plan, "recipe")
    base, teacher = (
        AutoConfig.from_pretrained(path, local_files_only=True) for path in (recipe.base, recipe.extension_teacher)
    )
    teacher_dtype = stored_dtype(recipe.extension_teacher)
    found = []
    flops = 0.0
    for i, stage in enumerate(recipe.stages):
        if stage.rows % (_micro_rows(stage, devices) * devices):
            raise HyloError(
                f"stages.{i}.rows: {stage.rows} cannot be shared out to {devices} devices, "
                f"{_micro_rows(stage, devices)} at once; change rows or micro_rows"
            )
        by_layer = stage.kind == "layers"
        theirs = base if by_layer else teacher
        if stage.teacher_source != "none" and stage.length > theirs.max_position_embeddings:
            raise HyloError(
                f"stages.{i}.length: {stage.length} exceeds the {theirs.max_position_embeddings} tokens of "
                f"{recipe.base if by_layer else recipe.extension_teacher}; choose a shorter length or another teacher"
            )
        dtype = torch.float32 if by_layer else teacher_dtype
        memory = stage_memory(stage, student, theirs, dtype, devices, recipe.data.boundaries)
        flops += stage_flops(stage, student, theirs) * stage.steps * stage.rows * stage.length
        found.append((stage, memory))
    _print_stages(recipe, found, console, devices, base.max_position_embeddings)
    console.print(f"arithmetic of all stages: {flops:.3g} floating-point operations")
    return found


def _print_stages(
    recipe: Recipe, found: list[tuple[Stage, Memory]], console: Console, devices: int, base_length: int
) -> None:
    """One column a stage, so that it fits a terminal."""
    table = Table(title=f"stages on {_number(devices, 'device')}", title_justify="left")
    table.add_column("")
    for stage, _ in found:
        table.add_column(stage.directory, justify="right", overflow="fold")
    table.add_row("objective", *(stage.objective_text for stage, _ in found))
    table.add_row("teacher", *(stage.teacher_source for stage, _ in found))
    table.add_row("length", *(f"{stage.length:,}" for stage, _ in found))
    table.add_row("YaRN", *(_yarn(stage, recipe, base_length) for stage, _ in found))
    table.add_row("rows", *(_rows(stage, devices) for stage, _ in found))
    table.add_row("tokens", *(f"{stage.steps * stage.rows * stage.length:,}" for stage, _ in found))
    table.add_row("data", *(_part(stage, part) for (stage, _), part in zip(found, recipe.parts(), strict=True)))
    table.add_row("steps", *(f"{stage.steps:,}" for stage, _ in found))
    table.add_row("warm-up", *(_number(_warmup(stage), "step") for stage, _ in found))
    table.add_row("learning rate", *(f"{stage.learning_rate:g}" for stage, _ in found))
    table.add_row("then", *("constant" if s.schedule == "constant" else f"{s.schedule} to 0" for s, _ in found))
    table.add_section()
    table.add_row("[bold]GiB a device, estimated[/]")
    for part in found[0][1].parts:
        table.add_row(part, *(f"{memory.parts[part] / GIB:.2f}" for _, memory in found))
    table.add_row("together", *(f"{memory.total / GIB:.2f}" for _, memory in found))
    table.add_row("fullest at", *(memory.moment for _, memory in found))
    console.print(table)


def _micro_rows(stage: Stage, devices: int) -> int:
    return batch(stage, devices)[0] // (stage.length * (2 if stage.kind == "dpo" else 1))


def _yarn(stage: Stage, recipe: Recipe, base_length: int) -> str:
    """The factor that the stage leaves in the configuration; stage 1 and DPO know none."""
    if recipe.positions != "rope" or stage.kind in ("layers", "dpo") or stage.positions == "unscaled":
        return "-"
    return f"{max(1.0, stage.yarn_factor or stage.length / (recipe.yarn_original_length or base_length)):g}"


def _rows(stage: Stage, devices: int) -> str:
    at_once = _micro_rows(stage, devices)
    passes = stage.rows // (at_once * devices)
    split = f"{at_once} x {devices} x {passes}" if passes > 1 else f"{at_once} x {devices}"
    return f"{stage.rows}" if stage.rows == at_once else f"{stage.rows} = {split}"


def _part(stage: Stage, part: tuple[float, float]) -> str:
    return "preferences" if stage.kind == "dpo" else f"{part[0]:.0%} to {part[1]:.0%}"


def _warmup(stage: Stage) -> int:
    return min(math.ceil(stage.warmup * stage.steps), stage.steps - 1)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
