"""A policy behind a request dictionary: checks what comes in against the contract, answers with a chunk."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gsrl_core.deploy.contract import Contract
from gsrl_core.errors import PackageError
from gsrl_core.interfaces import Observation, Policy

SEED_KEY = "seed"
"""Optional integer in a request: fixes the sampling noise, so that the same request gives the same chunk."""


class PolicyService:
    """Answers one request at a time (a policy is not thread-safe)."""

    def __init__(self, policy: Policy, contract: Contract) -> None:
        """Raises PackageError when the policy's chunk is not what the contract promises."""
        promised, given = (contract.horizon, contract.action.dim), (policy.horizon, policy.action_dim)
        if promised != given:
            raise PackageError(f"the policy makes chunks of {given}, the contract says {promised}; package again")
        self._policy = policy
        self._contract = contract
        self._lock = threading.Lock()
        self._generator = torch.Generator()
        self._generator.seed()

    def warm_up(self) -> float:
        """Answer one blank request so that nothing is compiled while an arm waits; returns the milliseconds it took."""
        camera = self._contract.camera
        blank = {
            camera.key: np.zeros(camera.shape, np.uint8),
            self._contract.state_key: np.zeros(self._contract.state_dim, np.float32),
            self._contract.prompt_key: self._contract.instruction,
            SEED_KEY: 0,
        }
        return float(self.infer(blank)["policy_timing"]["infer_ms"])

    def infer(self, request: object) -> dict[str, Any]:
        """The chunk ``actions`` float32 [H, 7] for a request, with the state that was used and the time it took.

        Raises:
            PackageError: a key is missing or its value does not follow the contract.
        """
        observation, seed = self._checked(request)
        generator = self._generator if seed is None else torch.Generator().manual_seed(seed)
        with self._lock, torch.inference_mode():
            started = time.perf_counter()
            sample = self._policy.act(observation, generator, explore=False)
            actions = sample.actions[0].float().cpu().numpy()
            elapsed = 1000.0 * (time.perf_counter() - started)
        return {
            "actions": actions,
            "state": observation.state[0].numpy(),
            "policy_timing": {"infer_ms": elapsed},
        }

    def _checked(self, request: object) -> tuple[Observation, int | None]:
        contract = self._contract
        if not isinstance(request, Mapping):
            raise PackageError(f"a request is a map of observations, not {type(request).__name__}")
        keys = (contract.camera.key, contract.state_key, contract.prompt_key)
        missing = [key for key in keys if key not in request]
        if missing:
            raise PackageError(
                f"the request lacks {missing}; it has {sorted(map(str, request))}, needed are {list(keys)}"
            )
        image = _array(request, contract.camera.key, contract.camera.shape, "u")
        state = _array(request, contract.state_key, (contract.state_dim,), "fiu")
        if not np.isfinite(state).all():
            raise PackageError(f"{contract.state_key} contains values that are not finite: {state.tolist()}")
        prompt = request[contract.prompt_key]
        if not isinstance(prompt, str) or not prompt.strip():
            raise PackageError(f"{contract.prompt_key} must be a text that is not empty, not {prompt!r}")
        seed = request.get(SEED_KEY)
        if seed is not None and (not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63):
            raise PackageError(f"{SEED_KEY} must be an integer from 0 to 2^63 - 1, not {seed!r}")
        observation = Observation(
            rgb={contract.camera.name: torch.from_numpy(image.copy())[None]},
            state=torch.from_numpy(state.astype(np.float32))[None],
            instruction=(str(prompt),),
        )
        return observation, None if seed is None else int(seed)


def _array(request: Mapping[Any, Any], key: str, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    value = request[key]
    array = np.asarray(value) if isinstance(value, np.ndarray | list | tuple) else None
    if array is None or array.shape != shape or array.dtype.kind not in kinds or (kinds == "u" and array.itemsize != 1):
        given = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        wanted = "uint8" if kinds == "u" else "float32"
        raise PackageError(f"{key} must be {wanted} of shape {shape}, was {given}")
    return array
