"""The bench of the bundled capture: procedural textures, layout, and a small ray caster to photograph it."""
