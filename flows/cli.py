"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flows import checkpoints, commands, datasets
from gsrl_core.errors import ArtifactError, ConfigError, GateError, GsrlError

if TYPE_CHECKING:
    from flows.real2sim2real import PipelineReport
    from flows.session import StageResult
    from gsrl_core.artifacts import Artifact
    from gsrl_core.sections import PipelineConfig

app = typer.Typer(
    name="real2sim2real",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Photos of a bench -> 3D Gaussian scene -> simulated FR3 -> PPO on pi0.5 -> a verified robot package.

    [b]Start here[/b]

      real2sim2real doctor     what this machine has and lacks
      real2sim2real run        the whole chain at laptop size: minutes on 2 cores
      real2sim2real up         Prefect and MLflow in the browser, with a worker

    [b]Then[/b]

      real2sim2real run --preset one-gpu --set ppo.iterations=50
      real2sim2real scene --photos my_photos --out my_scene
      real2sim2real view my_scene

    Everything is kept under $GSRL_HOME (default ~/.gsrl) and not made twice.

    Exit code 0: success. 1: one clear line on standard error (--debug: more).
    """,
)

Preset = Annotated[str, typer.Option(help="laptop, one-gpu, full, cluster, another task's preset, or a YAML file.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one value; repeat for more.")
]
Output = Annotated[Path | None, typer.Option("--out", help="Also copy the result to this folder (new or empty).")]
SceneFolder = Annotated[
    Path | None, typer.Option("--scene", help="Scene folder; default: the preset's, made if needed.")
]
CheckpointFolder = Annotated[
    Path | None, typer.Option("--checkpoint", help="Checkpoint folder; default: the pipeline's own.")
]

_INTERRUPTED = 130
_NO_SPACE = 8 * 2**20


@app.command()
def run(preset: Preset = "laptop", assignments: Assignments = None) -> None:
    """Run the whole pipeline, from photos to a verified package; finished stages come from the store.

    Exit code 0: a package was released. 1: an error, or a gate found that nothing
    should be released (the reason says what to do; finished stages stay cached).

      real2sim2real run

      real2sim2real run --set assets.capture=my_photos --set ppo.iterations=20
    """
    config = _pipeline_config(preset, assignments)
    from flows.console import progress_shown
    from flows.environment import prefect_api

    with progress_shown(), prefect_api(verbose=_verbose()):
        from flows.real2sim2real import real2sim2real
        from flows.stages import run_flow

        report = run_flow(real2sim2real, config)
    _print_report(report)
    if report.status != "released":
        raise GateError(f"not released: {report.reason}")


@app.command()
def finetune(
    preset: Preset = "laptop",
    assignments: Assignments = None,
    scene: SceneFolder = None,
    checkpoint: CheckpointFolder = None,
    out: Output = None,
) -> None:
    """Fine-tune a policy by PPO in a splat-rendered scene.

    real2sim2real finetune --set ppo.iterations=20 --out tuned

    real2sim2real finetune --preset one-gpu --checkpoint my_sft --scene my_scene
    """
    inputs = {"scene_artifact": ("scene", scene), "checkpoint": ("checkpoint", checkpoint)}
    _run_stage("finetune", "checkpoint", preset, assignments, inputs, out)


@app.command()
def evaluate(
    preset: Preset = "laptop",
    assignments: Assignments = None,
    scene: SceneFolder = None,
    checkpoint: CheckpointFolder = None,
    out: Output = None,
) -> None:
    """Measure success rates over fixed seeds and perturbations, with intervals, videos and a table.

    real2sim2real evaluate --checkpoint tuned --set evaluation.episodes=256 --out sweep
    """
    inputs = {"scene_artifact": ("scene", scene), "checkpoint": ("checkpoint", checkpoint)}
    _run_stage("sweep", "evaluation", preset, assignments, inputs, out)


@app.command()
def package(
    out: Annotated[Path, typer.Option(help="Folder for the package (new or empty).")],
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Build, verify and register the robot package of a pipeline, and copy it to a folder.

    real2sim2real package --out fr3_package
    """
    _run_stage("release", "package", preset, assignments, {}, out)


@app.command()
def up(
    prefect_port: Annotated[int, typer.Option(help="Loopback port of the Prefect server and UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Loopback port of the MLflow UI.")] = 5000,
) -> None:
    """Start the Prefect server, a worker, all deployments and the MLflow UI on loopback, until Ctrl-C.

    real2sim2real up

    export PREFECT_API_URL=http://127.0.0.1:4200/api

    prefect deployment run real2sim2real/laptop -p 'overrides={"ppo.iterations": 4}'
    """
    from flows.environment import prepare
    from flows.up import serve_all

    prepare(verbose=_verbose())
    serve_all(prefect_port, mlflow_port, typer.echo)


for command in commands.COMMANDS:
    app.command()(command)
app.add_typer(datasets.app, name="dataset")
app.add_typer(checkpoints.app, name="checkpoint")


def main() -> None:
    """Entry point: 0 on success, 1 with one clear line on standard error, 130 when interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
    except typer.Abort:
        _fail("aborted")
    except Exception as error:
        if debug:
            raise
        _fail(_one_line(error))
    if code == _INTERRUPTED:
        print(f"real2sim2real: {_farewell(arguments)}", file=sys.stderr)  # noqa: T201
    sys.exit(code if isinstance(code, int) else 0)


def _run_stage(
    name: str,
    result: str,
    preset: str,
    assignments: list[str] | None,
    folders: dict[str, tuple[str, Path | None]],
    out: Path | None,
) -> None:
    """Run one stage flow, print where its result is, and copy it to ``out``."""
    config = _pipeline_config(preset, assignments)
    if out is not None:
        _require_new(out)
    from flows.console import progress_shown
    from flows.environment import prefect_api

    with progress_shown(), prefect_api(verbose=_verbose()):
        from flows import stages

        inputs = {parameter: _imported(kind, folder) for parameter, (kind, folder) in folders.items() if folder}
        made: StageResult = stages.run_flow(getattr(stages, name), config, **inputs)
    if made.blocked:
        raise GateError(made.blocked)
    artifact = made.artifacts[result]
    for key, value in artifact.facts.items():
        typer.echo(f"{key:>20}  {value:.4g}" if isinstance(value, float) else f"{key:>20}  {value}")
    if out is not None:
        shutil.copytree(artifact.path, out, dirs_exist_ok=True)
    typer.echo(str(out or artifact.path))


def _imported(kind: str, folder: Path) -> Artifact:
    """Bring a user's folder into the store, so that what is used is what its digest says."""
    from gsrl_core.artifacts import Store
    from gsrl_core.folders import import_folder

    return import_folder(folder, kind, Store())


def _pipeline_config(preset: str, assignments: list[str] | None) -> PipelineConfig:
    """The configuration of a flow; keys that no stage reads are refused, as the deployments' forms do."""
    from gsrl_core.config import FOLDER_COMMANDS, load, parse_assignments

    overrides = parse_assignments(assignments or [])
    if unread := [key for key in overrides if key.split(".")[0] in FOLDER_COMMANDS]:
        raise ConfigError(
            f"{', '.join(unread)}: no stage of the pipeline reads it; give it to the command "
            f"`real2sim2real {unread[0].split('.')[0]}`"
        )
    return load(preset, overrides)


def _verbose() -> bool:
    return "--debug" in sys.argv


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; choose another or remove it")


def _print_report(report: PipelineReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("stage", "seconds", "", "artefact", box=None)
    for stage in report.stages:
        table.add_row(stage.name, f"{stage.seconds:.1f}", "cached" if stage.cached else "", stage.artifact.sha256[:12])
    console.print(table)
    for name, success in (("before", report.success_before), ("after", report.success_after)):
        if success:
            interval = f"[{success.low:.1%}, {success.high:.1%}]"
            console.print(f"success {name:6} {success.rate:6.1%} {interval} over {success.episodes}", markup=False)
    if report.psnr is not None:
        console.print(f"held-out PSNR  {report.psnr:.2f} dB")
    if report.package:
        console.print(f"package        {report.package}", soft_wrap=True)
        console.print(f"registered     {report.model_version}")
    console.print(f"MLflow run     {report.mlflow_run_id}")
    console.print(f"report         {report.file}", soft_wrap=True)


def _one_line(error: Exception) -> str:
    """What a person needs to read of an error, without a traceback."""
    if isinstance(error, GsrlError):
        return str(error)
    if callable(usage := getattr(error, "format_message", None)):
        return f"{usage().rstrip('.')}; see --help"
    from gsrl_core.artifacts import gsrl_home

    if gsrl_home().exists() and shutil.disk_usage(gsrl_home()).free < _NO_SPACE:
        # Prefect's and MLflow's databases fail in many ways when nothing can be written.
        return str(ArtifactError(f"the disk of {gsrl_home()} is full; free some space or set GSRL_HOME, and run again"))
    if isinstance(error, ImportError) and "shared object" in str(error):
        from gsrl_core.doctor import missing_libraries

        packages = " ".join(missing_libraries())
        return f"{error}: a shared library is missing; sudo apt install {packages}" if packages else str(error)
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}; run with --debug for the traceback"


def _farewell(arguments: list[str]) -> str:
    """What an interruption means: some commands run until they are stopped, the others go on where they were."""
    endless = {"up", "serve", "view", "deploy"}
    return "stopped" if endless.intersection(arguments[:1]) else "interrupted; the same command goes on from here"


def _fail(message: str) -> NoReturn:
    print(f"real2sim2real: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(1)
