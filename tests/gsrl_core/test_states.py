import pytest
import torch

from gsrl_core.errors import TrainingError
from gsrl_core.states import load_state, save_state


def test_round_trip_makes_the_folder_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "work" / "state.pt"
    save_state(path, {"step": 3, "w": torch.arange(4)})
    state = load_state(path, ("step", "w"))
    assert state["step"] == 3
    assert torch.equal(state["w"], torch.arange(4))
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


def test_nothing_there_is_nothing(tmp_path, caplog):
    assert load_state(tmp_path / "state.pt", ()) is None
    assert not caplog.text


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_torn_state_is_begun_anew_with_a_warning(tmp_path, caplog, length):
    path = tmp_path / "state.pt"
    save_state(path, {"w": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:length])
    assert load_state(path, ("w",)) is None
    assert "cannot be read" in caplog.text


def test_a_whole_state_of_another_version_is_refused_and_kept(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"a": 1})
    with pytest.raises(TrainingError, match=r"another version of this program \(it lacks b, c\)"):
        load_state(path, ("a", "b", "c"))
    assert load_state(path, ("a",)) == {"a": 1}


def test_what_is_no_state_is_begun_anew(tmp_path, caplog):
    save_state(tmp_path / "state.pt", [1])
    assert load_state(tmp_path / "state.pt", ()) is None
    assert "it is no state" in caplog.text


def test_a_failed_write_keeps_the_old_state(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"a": 1})
    with pytest.raises(Exception, match="pickle"):
        save_state(path, {"a": lambda: None})
    assert load_state(path, ("a",)) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
