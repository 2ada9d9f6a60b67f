"""Commands that work on folders, without a pipeline: drivers, packages, the viewer, the doctor and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one value; repeat for more.")
]
Preset = Annotated[str, typer.Option(help="laptop, one-gpu, full, cluster, another task's preset, or a YAML file.")]
Bundle = Annotated[Path, typer.Option(help="Folder of a package.")]


def scene(
    photos: Annotated[Path, typer.Option(help="Folder of photos, or a video file.")],
    out: Annotated[Path, typer.Option(help="Folder for scene.ply, transforms.json and quality.json.")],
    marker_size: Annotated[float | None, typer.Option(help="Edge of the ArUco tags on the bench, in metres.")] = None,
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Reconstruct a bench from photos: cameras, 3D Gaussians, and how good they are on photos held out.

    Without tags the scale stays unknown; quality.json says so. Interrupted, the same command goes on.

      real2sim2real scene --photos my_photos --out my_scene --marker-size 0.06
    """
    from flows.console import ConsoleReporter, progress_shown
    from gsrl_core.config import load, parse_assignments
    from gsrl_core.folders import locate_capture

    overrides = parse_assignments(assignments or [])
    if marker_size is not None:
        overrides["capture.marker_size"] = marker_size
    config = load(preset, overrides)
    source = locate_capture(str(photos))
    with progress_shown():
        from gsrl_core.artifacts import full_disk_is_an_error
        from gsrl_core.reconstruct import reconstruct

        with full_disk_is_an_error(out):
            quality = reconstruct(source, out, config.capture, config.fit, config.quality, ConsoleReporter("scene"))
    for gate in quality["gates"]:
        state = "ok" if gate["passed"] else f"NOT MET: {gate['advice']}"
        typer.echo(f"{gate['name']:>20}  {gate['value']} (threshold {gate['threshold']})  {state}")
    typer.echo(str(out / "scene.ply"))


def assemble(
    bench: Annotated[Path, typer.Option(help="Folder that `scene` wrote, in the robot's frame, or a splat file.")],
    out: Annotated[Path, typer.Option(help="Scene folder to write.")],
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Put the robot and the objects of a task (sim.task) on a reconstructed bench, for `demos`, `view` and others.

    real2sim2real assemble --bench my_bench --out my_scene --preset stack-cube
    """
    from gsrl_core.config import load, parse_assignments

    sim = load(preset, parse_assignments(assignments or [])).sim
    from gsrl_core.assemble import assemble_scene
    from gsrl_core.sim.tasks import configured_task

    task = configured_task(sim)
    scene = assemble_scene(bench / "scene.ply" if bench.is_dir() else bench, out, task=task)
    typer.echo(f"{out}: {task.name}, {len(scene.body)} Gaussians, bodies {', '.join(scene.names)}")


def demos(
    scene: Annotated[Path, typer.Option(help="Scene folder (that `assemble` wrote, or a pipeline).")],
    out: Annotated[Path, typer.Option(help="Folder for the demonstrations.")],
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Record demonstrations of the scripted expert; failures are dropped, an interrupted call goes on.

    real2sim2real demos --scene my_scene --out my_demos --set demos.episodes=200
    """
    from flows.console import ConsoleReporter, progress_shown
    from gsrl_core.config import load, parse_assignments

    config = load(preset, parse_assignments(assignments or []))
    with progress_shown():
        from gsrl_core.demos import collect_demos

        facts = collect_demos(scene, out, config, ConsoleReporter("demos"))
    typer.echo(json.dumps(facts))


def sft(
    demos: Annotated[Path, typer.Option(help="Folder that `demos` or `dataset import` wrote.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from; none: random weights.")] = None,
    model: Annotated[
        Literal["pi05_tiny", "pi05_small"] | None,
        typer.Option(help="Size of a policy of random weights (without --init): 2 M (the default) or 30 M parameters."),
    ] = None,
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Train a policy on demonstrations by flow matching; an interrupted call goes on.

    real2sim2real sft --demos my_demos --out my_sft --model pi05_small --set sft.steps=5000
    """
    from flows.console import ConsoleReporter, progress_shown
    from gsrl_core.config import load, parse_assignments
    from gsrl_core.errors import ConfigError

    if init and model:
        raise ConfigError(f"--model {model} is for random weights, and --init {init} brings its own size; give one")
    start = f"--init {init.name}" if init else f"--model {model or 'pi05_tiny'}"
    config = load(preset, parse_assignments(assignments or []))
    with progress_shown():
        import torch

        from gsrl_core.sft import train_sft

        facts = train_sft(
            demos, out, init, model or "pi05_tiny", config.sft,
            device="cuda" if torch.cuda.is_available() else "cpu",
            reporter=ConsoleReporter("sft"),
            command=f"real2sim2real sft --preset {preset} --demos {demos.name} --out {out.name} {start}",
            discrete_state=config.policy.discrete_state,
            asset_id=config.policy.asset_id,
        )  # fmt: skip
    typer.echo(json.dumps(facts))


def norm_stats(
    demos: Annotated[Path, typer.Option(help="Folder of demonstrations, or of a LeRobot v3 dataset.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
) -> None:
    """Compute mean, deviation, 1 % and 99 % quantiles of states and actions: openpi's norm_stats.json.

    `sft` computes the same for a random start; with --init it uses those in the
    checkpoint, where they are assets/ID/norm_stats.json, unless sft.stats is demos.

      real2sim2real norm-stats --demos my_demos --out norm_stats.json
    """
    from gsrl_core.artifacts import full_disk_is_an_error
    from gsrl_core.norm_stats import write_norm_stats

    with full_disk_is_an_error(out):
        fields = write_norm_stats(demos, out)
    typer.echo(" " * 12 + "".join(f"{title:>10}" for title in ("mean", "std", "q01", "q99")))
    for field, stats in fields.items():
        for index, row in enumerate(zip(stats.mean, stats.std, stats.q01, stats.q99, strict=True)):
            typer.echo(f"{f'{field}[{index}]':>12}" + "".join(f"{value.item():>10.4f}" for value in row))
    typer.echo(str(out))


def verify(
    bundle: Bundle,
    robot: Annotated[bool, typer.Option(help="Drive an episode through franky against the FR3 emulator.")] = True,
) -> None:
    """Check a package in fresh processes: digests, parity vectors, the policy server, the robot's interface.

    real2sim2real verify --bundle fr3_package
    """
    from flows.console import ConsoleReporter, progress_shown

    with progress_shown():
        from gsrl_core.package import verify_package

        findings = verify_package(bundle, robot, ConsoleReporter("verify"))
    typer.echo(json.dumps(findings, indent=2))


def serve(
    bundle: Bundle,
    host: Annotated[str, typer.Option(help="Address; all but loopback need $GSRL_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 8000,
) -> None:
    """Serve a package's policy over openpi's websocket protocol, until Ctrl-C.

    real2sim2real serve --bundle fr3_package --port 8000
    """
    from gsrl_core.package_run import serve_package

    serve_package(bundle, host, port, ready=lambda address: typer.echo(f"serving {bundle} on {address}; Ctrl-C stops"))


def deploy(
    bundle: Bundle,
    robot: Annotated[str, typer.Option(help="Address of the FR3's control interface.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Camera calibration of this bench (form: calib/camera.json); a dry run can do without."),
    ] = None,
    camera: Annotated[
        str, typer.Option(help="Video device: an index or a path; 'scene': render the package's scene (dry run).")
    ] = "0",
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A running `serve` of this package; none: start one here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Compute and log everything, move nothing.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Control steps; default: the package's.")] = None,
    realtime: Annotated[bool, typer.Option(help="Demand a real-time kernel.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the arm moves.")] = False,
    log: Annotated[Path | None, typer.Option(help="Write the episode here as JSON.")] = None,
) -> None:
    """Drive one episode on an FR3, inside the package's safety envelope. Keep the emergency stop in your hand.

    Dead-man switch: the space bar (or Enter), held down in this terminal while
    the arm moves; releasing it stops the arm. A dry run and an emulator need none.

    real2sim2real deploy --bundle fr3_package --robot 172.16.0.2 --dry-run

    real2sim2real deploy --bundle fr3_package --robot 172.16.0.2 --calibration camera.json
    """
    from contextlib import nullcontext

    from gsrl_core.deploy.deadman import HeldKey
    from gsrl_core.deploy.server import is_loopback, parse_address
    from gsrl_core.package_run import deploy_package

    address = None if server is None else parse_address(server)
    if not dry_run and not yes:
        typer.confirm(f"The arm at {robot} will move. Workspace clear, emergency stop at hand?", abort=True)
    with nullcontext() if dry_run or is_loopback(robot) else HeldKey() as held:

        def before_motion() -> None:
            if held is not None:
                typer.echo("Hold the space bar down: the arm moves while it is held, and stops when it is released.")
                held.wait(60.0)

        summary = deploy_package(
            bundle, robot, camera=int(camera) if camera.isdigit() else camera, calibration=calibration, server=address,
            dry_run=dry_run, max_steps=max_steps, realtime=realtime, permit=held, before_motion=before_motion,
            log_path=log,
        )  # fmt: skip
    typer.echo(json.dumps(summary, indent=2))


def view(
    scene: Annotated[Path, typer.Argument(help="Scene folder, or one splat file (.ply).")],
    live: Annotated[bool, typer.Option("--live", help="Play the environment in it (see --preset, sim.task).")] = False,
    port: Annotated[int, typer.Option(help="Loopback port.")] = 8080,
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Show a scene in the browser, or the environment at work in it, until Ctrl-C.

    Bodies can be hidden and highlighted, and the environment's cameras looked through.

      real2sim2real view my_scene

      real2sim2real view my_scene --live --preset stack-cube
    """
    from flows.viewer import show
    from gsrl_core.config import load, parse_assignments

    show(scene, port, typer.echo, load(preset, parse_assignments(assignments or [])) if live else None)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """What this machine has, what it lacks, what each missing thing disables, and the line that installs it.

    real2sim2real doctor

    real2sim2real doctor --json
    """
    from gsrl_core.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
        return
    for finding in findings:
        typer.echo(f"{'ok' if finding.ok else '--'}  {finding.name:<14} {finding.found}")
        if not finding.ok:
            typer.echo(f"{'':>19}without it: {finding.disables}\n{'':>19}do: {finding.remedy}")


def bench(
    what: Annotated[
        Literal["raster", "render", "physics", "policy", "iteration"], typer.Argument(help="What to measure.")
    ],
    preset: Preset = "laptop",
    assignments: Assignments = None,
) -> None:
    """Measure a part of the pipeline on this machine; one JSON object a line.

    real2sim2real bench render

    real2sim2real bench physics --set sim.num_envs=16
    """
    from gsrl_core.bench import measure
    from gsrl_core.config import load, parse_assignments

    for result in measure(what, load(preset, parse_assignments(assignments or []))):
        typer.echo(json.dumps(result))


COMMANDS = (scene, assemble, demos, sft, norm_stats, verify, serve, deploy, view, doctor, bench)
