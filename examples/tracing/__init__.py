"""A user's own OpenTelemetry spans in steps: children of the span around the run, on whichever thread they are."""
