"""What the schedule spaces of several templates share; each space is beside its template."""
