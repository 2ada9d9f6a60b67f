"""Fine-tuning driver: collect, update, record, and survive being killed."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsrl_core import states
from gsrl_core.artifacts import JsonScalar, digest_folder, write_bytes, write_json
from gsrl_core.config import section_digest
from gsrl_core.embodiment import Embodiment, SplatEmbodiment
from gsrl_core.errors import SimulationError, TrainingError
from gsrl_core.interfaces import Reporter
from gsrl_core.rl.rollout import EpisodeStats
from gsrl_core.sections import PipelineConfig, PpoConfig
from gsrl_core.team import Team, check_seeds, training_seeds

logger = logging.getLogger(__name__)

History = list[dict[str, float]]

# Settings that may change between a run and its resumption without making its past numbers wrong.
_FREE = {"iterations", "checkpoint_every", "eval_every", "prefix_cache", "gradient_checkpointing"}


def finetune(
    checkpoint: Path,
    scene: Path,
    out: Path,
    workspace: Path,
    config: PipelineConfig,
    reporter: Reporter,
    *,
    embodiment: Embodiment | None = None,
    deadline: float = math.inf,
) -> dict[str, JsonScalar]:
    """Improve a policy by PPO in the splat-rendered environment.

    Args:
        checkpoint: folder of the policy to start from.
        scene: folder of the assembled scene.
        out: gets the fine-tuned checkpoint (openpi layout, value head beside it), training.json, training.csv,
            learning_curve.png and TensorBoard events.
        workspace: keeps the state every ``ppo.checkpoint_every`` iterations; a later call with the same inputs goes on
            from there with the same numbers.
        config: sections sim, policy, ppo, cluster and tracking act; evaluation for its seeds, which are avoided.
        reporter: hears the metrics of every iteration.
        embodiment: something else than pi0.5 in the splat environment.
        deadline: value of ``time.monotonic()`` by which iterations are to end. The first is always made; after it, none
            is begun that would end later if it took as long as the last.

    Returns:
        A few facts: iterations, episodes, success rates under exploration at both ends, seconds.

    Raises:
        ConfigError: training and evaluation would share seeds.
        PlacementError, TrainingError, WorkerError, CheckpointError, SceneError, SimulationError.
    """
    check_seeds(config)
    out.mkdir(parents=True, exist_ok=True)
    workspace.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(checkpoint, scene, config)
    saved = load_progress(workspace / "checkpoint.pt", fingerprint, config.ppo.iterations)
    history: History = saved["history"] if saved else []
    team = Team(embodiment or SplatEmbodiment(checkpoint, scene, config), config)
    try:
        if saved:
            team.restore(saved["state"])
            logger.info("resuming after iteration %d", len(history))
            for step, metrics in enumerate(history, start=1):
                reporter.metrics(metrics, step)  # the run that this process reports to has not seen them
        with _event_writer(out / "tensorboard", config.tracking.tensorboard, history) as write_events:
            _train(team, config, history, workspace / "checkpoint.pt", fingerprint, reporter, write_events, deadline)
        team.save_policy(out)
    finally:
        team.close()
    _write_records(out, config, history)
    reporter.image("learning_curve", _picture(out / "learning_curve.png"), len(history))
    return _facts(history)


def load_progress(path: Path, fingerprint: str, iterations: int) -> dict[str, Any] | None:
    """What :func:`save_progress` wrote, or None if there is nothing that can be read.

    Raises:
        TrainingError: it belongs to other inputs, or is further than asked for.
    """
    saved = states.load_state(path, ("fingerprint", "history", "state"))
    if saved is None:
        return None
    done = len(saved["history"])
    if saved["fingerprint"] != fingerprint:
        raise TrainingError(
            f"{path} belongs to a run with another checkpoint, scene or settings; use another workspace, or delete it "
            "to start over"
        )
    if done > iterations:
        raise TrainingError(f"{path} is already at iteration {done}; ask for ppo.iterations >= {done}, or delete it")
    return saved


def save_progress(path: Path, fingerprint: str, history: History, state: Mapping[str, Any]) -> None:
    """Write the state of training whole or not at all."""
    states.save_state(path, {"fingerprint": fingerprint, "history": history, "state": dict(state)})


def _train(
    team: Team,
    config: PipelineConfig,
    history: History,
    path: Path,
    fingerprint: str,
    reporter: Reporter,
    write_events: Any,
    deadline: float,
) -> None:
    total = config.ppo.iterations
    for iteration in range(len(history), total):
        metrics = _iterate(team, config, iteration)
        history.append(metrics)
        reporter.metrics(metrics, iteration + 1)
        write_events(metrics, iteration + 1)
        success = metrics["env/success_once"]
        reporter.progress((iteration + 1) / total, f"iteration {iteration + 1}/{total}, success {success:.2f}")
        late = time.monotonic() + metrics["time/step"] > deadline
        if (iteration + 1) % config.ppo.checkpoint_every == 0 or iteration + 1 == total or late:
            save_progress(path, fingerprint, history, team.training_state())
        if late:
            break


def _iterate(team: Team, config: PipelineConfig, iteration: int) -> dict[str, float]:
    start = time.perf_counter()
    stats, rollout_seconds = team.collect(iteration)
    metrics = episode_metrics(stats, "env")
    metrics |= team.update()
    metrics["time/generate_rollouts"] = rollout_seconds
    metrics["time/env_steps_per_s"] = float(stats.length.sum()) / max(rollout_seconds, 1e-9)
    if config.ppo.eval_every and (iteration + 1) % config.ppo.eval_every == 0:
        metrics |= episode_metrics(team.validate(iteration), "eval")
    metrics["time/step"] = time.perf_counter() - start
    return metrics


def episode_metrics(stats: EpisodeStats, prefix: str) -> dict[str, float]:
    """The seed's episode metrics under ``prefix``, over the episodes whose simulation did not crash.

    Raises:
        SimulationError: there is none.
    """
    kept = ~stats.lost
    if not kept.any():
        raise SimulationError(
            f"the physics crashed in all {len(stats.seeds)} episodes; the log has the workers' last words"
        )
    return {
        f"{prefix}/success_once": float(stats.success[kept].float().mean()),
        f"{prefix}/success_seed": float(stats.success_seed[kept].float().mean()),
        f"{prefix}/episode_len": float(stats.length[kept].float().mean()),
        f"{prefix}/return": float(stats.episode_return[kept].mean()),
        f"{prefix}/num_trajectories": float(kept.sum()),
        f"{prefix}/lost": float(stats.lost.sum()),
    }


def _fingerprint(checkpoint: Path, scene: Path, config: PipelineConfig) -> str:
    # The length of a cosine is part of every learning rate on the way.
    free = _FREE - {"iterations"} if config.ppo.lr_schedule == "cosine" else _FREE
    ppo = PpoConfig(**config.ppo.model_dump(exclude=free))
    # Who collects how many episodes decides the order of the noise, so the cluster section counts too; how learners
    # divide the weights does not.
    cluster = config.cluster.model_copy(update={"data_parallel": "ddp"})
    settings = section_digest(config.sim, config.policy, ppo, cluster)
    return "\n".join([digest_folder(checkpoint), digest_folder(scene), settings])


@contextmanager
def _event_writer(folder: Path, enabled: bool, history: History) -> Iterator[Any]:
    """A function ``(metrics, step)`` that writes TensorBoard events; what was before a restart is written again."""
    if not enabled:
        yield lambda _metrics, _step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(metrics: Mapping[str, float], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        for step, metrics in enumerate(history, start=1):
            write(metrics, step)
        yield write


def _write_records(out: Path, config: PipelineConfig, history: History) -> None:
    first, last = training_seeds(config, 0), training_seeds(config, len(history) - 1)
    record = {
        "settings": {
            name: getattr(config, name).model_dump(mode="json") for name in ("sim", "policy", "ppo", "cluster")
        },
        "training_seeds": [first.start, last.stop - 1],
        "history": history,
    }
    write_json(out / "training.json", record)
    names = sorted({name for metrics in history for name in metrics})
    table = io.StringIO()
    rows = csv.DictWriter(table, ["iteration", *names])
    rows.writeheader()
    rows.writerows({"iteration": number, **metrics} for number, metrics in enumerate(history, start=1))
    write_bytes(out / "training.csv", table.getvalue().encode())
    _plot(out / "learning_curve.png", history)


def _plot(path: Path, history: History) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    curves = (
        ("env/success_once", "eval/success_once"),
        ("rollout/returns_mean", "critic/explained_variance"),
        ("actor/value_loss", "actor/grad_norm"),
        ("actor/approx_kl", "actor/pg_clipfrac"),
    )
    for axis, names in zip(axes, curves, strict=True):
        for name in names:
            points = [(step, metrics[name]) for step, metrics in enumerate(history, start=1) if name in metrics]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_xlabel("iteration")
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    figure.savefig(path, dpi=100)


def _picture(path: Path) -> Tensor:
    import imageio.v3 as iio

    return torch.from_numpy(iio.imread(path)[..., :3].copy())


def _facts(history: History) -> dict[str, JsonScalar]:
    return {
        "iterations": len(history),
        "episodes": int(sum(metrics["env/num_trajectories"] for metrics in history)),
        "success_once_first": history[0]["env/success_once"],
        "success_once_last": history[-1]["env/success_once"],
        "seconds": round(sum(metrics["time/step"] for metrics in history), 1),
    }
