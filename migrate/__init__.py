"""Moves a running virtual machine from one host to another, postcopy, with userfaultfd and gRPC."""
