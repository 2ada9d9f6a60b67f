import importlib
import os
import sys

import pytest
from emulated_time import MODULES, EmulatedTime


@pytest.fixture
def emulated_time(request, monkeypatch, tmp_path_factory):
    """The time of the emulators that are started from now on; the robot's client and the test know no other."""
    folder = tmp_path_factory.mktemp("emulated_time")
    clock = EmulatedTime(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    examples = [module for name, module in sys.modules.items() if name == "deploy_examples"]
    for module in [request.module, *examples, *map(importlib.import_module, MODULES)]:
        monkeypatch.setattr(module, "time", clock, raising=False)
    return clock
