"""Collectives and parallel layers that keep links busy: bucketed, overlapped, compressed, hierarchical."""
