import pytest

from gsrl_core.sim import fr3
from gsrl_core.sim.settings import WorldSettings


@pytest.fixture(scope="session")
def urdf(tmp_path_factory):
    return fr3.prepare_urdf(tmp_path_factory.mktemp("fr3"))


@pytest.fixture(scope="session")
def quick(urdf):
    """Settings of the laptop size."""
    return WorldSettings(urdf, sim_hz=100, solver_iterations=8)


@pytest.fixture(scope="package", autouse=True)
def home(tmp_path_factory):
    """The prepared URDF is written below a temporary GSRL_HOME, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSRL_HOME", str(tmp_path_factory.mktemp("home")))
        yield
