"""The daemon: it owns the flash device, the bundled store and the DRAM pool. See ARCHITECTURE.md."""
