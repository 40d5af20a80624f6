"""What can be migrated: guest processes behind one small protocol on a unix socket."""
