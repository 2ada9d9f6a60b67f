"""The sections of the configuration: every value with its meaning, unit and range.

Each section checks itself; :class:`PipelineConfig` checks relations between sections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gsrl_core.deploy.limits import SafetyLimits

Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""Physics, numpy and torch agree on these; what follows is derived by addition or with room above."""


class Section(BaseModel):
    """Frozen, closed base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class AssetsConfig(Section):
    """Where photos, robot assets and the starting checkpoint come from."""

    capture: str = Field("bundled", min_length=1)
    """Folder of photos, a video file, or ``bundled`` for the tabletop capture that ships with the project."""
    gsenv: str | None = Field(None, min_length=1)
    """Hub dataset id (or folder) in the layout of RLinf/gsenv-assets-v0; none uses the FR3 of the franky-sim wheel."""
    revision: str = Field("main", min_length=1)
    """Hub revision (commit, tag or branch) of ``gsenv``."""


class CaptureConfig(Section):
    """Photos to cameras."""

    max_image_side: int = Field(960, ge=64, le=8192)
    """Photos are reduced to this longest side for fitting [px]."""
    sfm_image_side: int = Field(1600, ge=256, le=8192)
    """Longest side for feature extraction [px]."""
    max_frames: int = Field(200, ge=3, le=2000)
    """At most this many sharp frames are taken out of a video."""
    marker_size: float | None = Field(None, gt=0, le=1)
    """Edge of the ArUco tags [m]; none takes it from the capture's markers.json, and without that scale is unknown."""
    held_out_every: int = Field(8, ge=2, le=100)
    """Every n-th photo (0, n, 2n, ...) is kept out of the fit and used to measure it."""


class FitConfig(Section):
    """3D Gaussian optimisation."""

    backend: Literal["auto", "numba", "gsplat"] = "auto"
    """Rasteriser; auto takes gsplat when a CUDA device is there."""
    steps: int = Field(30_000, ge=1, le=1_000_000)
    """Optimiser steps, one photo each."""
    max_gaussians: int = Field(1_000_000, ge=100, le=16_000_000)
    """Budget that densification grows to."""
    sh_degree: int = Field(3, ge=0, le=3)
    """Degree of the spherical harmonics; 0 is a colour that does not depend on the direction."""
    ssim_weight: float = Field(0.2, ge=0, le=1)
    """Share of 1 - SSIM in the loss; the rest is L1."""
    densify_every: int = Field(100, ge=1)
    """Steps between prunings and splits."""
    densify_until: float = Field(0.5, ge=0, le=1)
    """Fraction of the steps after which no Gaussian is added."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between saved states; a killed run loses at most these."""
    seed: Seed = 0


class QualityConfig(Section):
    """What a reconstruction must reach before a robot is put into it; changing these repeats no fit."""

    min_psnr: float = Field(20.0, ge=0)
    """Mean PSNR of the held-out photos [dB]."""
    max_scale_residual_mm: float = Field(5.0, gt=0)
    """Residual of the tag corners after metric alignment [mm]."""
    min_tags: int = Field(3, ge=1)
    """Tags that agree with each other: the corners of one alone always fit, and its tilt is half a degree off."""
    min_registered: float = Field(0.8, gt=0, le=1)
    """Share of the photos that could be placed."""


class CameraConfig(Section):
    """A pinhole camera of the environment; pose in the robot base frame, SAPIEN axes (x forward, y left, z up)."""

    name: str = "3rd_view_camera"
    width: int = Field(640, ge=16, le=4096)
    height: int = Field(480, ge=16, le=4096)
    fx: float = Field(604.152161, gt=0)
    fy: float = Field(604.267212, gt=0)
    cx: float = 316.670074
    cy: float = 243.194473
    position: tuple[float, float, float] = (0.075, -0.161, 0.497)
    rotation: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]] = (
        (0.68370109, -0.50239316, 0.52929587),
        (0.33318036, 0.86018832, 0.38609201),
        (-0.64926404, -0.08762054, 0.75549905),
    )
    link: str | None = None
    """Robot link that carries the camera (pose then relative to it); none is fixed in the base frame."""
    distortion: tuple[float, float, float, float, float] | None = None
    """k1, k2, p1, p2, k3 in OpenCV's convention; the focal lengths and principal point are then those of the distorted
    picture. None (or zeros) is a pinhole. Packages for the robot describe pinholes only and refuse it."""


Range = tuple[float, float]
"""Lowest and highest value of a uniform draw; equal to each other for no draw."""


class RealismConfig(Section):
    """What a real camera and bench do to a picture. Drawn for each episode from its seed; everything is off by default.

    Order: contact shadow, background, the sweep's own lighting, exposure and white balance, gamma, contrast, noise.
    Every picture that the environment returns shows it, whether for demonstrations, training or the sweep.
    """

    exposure_range: Range = (1.0, 1.0)
    """Factor of all channels, 0.05 .. 20, uniform."""
    white_balance_range: Range = (1.0, 1.0)
    """Factor of each channel, drawn independently, 0.05 .. 20, uniform."""
    gamma_range: Range = (1.0, 1.0)
    """Exponent of values in [0, 1], 0.1 .. 10, uniform; above 1 darkens the middle."""
    contrast_range: Range = (1.0, 1.0)
    """Factor of the distance from middle grey (127.5 of 255), 0 .. 10, uniform."""
    read_noise: float = Field(0.0, ge=0, le=64)
    """Standard deviation of the noise that does not depend on brightness [levels of 255]; new in every picture."""
    shot_noise: float = Field(0.0, ge=0, le=64)
    """Standard deviation at white of the noise whose variance grows with brightness [levels of 255]."""
    camera_turn_deg: float = Field(0.0, ge=0, le=30)
    """Standard deviation of the cameras' rotation vector per axis [degrees]; drawn once an episode."""
    camera_shift: float = Field(0.0, ge=0, le=0.5)
    """Standard deviation of the cameras' position per axis [m]; drawn once an episode."""
    background: str | None = Field(None, min_length=1)
    """Shown where the scene lets light through: ``random`` for a flat colour, or a folder of pictures (at most 512, one
    is drawn for each episode; caches know the folder's name alone). None leaves black."""
    shadow: float = Field(0.0, ge=0, le=1)
    """Darkening of the table under bodies that touch it: 0 for none, 1 for black."""

    @model_validator(mode="after")
    def _ordered(self) -> RealismConfig:
        limits = {"exposure_range": (0.05, 20), "white_balance_range": (0.05, 20), "gamma_range": (0.1, 10)}
        for name, (lowest, highest) in (limits | {"contrast_range": (0, 10)}).items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name} ({low}, {high}) must be two numbers, {lowest} <= low <= high <= {highest}")
        return self


class SimConfig(Section):
    """The environment."""

    task: str = Field("PutCubeOnPlate-v0", min_length=1)
    """PutCubeOnPlate-v0, StackCube-v0, PickAndPlace-v0, or one of your own as ``FILE.py:CLASS``."""
    task_options: dict[str, bool | int | float | str] = {}
    """Fields of the task's class, such as ``{mesh: mug.obj}``; files are looked for where this is written."""
    num_envs: int = Field(64, ge=1, le=4096)
    workers: int = Field(0, ge=0, le=512)
    """Physics processes of each pipeline stage; 0 takes two for each CPU core."""
    physics_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"
    sim_hz: int = Field(500, ge=50, le=5000)
    control_hz: int = Field(10, ge=1, le=100)
    solver_iterations: int = Field(6, ge=1, le=255)
    """PhysX position iterations per simulation step. The seed's 25 move the hand by less than 1 mm in the expert's
    episodes at 500 Hz and take 2.5 times as
    long; the difference grows with 1 / (sim_hz x solver_iterations)."""
    max_episode_steps: int = Field(100, ge=1, le=10_000)
    control_mode: Literal["pd_ee_target_delta_pose", "pd_ee_delta_pose", "pd_joint_delta_pos", "pd_joint_pos"] = (
        "pd_ee_target_delta_pose"
    )
    """ManiSkill's name. Packages for the robot take pd_ee_target_delta_pose only."""
    cameras: tuple[CameraConfig, ...] = Field((CameraConfig(),), min_length=1)
    """The policy gets their pictures in this order; packages for the robot take one that is fixed."""
    render_downscale: int = Field(1, ge=1, le=16)
    """Pictures are rendered at width/n x height/n with the intrinsics scaled to match."""
    render_supersample: int = Field(1, ge=1, le=8)
    """They are drawn n times as large on each side and averaged, as a camera's pixel does. Equal to
    ``render_downscale`` it draws the configured size: how a real picture, reduced, looks, at the full cost."""
    rasterizer: Literal["auto", "numba", "gsplat", "cuda"] = "auto"
    """numba (CPU), cuda (our kernels), gsplat (their reference); auto takes the fastest that runs here."""
    realism: RealismConfig = RealismConfig()
    instruction: str | None = Field(None, min_length=1)
    """What the policy is told; none: what the task says."""

    @model_validator(mode="before")
    @classmethod
    def _absolute(cls, values: Any) -> Any:
        # Workers and Prefect's processes have working directories of their own.
        return absolute_files(values, Path()) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _consistent(self) -> SimConfig:
        names = [camera.name for camera in self.cameras]
        if len(set(names)) < len(names):
            raise ValueError(f"cameras {names}: every name only once")
        if self.sim_hz % self.control_hz:
            raise ValueError(f"sim_hz ({self.sim_hz}) must be a multiple of control_hz ({self.control_hz})")
        return self


def absolute_files(sim: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The section ``sim`` with those files of ``task`` and ``task_options`` that are in ``folder`` made absolute."""

    def absolute(text: str) -> str:
        file = (folder / text).absolute()
        return str(file) if not Path(text).is_absolute() and file.is_file() else text

    changed = dict(sim)
    if isinstance(reference := sim.get("task"), str) and ".py:" in reference:
        path, _, name = reference.rpartition(":")
        changed["task"] = f"{absolute(path)}:{name}"
    if isinstance(options := sim.get("task_options"), dict):
        changed["task_options"] = {k: absolute(v) if isinstance(v, str) else v for k, v in options.items()}
    return changed


class PolicyConfig(Section):
    """The starting checkpoint and how it is sampled."""

    checkpoint: str = Field("RLinf/RLinf-Pi05-GSEnv-PutCubeOnPlate-V0-SFT", min_length=1)
    """Hub model id, folder, or ``bundled:pi05_tiny`` (served through the same hub code)."""
    revision: str = Field("main", min_length=1)
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$")
    """Expected digest of model.safetensors; checked after the download."""
    discrete_state: bool | None = None
    """Whether the prompt carries the state; none leaves it to config.json, which openpi's converter does not tell."""
    asset_id: str | None = Field(None, min_length=1)
    """Which norm_stats.json of a checkpoint that brings several (assets/<id>/norm_stats.json)."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    compile: Literal["auto", "never"] = "auto"
    """auto infers with compiled kernels and CUDA graphs on a GPU; never, with the network as it is written."""
    denoise_steps: int = Field(5, ge=1, le=100)
    action_chunk: int = Field(5, ge=1, le=100)
    """Actions executed per decision; at most the checkpoint's horizon."""
    noise_method: Literal["flow_sde", "flow_noise"] = "flow_sde"
    noise_level: float = Field(0.5, gt=0, le=5)
    """Flow-SDE noise scale."""
    noise_std_range: tuple[float, float] = (0.08, 0.16)
    """Flow-Noise: range of the learned standard deviation, 0 < low <= high."""

    @model_validator(mode="after")
    def _ordered(self) -> PolicyConfig:
        low, high = self.noise_std_range
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"noise_std_range ({low}, {high}) must be two numbers with 0 < low <= high")
        return self


class DemosConfig(Section):
    """Scripted demonstrations."""

    episodes: int = Field(1000, ge=1)
    seed: Seed = 1_000_000
    """First episode seed; successes only are kept."""
    action_noise: float = Field(0.01, ge=0, le=0.1)
    """Standard deviation of the disturbance injected into executed (not recorded) translations [m]."""


class SftConfig(Section):
    """Flow-matching supervised fine-tuning."""

    steps: int = Field(30_000, ge=1)
    batch_size: int = Field(64, ge=1)
    """Samples per optimizer step."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples per forward/backward pass; none: the whole batch. Smaller ones need less memory for the same step."""
    trainable: Literal["all", "expert"] = "all"
    """expert leaves the vision-language model as it is, as PPO does: no gradients, moments or average of it; its
    weights are kept in ``precision`` and written back as they were."""
    stats: Literal["init", "demos"] = "init"
    """Whose means and quantiles normalise states and actions: those of the checkpoint to start from, with which its
    weights mean the same motions as before, or those of the demonstrations (of another robot, say). A random start
    always takes the latter."""
    learning_rate: float = Field(2.5e-5, gt=0)
    warmup_steps: int = Field(1000, ge=0)
    decay_steps: int | None = Field(None, ge=1)
    """Step at which the cosine of the learning rate ends; none: with the last step. A run may be shorter than it; its
    state then stays, so that the same command with more ``steps`` prolongs it."""
    weight_decay: float = Field(1e-10, ge=0)
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """The weights that are kept are this moving average of those that are trained."""
    image_augmentation: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; weights and optimizer stay float32."""
    gradient_checkpointing: bool = False
    """Run decoder layers again in the backward pass instead of keeping their activations."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between saved states; a killed run loses at most these."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _divisible(self) -> SftConfig:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of micro_batch ({self.micro_batch})")
        return self


class PpoConfig(Section):
    """PPO of the flow policy."""

    iterations: int = Field(100, ge=1)
    rollout_epochs: int = Field(8, ge=1)
    """Batches of ``sim.num_envs`` episodes per iteration."""
    update_epochs: int = Field(4, ge=1)
    global_batch: int = Field(2048, ge=1)
    """Samples per optimizer step."""
    micro_batch: int = Field(128, ge=1)
    """Samples per forward/backward pass."""
    learning_rate: float = Field(5e-6, gt=0)
    value_learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    """First optimizer steps in which both learning rates grow linearly to their values; the actor's count from the end
    of the critic's warm-up. Adam's first step changes every weight by the whole rate, whatever its gradient."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """cosine lowers both learning rates from iteration to iteration, to 0 after the last one (pi_RL's cure for a KL
    that creeps up); ``iterations`` cannot change between runs then."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gamma: float = Field(0.99, gt=0, le=1)
    """Discount per chunk."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """Lower bound c of the surrogate for negative advantages; none turns it off."""
    value_clip: float = Field(0.2, gt=0)
    huber_delta: float = Field(10.0, gt=0)
    value_coef: float = Field(1.0, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy, for flow_noise only: the noise of flow_sde is not learned."""
    logprob_level: Literal["chunk", "action", "token"] = "chunk"
    """What has one ratio: the chunk (log-probabilities summed over its executed actions and their entries), each
    executed action (summed over its entries), or each entry. All ratios of a chunk share its advantage, and the loss is
    their mean."""
    entropy_level: Literal["chunk", "action", "token"] = "token"
    """The entropy is summed over a chunk's entries, or over an action's and averaged over actions, or averaged over all
    entries (the seed's); entropy_coef weighs that number."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of a penalty on the k3 estimate of KL(old || new), averaged over the chunk's ratios."""
    target_kl: float | None = Field(None, gt=0)
    """The update stops when approximate KL (k3, summed over a chunk's ratios) passes 1.5 times this."""
    critic_warmup_iterations: int = Field(0, ge=0)
    """First iterations that train the value head alone."""
    normalize_advantages: bool = True
    gradient_checkpointing: bool = False
    """Run the expert's layers again in the backward pass instead of keeping their activations."""
    prefix_cache: Literal["auto", "device", "host", "recompute"] = "auto"
    """Where what the frozen part makes of the pictures waits for the update; auto takes the first of them that its
    memory estimate (logged) allows."""
    recompute_log_prob: Literal["auto", "on", "off"] = "auto"
    """Whether the learner evaluates all samples before the first epoch, so that its first ratio is 1 in spite of the
    rounding by which sampling and learning differ. auto does so where a first micro-batch is off by more than 0.001: on
    a GPU in bfloat16, not in float32. It costs a forward pass over all samples, and over prefixes that are not kept.
    """
    checkpoint_every: int = Field(5, ge=1)
    """Iterations between checkpoints; a killed run loses at most these."""
    eval_every: int = Field(0, ge=0)
    """Iterations between evaluations during training; 0 for none."""
    seed: Seed = 42


class ClusterConfig(Section):
    """Placement in the seed's notation."""

    runtime: Literal["local", "ray"] = "local"
    component_placement: dict[str, str] = {"env,rollout,actor": "all"}
    data_parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What several actor processes hold: ddp all weights and optimizer states each, fsdp2 a part each. With fsdp2 the
    actors are processes of their own on every placement, and others act with whole weights; it needs ray."""
    pipeline_stage_num: int = Field(1, ge=1, le=8)
    """Groups that the environments are split into, so that one is stepped while another is inferred."""


class EvaluationConfig(Section):
    """The sweep. The same fixed seeds for every checkpoint."""

    episodes: int = Field(512, ge=1, le=100_000)
    """Episodes of the nominal cell."""
    episodes_per_perturbation: int = Field(128, ge=0, le=100_000)
    perturbations: tuple[
        Literal["pose", "lighting", "camera", "friction", "wording", "sensor", "background", "shadow"], ...
    ] = (
        "pose",
        "lighting",
        "camera",
        "friction",
        "wording",
    )
    seed: Seed = 9_000_000
    videos: int = Field(4, ge=0, le=64)
    """Episodes recorded per cell, of its first batch (so at most ``sim.num_envs``)."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of all intervals."""
    real_results: str | None = Field(None, min_length=1)
    """JSON file with outcomes on the real robot; the sweep then tells how well simulation predicts them."""

    @model_validator(mode="after")
    def _each_once(self) -> EvaluationConfig:
        if len(set(self.perturbations)) < len(self.perturbations):
            raise ValueError(f"perturbations {self.perturbations}: every one only once")
        return self


class ReleaseConfig(Section):
    """Gate, package and registration."""

    minimum_success: float = Field(0.5, ge=0, le=1)
    """The package is released only if the lower bound of nominal success reaches this."""
    name: str = Field("fr3-put-cube-on-plate", pattern=r"^[a-z0-9][a-z0-9-]{1,62}$")
    """Name of the package and of the registered model."""
    verify_robot: bool = True
    """Drive an episode through franky against the control-interface emulator as part of verification."""
    safety: SafetyLimits = SafetyLimits()
    """The envelope that the package carries to the robot (safety.yaml)."""


class TrackingConfig(Section):
    """Experiment tracking."""

    experiment: str = "real2sim2real"
    tensorboard: bool = True


class PipelineConfig(Section):
    """All sections; relations between them are checked here."""

    assets: AssetsConfig = AssetsConfig()
    capture: CaptureConfig = CaptureConfig()
    fit: FitConfig = FitConfig()
    quality: QualityConfig = QualityConfig()
    sim: SimConfig = SimConfig()
    policy: PolicyConfig = PolicyConfig()
    demos: DemosConfig = DemosConfig()
    sft: SftConfig = SftConfig()
    ppo: PpoConfig = PpoConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    release: ReleaseConfig = ReleaseConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _relations(self) -> PipelineConfig:
        if self.sim.max_episode_steps % self.policy.action_chunk:
            raise ValueError(
                f"sim.max_episode_steps ({self.sim.max_episode_steps}) must be a multiple of "
                f"policy.action_chunk ({self.policy.action_chunk})"
            )
        if self.ppo.global_batch % self.ppo.micro_batch:
            raise ValueError(
                f"ppo.global_batch ({self.ppo.global_batch}) must be a multiple of ppo.micro_batch "
                f"({self.ppo.micro_batch})"
            )
        if self.ppo.entropy_coef and self.policy.noise_method == "flow_sde":
            raise ValueError(
                f"ppo.entropy_coef ({self.ppo.entropy_coef}) does nothing with policy.noise_method flow_sde, whose "
                "noise is a fixed schedule; set it to 0, or take flow_noise"
            )
        if self.cluster.data_parallel == "fsdp2" and self.cluster.runtime != "ray":
            raise ValueError("cluster.data_parallel fsdp2 needs several processes: set cluster.runtime to ray")
        if self.sim.num_envs % self.cluster.pipeline_stage_num:
            raise ValueError(
                f"sim.num_envs ({self.sim.num_envs}) must be a multiple of cluster.pipeline_stage_num "
                f"({self.cluster.pipeline_stage_num})"
            )
        return self
