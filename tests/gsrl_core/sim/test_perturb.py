import numpy as np
import pytest
import torch
from sim_helpers import PUT

from gsrl_core.errors import SimulationError
from gsrl_core.sections import EvaluationConfig
from gsrl_core.sim import task
from gsrl_core.sim.perturb import PERTURBATIONS, Perturbation, perturbation
from gsrl_core.sim.tasks.put_cube_on_plate import CUBE_CENTER


def test_every_cell_of_the_sweep_exists():
    for kind in EvaluationConfig().perturbations:
        assert perturbation(kind).kind == kind
        assert perturbation(kind) != Perturbation(kind)
    with pytest.raises(SimulationError, match="lighting"):
        perturbation("lightning")


def test_nominal_changes_nothing():
    episode = perturbation("nominal").draw(3)
    assert episode.spec == task.EpisodeSpec(3)
    assert episode.gain.tolist() == [1, 1, 1]
    assert not episode.camera_turn.any() and not episode.camera_shift.any()
    assert episode.instruction is None


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_draws_depend_on_the_seed_alone(kind):
    first, again = perturbation(kind).draw(7), perturbation(kind).draw(7)
    assert first.spec == again.spec
    assert first.instruction == again.instruction
    assert torch.equal(first.gain, again.gain)
    assert (first.camera_turn == again.camera_turn).all()
    assert (first.camera_shift == again.camera_shift).all()


def test_draws_stay_in_their_ranges_and_differ():
    lit = torch.stack([perturbation("lighting").draw(seed).gain for seed in range(200)])
    assert (lit[:, 1] >= 0.6).all()
    assert (lit[:, 1] <= 1.3).all()
    tint = lit[:, [0, 2]] / lit[:, 1:2]
    assert ((tint - 1).abs() <= 0.15 + 1e-6).all()
    assert lit.std(dim=0).min() > 0.1
    friction = torch.tensor([perturbation("friction").draw(seed).spec.friction_scale for seed in range(200)])
    assert 0.4 <= friction.min() < 0.45
    assert 1.4 < friction.max() <= 1.5
    moved = [perturbation("camera").draw(seed) for seed in range(200)]
    assert np.std([episode.camera_shift for episode in moved]) == pytest.approx(0.01, rel=0.15)
    assert np.std([episode.camera_turn for episode in moved]) == pytest.approx(0.015, rel=0.15)
    worded = perturbation("wording").for_task(PUT.rewordings)
    assert {worded.draw(seed).instruction for seed in range(50)} == set(PUT.rewordings)


def test_only_the_wording_cell_rewords_and_only_where_the_task_has_other_words():
    assert perturbation("pose").for_task(PUT.rewordings).draw(1).instruction is None
    assert perturbation("wording").for_task(()).draw(1).instruction is None


def test_a_disturbance_of_looks_leaves_the_objects_where_they_are():
    nominal = PUT.start(perturbation("nominal").draw(5).spec)
    lit = PUT.start(perturbation("lighting").draw(5).spec)
    assert (nominal.objects["cube"] == lit.objects["cube"]).all()
    wide = PUT.start(perturbation("pose").draw(5).spec)
    # The same draw, stretched about the centre.
    near, far = (start.objects["cube"][:3] - CUBE_CENTER for start in (nominal, wide))
    assert far == pytest.approx(1.5 * near)
