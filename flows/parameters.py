"""Parameters of the flows: a closed, typed form of every dotted key, so that the server refuses what does not exist."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_serializer
from pydantic.fields import FieldInfo

from gsrl_core.config import FOLDER_COMMANDS
from gsrl_core.sections import PipelineConfig


class _DottedKeys(BaseModel):
    """Base of :data:`Overrides`: keeps, and serialises, only what was given."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_alias=True, protected_namespaces=())

    @model_serializer(mode="plain")
    def assignments(self) -> dict[str, Any]:
        """Dotted key -> value of the keys that were given."""
        fields = type(self).model_fields
        return {str(fields[name].alias): getattr(self, name) for name in fields if name in self.model_fields_set}


def _optional(key: str, field: FieldInfo) -> Any:
    """The field of a section under its dotted name, not required and without a default in the schema.

    A default would be wrong here: the form would fill it in, and so override the preset with the class default.
    """
    bounded = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return bounded, Field(default_factory=lambda: None, alias=key, title=key, description=field.description)


def _overrides_model() -> type[_DottedKeys]:
    fields = {
        f"{section}__{name}": _optional(f"{section}.{name}", field)
        for section, section_field in PipelineConfig.model_fields.items()
        if section not in FOLDER_COMMANDS
        for name, field in type(section_field.default).model_fields.items()
    }
    return create_model(
        "Overrides",
        __base__=_DottedKeys,
        __doc__="Single values that replace the preset's, by dotted key, for example ppo.learning_rate.",
        **fields,
    )


Overrides = _overrides_model()
"""Model of the ``overrides`` parameter; ``Overrides.model_validate({"ppo.learning_rate": 1e-5})``."""
