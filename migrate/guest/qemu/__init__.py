"""An unpatched QEMU as a guest (docs/qemu.md)."""
