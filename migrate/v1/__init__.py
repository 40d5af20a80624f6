"""Generated from proto/migrate/v1/ by scripts/gen_proto."""
