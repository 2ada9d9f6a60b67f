"""The overrides parameter: closed, typed, and silent about what was not given."""

from __future__ import annotations

import json

import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows.parameters import Overrides
from flows.real2sim2real import real2sim2real
from gsrl_core.config import apply_overrides, load
from gsrl_core.sections import PipelineConfig


def test_every_key_of_the_configuration_is_there_once():
    expected = {
        f"{section}.{name}"
        for section, field in PipelineConfig.model_fields.items()
        if section not in ("demos", "sft")
        for name in type(field.default).model_fields
    }
    schema = Overrides.model_json_schema()
    assert set(schema["properties"]) == expected
    assert schema["additionalProperties"] is False
    assert not schema.get("required")


def test_no_property_carries_a_default_that_a_form_would_fill_in():
    assert not [k for k, v in Overrides.model_json_schema()["properties"].items() if "default" in v]


def test_types_bounds_and_help_are_those_of_the_section():
    properties = Overrides.model_json_schema()["properties"]
    assert properties["ppo.learning_rate"] == {"exclusiveMinimum": 0, "title": "ppo.learning_rate", "type": "number"}
    assert properties["policy.noise_method"]["enum"] == ["flow_sde", "flow_noise"]
    assert "SFT" not in properties["policy.sha256"]["description"]
    assert "safetensors" in properties["policy.sha256"]["description"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ppo.lr": 1},
        {"ppo__learning_rate": 1e-5},
        {"ppo": {"seed": 1}},
        {"sft.steps": 5},
        {"ppo.seed": "x"},
        {"ppo.gamma": 2},
    ],
)
def test_what_does_not_exist_or_fit_is_refused(wrong):
    with pytest.raises(ValidationError):
        Overrides.model_validate(wrong)


def test_only_what_was_given_is_kept_also_an_explicit_null():
    given = {"ppo.learning_rate": 1e-5, "policy.sha256": None}
    overrides = Overrides.model_validate(given)
    assert overrides.assignments() == given
    assert json.loads(overrides.model_dump_json()) == given
    assert Overrides.model_validate(overrides.model_dump()) == overrides
    assert apply_overrides(load("laptop"), overrides.assignments()).ppo.learning_rate == 1e-5
    assert apply_overrides(load("laptop"), Overrides().assignments()) == load("laptop")


def test_nested_values_survive_the_way_through_json():
    camera = {"name": "wrist", "link": "fr3_hand"}
    config = apply_overrides(load("laptop"), Overrides.model_validate({"sim.cameras": [camera]}).assignments())
    assert [c.name for c in config.sim.cameras] == ["wrist"]


def test_the_flow_has_a_typed_form():
    schema = parameter_schema(real2sim2real).model_dump()
    assert schema["properties"]["overrides"]["default"] == {}
    assert schema["definitions"]["Overrides"]["additionalProperties"] is False
    assert schema["definitions"]["PipelineConfig"]["additionalProperties"] is False
    assert schema["definitions"]["PpoConfig"]["properties"]["gamma"]["description"] == "Discount per chunk."
