"""The `migrate` command: talks gRPC to daemons, draws, prints JSON."""
