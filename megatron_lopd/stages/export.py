"""6. export: the trained student as a Hugging Face checkpoint that carries its lineage."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import ModelLineage, artifact_parent
from megatron_lopd.config import deciding
from megatron_lopd.files.writing import remove
from megatron_lopd.pipeline.proofs import prove_reference, status_of
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage

EXACT, QUANTIZED = "model", "model-fp8"


class ExportStage(Stage):
    """The trained student, and where the recipe wants it one in FP8 beside it."""

    name, kind = "export", "model"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.train is not None

    def on_gpu(self, run: ResolvedRun) -> bool:
        return run.recipe.export.quantization == "fp8"

    def check(self, run: ResolvedRun) -> list[str]:
        directory, export = run.directory_of(self.name), run.recipe.export
        lines = [f"write the trained student to {directory / EXACT}"]
        if export.quantization == "fp8":
            from megatron_lopd.convert.quantize import require_modelopt

            require_modelopt()
            samples = export.calibration_samples
            lines.append(f"and in FP8, calibrated on {samples} rollouts, to {directory / QUANTIZED}")
        return lines

    def plan(self, run: ResolvedRun) -> Plan:
        train, student = run.manifest("train"), run.reference.parent
        sft, found = prove_reference(run, student)  # whose config.json and tokenizer are copied
        parents = {
            "sft": artifact_parent("sft", sft),
            "student": student,
            "train": artifact_parent("train", train),
        }
        if run.recipe.export.quantization == "fp8":  # calibration reads them again
            parents["rollout"] = artifact_parent("rollout", run.manifest("rollout"))
        lineage = status_of(found, sft.lineage, train.lineage)
        return Plan(deciding(run.recipe.export), parents, lineage)

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.pipeline.students import lineage_of, write_student

        train, directory = run.manifest("train"), run.directory_of(self.name)
        (checkpoint,) = {
            (run.directory_of("train") / name).parent for name in train.files if name.endswith(".metadata")
        }
        ancestors = {stage: run.manifest(stage) for stage in ("sft", "rollout", "score")} | {"train": train}
        lineage = lineage_of("train", plan.lineage, ancestors["score"].parents["teacher"], ancestors)
        export, reference = run.recipe.export, run.reference.directory
        exact = write_student(checkpoint, reference, directory / EXACT, export, lineage)
        files = [f"{EXACT}/{name}" for name in exact]
        if export.quantization == "fp8":
            files += [f"{QUANTIZED}/{name}" for name in _write_quantized(run, directory, lineage)]
        return Output(files, {"files": len(files)})


def _write_quantized(run: ResolvedRun, directory: Path, lineage: ModelLineage) -> list[str]:
    """The exact model in FP8 beside it, with the same lineage but its own fingerprint; returns its files."""
    from megatron_lopd.convert.quantize import quantize_fp8
    from megatron_lopd.pipeline.students import seal_model

    out_dir = directory / QUANTIZED
    remove(out_dir)  # a killed attempt's
    samples = run.recipe.export.calibration_samples
    quantize_fp8(directory / EXACT, out_dir, run.directory_of("rollout"), samples)
    return seal_model(out_dir, lineage)
