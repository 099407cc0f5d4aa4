"""Outputs on disk: how a stage writes one, its manifest, locks, checksums. Imports options."""
