"""The protocol of a migration: state tables, the source's side, the destination's side."""
