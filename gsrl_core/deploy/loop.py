"""One episode on an arm: observe, infer, envelope, stream; the arm holds while the policy thinks."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gsrl_core.deploy.camera import Picture, RobotCamera
from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.envelope import Decision, Envelope, check_chunk
from gsrl_core.deploy.kinematics import pose_error
from gsrl_core.deploy.limits import Array
from gsrl_core.deploy.preflight import check_camera, check_tcp
from gsrl_core.deploy.robot import Robot, RobotState, wait_at_rest
from gsrl_core.deploy.smooth import Setpoint
from gsrl_core.errors import SafetyError

_FROZEN_PICTURES = 3
_FROZEN_TRAVEL = 0.01
_SETTLE = 0.3


class ChunkSource(Protocol):
    """What the loop needs of a policy client."""

    def infer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, with ``actions`` [H, 7]."""
        ...


@dataclass
class EpisodeLog:
    """What happened, filled while it happens (so a stopped episode is logged too)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Per control step: time, action, target, measured TCP, width, events."""
    infer_ms: list[float] = field(default_factory=list)
    """Picture to chunk, per chunk [ms]."""
    tracking_mm: list[float] = field(default_factory=list)
    """Distance of streamed and measured TCP, per streamed setpoint [mm]."""
    late_ms: list[float] = field(default_factory=list)
    """How late each setpoint was sent [ms]."""
    stale_chunks: int = 0
    outcome: str = "not started"
    """``completed``, or why it was stopped."""
    start: list[list[float]] | None = None
    """Measured pose at the start."""
    final: dict[str, Any] | None = None
    """Target and measured pose after the last step, when the target stood; none in a dry run or a stopped episode."""

    def summary(self) -> dict[str, Any]:
        """The numbers of the episode."""
        events = [event for step in self.steps for event in step["events"]]
        return {
            "outcome": self.outcome,
            "steps": len(self.steps),
            "events": {name: events.count(name) for name in sorted(set(events))},
            "stale_chunks": self.stale_chunks,
            "infer_ms": _percentiles(self.infer_ms),
            "tracking_mm": _percentiles(self.tracking_mm),
            "late_ms": _percentiles(self.late_ms),
            "final": self.final,
        }


def run_episode(
    robot: Robot,
    client: ChunkSource,
    envelope: Envelope,
    camera: RobotCamera,
    contract: Contract,
    *,
    log: EpisodeLog,
    permit: Callable[[], bool],
    max_steps: int | None = None,
    dry_run: bool = False,
) -> EpisodeLog:
    """Run one episode at the contract's rate and stop the arm, however it ends.

    Args:
        robot: the arm, near the contract's start pose.
        client: where chunks come from.
        envelope: fresh; its limits also give rates and time-outs.
        camera: calibrated as the contract says.
        contract: of the package.
        log: filled in place.
        permit: dead-man switch, asked before every setpoint and command to the hand; false stops both. Not asked in a
            dry run.
        max_steps: control steps (default: the contract's).
        dry_run: compute and log everything, move nothing.

    Raises:
        SafetyError: preconditions not met, a monitor tripped, a bad chunk, the watchdog, or the switch was released.
        WorkerError: the policy server failed. The arm was stopped before either is raised; what went wrong while
            stopping is a note of the error that was the reason to stop.
    """
    check_tcp(contract, robot.flange_from_tcp)
    check_camera(contract, camera.calibration)
    log.outcome = "interrupted"
    reason: BaseException | None = None
    episode = _Episode(robot, client, envelope, camera, contract, log, dry_run, permit)
    try:
        episode.run(contract.max_episode_steps if max_steps is None else max_steps)
        log.outcome = "completed"
    except BaseException as error:
        reason = error
        log.outcome = str(error) or type(error).__name__
        raise
    finally:
        try:
            episode.close()
        except Exception as error:
            log.outcome += f" (while stopping: {error})"
            if reason is None:
                raise
            reason.add_note(f"while stopping: {error}")
    return log


@dataclass
class _Episode:
    robot: Robot
    client: ChunkSource
    envelope: Envelope
    camera: RobotCamera
    contract: Contract
    log: EpisodeLog
    dry_run: bool
    permit: Callable[[], bool]
    _due: float = 0.0
    _streamed: Setpoint | None = None
    _last_picture: int = 0
    _seen_at: Array | None = None
    _same_pictures: int = 0

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def run(self, max_steps: int) -> None:
        self.envelope.start(wait_at_rest(self.robot.read, lambda state: self._check_permit()))
        self.log.start = self.envelope.target.tolist()
        if not self.dry_run:
            self.robot.begin()
        self._due = time.monotonic()
        while len(self.log.steps) < max_steps:
            chunk = self._next_chunk()
            for action in chunk[: min(self.contract.action_chunk, max_steps - len(self.log.steps))]:
                decision = self.envelope.step(action, self.robot.read())
                state = self._stream(decision)
                self._record(action, decision, state)
        if not self.dry_run:
            self._settle()

    def close(self) -> None:
        try:
            if not self.dry_run:
                self.robot.stop()
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_chunk(self) -> Array:
        asked = time.monotonic()
        while True:
            future = self._pool.submit(self._observe_and_infer)
            self._hold_until(future, asked)
            picture, state, answer, elapsed_ms = future.result()
            self._check_alive(picture, state)
            chunk = check_chunk(answer.get("actions"), self.contract)
            if not self.envelope.is_stale(picture.stamp, time.monotonic()):
                self.log.infer_ms.append(elapsed_ms)
                return chunk
            self.log.stale_chunks += 1

    def _observe_and_infer(self) -> tuple[Picture, RobotState, dict[str, Any], float]:
        started = time.perf_counter()
        picture, state = self.camera.read(), self.robot.read()
        request = {
            self.contract.camera.key: picture.rgb,
            self.contract.state_key: state.observation.astype(np.float32),
            self.contract.prompt_key: self.contract.instruction,
        }
        answer = self.client.infer(request)
        return picture, state, answer, 1000.0 * (time.perf_counter() - started)

    def _settle(self) -> None:
        # An episode ends on its last target, not in the middle of the motion towards it.
        until = time.monotonic() + _SETTLE
        while True:
            setpoint = self.envelope.hold()
            state = self._send(setpoint)
            speed = np.abs([*setpoint.linear, *setpoint.angular]).max()
            if speed < 1e-6 and time.monotonic() > until:
                break
        self.log.final = {"target": self.envelope.target.tolist(), "measured": state.base_from_tcp.tolist()}

    def _hold_until(self, future: Future[Any], asked: float) -> None:
        # At least one setpoint per request, so that a row of stale chunks cannot starve the stream.
        while True:
            self._send(self.envelope.hold())
            waited = time.monotonic() - asked
            if waited > self.envelope.limits.watchdog:
                raise SafetyError(
                    f"no usable chunk for {waited:.1f} s (watchdog {self.envelope.limits.watchdog} s, "
                    f"{self.log.stale_chunks} too old); the arm held and was stopped. Check the policy server's speed"
                )
            # After the watchdog: an answer that comes too late is not used because it did come.
            if future.done():
                return

    def _stream(self, decision: Decision) -> RobotState:
        # The hand gets its command with the first setpoint: after monitors and permit, as the arm does.
        state = self._send(decision.setpoints[0], decision.width)
        for setpoint in decision.setpoints[1:]:
            state = self._send(setpoint)
        return state

    def _send(self, setpoint: Setpoint, width: float | None = None) -> RobotState:
        # Waiting comes first, so that what was computed since the last setpoint does not delay this one.
        time.sleep(max(0.0, self._due - time.monotonic()))
        state = self.robot.read()
        now = time.monotonic()
        self.envelope.monitor(state, self._streamed, now)
        if self._streamed is not None:
            error = pose_error(self._streamed.pose, state.base_from_tcp)
            self.log.tracking_mm.append(1000.0 * float(np.linalg.norm(error[:3])))
        self._check_permit()
        if not self.dry_run:
            self.robot.command(setpoint)
            if width is not None:
                self.robot.grip(width)
            self._streamed = setpoint
        self.log.late_ms.append(1000.0 * max(0.0, now - self._due))
        # A late setpoint moves the schedule: catching up would replay the motion faster than it was planned.
        self._due = max(self._due, now) + 1.0 / self.envelope.limits.stream_hz
        return state

    def _check_permit(self) -> None:
        if not self.dry_run and not self.permit():
            raise SafetyError("the dead-man switch was released; the arm was stopped")

    def _check_alive(self, picture: Picture, state: RobotState) -> None:
        digest = zlib.crc32(picture.rgb.tobytes())
        position = state.base_from_tcp[:3, 3]
        if digest != self._last_picture or self._seen_at is None:
            self._last_picture, self._seen_at, self._same_pictures = digest, position, 0
            return
        if np.linalg.norm(position - self._seen_at) > _FROZEN_TRAVEL:
            self._same_pictures += 1
        if self._same_pictures >= _FROZEN_PICTURES:
            raise SafetyError(
                f"the camera sent the same picture {self._same_pictures + 1} times while the arm moved; it is frozen"
            )

    def _record(self, action: Array, decision: Decision, state: RobotState) -> None:
        self.log.steps.append(
            {
                "time": time.monotonic(),
                "action": action.tolist(),
                "target": decision.target.tolist(),
                "measured": state.base_from_tcp.tolist(),
                "q": state.q.tolist(),
                "width_target": decision.width,
                "width": state.width,
                "events": list(decision.events),
            }
        )


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": float(np.max(values))}
