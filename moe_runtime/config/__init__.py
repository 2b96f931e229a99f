"""Typed, frozen run configuration: YAML bases and dotted overrides become one `RunConfig`."""
