"""The daemon: gRPC servers around guests and migrations, and their life from start to SIGTERM."""
